"""Copies, near copies and repeated passages, against plain loops over strings and datasketch."""

import inspect
import random

import datasketch
import numpy as np
import pytest

from lmjax.data.config import DedupConfig
from lmjax.data.preparation import dedup, repeats, shards
from lmjax.data.preparation.engine import Engine
from lmjax.data.preparation.shards import Shard
from lmjax.data.text.words import ngrams, split


def words_of(text):
    """Finds words with a plain loop over characters."""
    out, word = [], ""
    for c in text.lower() + " ":
        if "\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff":
            out += [word, c] if word else [c]
            word = ""
        elif c.isalnum() or c == "_":
            word += c
        else:
            out += [word] if word else []
            word = ""
    return out


def shingles(text, n=5):
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))}


def true_jaccard(a, b):
    """Of two sets of shingles."""
    return len(a & b) / len(a | b) if a | b else 0.0


@pytest.fixture(scope="module")
def corpus():
    """Real text: functions of the standard library, many of them with a few words changed."""
    rng, texts = random.Random(0), []
    for module in (random, inspect):
        lines = inspect.getsource(module).split("\n")
        texts += ["\n".join(lines[i : i + 30]) for i in range(0, len(lines), 30)]
    for text in rng.sample(texts, 60):
        words = text.split(" ")
        for _ in range(rng.choice([0, 1, 2, 5, 20])):
            words[rng.randrange(len(words))] = rng.choice(["zeta", "eta", ""])
        texts.append(" ".join(words))
    texts += ["日本語の文章はここにあります。", "日本語の文章はここにあります!", "", "one"]
    rng.shuffle(texts)
    return texts


def parts_of(texts, folder, size=17):
    parts = []
    for first in range(0, len(texts), size):
        part = Shard(str(folder / f"{first}.arrow"), "s", first, len(texts[first : first + size]))
        shards.write(part.path, {"id": [str(first + i) for i in range(part.documents)],
                                 "text": texts[first : first + size]})
        parts.append(part)
    return parts


def test_words_and_shingles_are_those_of_a_plain_loop(corpus):
    cut = split(corpus)
    got = [[] for _ in corpus]
    for d, start, end in zip(cut.doc_W, cut.start_W, cut.end_W, strict=True):
        got[d].append(corpus[d][start:end].lower())
    assert got == [words_of(text) for text in corpus]
    hashes, bounds = dedup.shingle_sets(corpus, 5)
    assert np.diff(bounds).tolist() == [len(shingles(text)) for text in corpus]
    one_by_one = [dedup.shingle_sets([text], 5)[0] for text in corpus]
    np.testing.assert_array_equal(hashes, np.concatenate(one_by_one))  # whatever the other texts
    alone = ngrams(split(["A b c d e"]), 5)[0]
    assert alone == ngrams(split(["x y", "a B c d E"]), 5)[0] != ngrams(split(["b a c d e"]), 5)[0]


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_near_copies_are_those_of_brute_force(corpus, tmp_path, threshold):
    parts = parts_of(corpus, tmp_path)
    with Engine(str(tmp_path), workers=1, memory_mib=1) as engine:
        (tmp_path / "exact").mkdir()
        (tmp_path / "near").mkdir()
        dedup.exact(engine, parts, str(tmp_path / "exact"))
        config = DedupConfig(threshold=threshold)
        found, similar = dedup.near(engine, parts, str(tmp_path / "exact/removed.npy"), config,
                                    str(tmp_path / "near"))
    gone = set(np.load(tmp_path / "exact/removed.npy")[0].tolist())
    sets = list(map(shingles, corpus))
    pairs = [(b, a) for b in range(len(corpus)) for a in range(b) if not {a, b} & gone
             and true_jaccard(sets[a], sets[b]) >= threshold]
    assert len(found.T) > 20
    for (later, kept), value in zip(found.T.tolist(), similar, strict=True):
        assert value == pytest.approx(true_jaccard(sets[later], sets[kept])) and value >= threshold
    removed = set(found[0].tolist())
    assert not removed & set(found[1].tolist()) and not removed & gone
    expected = set()
    for later, earlier in pairs:
        if earlier not in expected:
            expected.add(later)
    assert len(removed & expected) >= 0.95 * len(expected)
    assert removed <= expected | {later for later, _ in pairs}


def test_exact_copies_differ_in_spaces_and_case_only(tmp_path):
    texts = ["One two", "one  TWO\n", "onetwo three", "Ünter", "ünter", "one two", ""]
    with Engine(str(tmp_path), workers=1) as engine:
        found = dedup.exact(engine, parts_of(texts, tmp_path, 2), str(tmp_path))
    assert found.T.tolist() == [[1, 0], [5, 0]]


def test_minhash_estimates_as_datasketch_does():
    rng, ours, theirs, truth = random.Random(1), [], [], []
    for _ in range(60):
        shared, own = rng.randint(10, 300), rng.randint(0, 200)
        a = [f"s{i}" for i in range(shared)] + [f"a{i}" for i in range(own)]
        b = [f"s{i}" for i in range(shared)] + [f"b{i}" for i in range(own)]
        truth.append(shared / (shared + 2 * own))
        sets, bounds = dedup.shingle_sets([" ".join(a), " ".join(b)], 1)
        signature = dedup.signatures(sets, bounds, 128)
        ours.append((signature[:, 0] == signature[:, 1]).mean())
        sketches = [datasketch.MinHash(128) for _ in "ab"]
        for sketch, words in zip(sketches, (a, b), strict=True):
            sketch.update_batch([word.encode() for word in words])
        theirs.append(sketches[0].jaccard(sketches[1]))
    errors = [np.sqrt(np.mean((np.array(got) - truth) ** 2)) for got in (ours, theirs)]
    expected = np.sqrt(np.mean([j * (1 - j) / 128 for j in truth]))
    assert errors[0] < 1.4 * expected and errors[1] < 1.4 * expected
    assert abs(np.mean(np.array(ours) - truth)) < 0.01


def test_repeated_windows_and_lines_are_cut_from_all_but_the_first(tmp_path):
    common = " ".join(f"w{i}" for i in range(12))
    line = "this line is on every page"
    texts = [f"first {common} end\n{line}", f"second, {common}; rest\n{line}",
             f"third w0 w1 w2 w3\n{line}", f"{line} x"]
    config = DedupConfig(window=10, line_documents=2, line_chars=10)
    nothing = tmp_path / "nothing.npy"
    np.save(nothing, np.zeros((2, 0), np.uint64))
    with Engine(str(tmp_path), workers=1) as engine:
        parts = parts_of(texts, tmp_path, 2)
        files = [repeats.repeats(engine, parts, [str(nothing)], config, str(tmp_path), kind)
                 for kind in ("windows", "lines")]
    windows, lines = (np.load(file)[0] for file in files)
    after = []
    for d, text in enumerate(texts):
        mine = repeats.positions(windows, d), repeats.positions(lines, d)
        after.append(repeats.cut(text, *mine, config)[0])
    assert after == [texts[0], "second, ; rest\n", "third w0 w1 w2 w3\n", texts[3]]
