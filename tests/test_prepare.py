"""Preparing data: the same from the same text, whole or not at all, and never over something else."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lmjax import prepare as module
from lmjax.data import DataConfig, SourceConfig, Tokenizer, TokenizerConfig, open_splits, store
from lmjax.prepare import prepare, split_by_hash

WORDS = ["alpha", "beta", "gamma", "return self", "    if x:", "print(1)", "\u65e5\u672c", "\u2581", "\t"]


def write_texts(path, count=80, seed=0):
    rng = random.Random(seed)
    path.mkdir()
    for i in range(count):
        lines = [" ".join(rng.choices(WORDS, k=5)) for _ in range(rng.randint(3, 30))]
        (path / f"{i:03}.txt").write_text(f"{i}\n" + "\n".join(lines))
    return path


def make_config(texts, **kwargs):
    fields = {"sources": (SourceConfig("texts", f"text:{texts}/*"),), "seq_len": 32, "heldout_fraction": 0.1,
              "tokenizer": TokenizerConfig(vocab_size=320)}
    return DataConfig(**fields | kwargs)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


def silent(line):
    pass


def contents(directory):
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def test_the_stored_documents_are_the_texts(texts, tmp_path):
    lines = []
    out = prepare(make_config(texts), str(tmp_path / "out"), log=lines.append)
    tokenizer = Tokenizer.from_bytes((tmp_path / "out/tokenizer.model").read_bytes())
    manifest, found = store.read_manifest(out), {}
    for split in ("train", "heldout"):
        facts = manifest["sources"]["texts"][split]
        part = store.SplitStore(out, "texts", split, facts, verify=True)
        size = 0
        for i, name in enumerate(part.ids):
            ids = part.tokens()[part.offsets[i] : part.offsets[i + 1]]
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            found[name] = tokenizer.decode(ids[1:-1])
            size += len(found[name].encode())
        assert facts["bytes"] == size and facts["documents"] == len(part.ids) > 0
    assert found == {p.name: p.read_text() for p in texts.iterdir()}
    assert manifest["tokenizer"] == {"hash": tokenizer.hash, "vocab_size": 320}
    baselines = json.loads((tmp_path / "out/baselines.json").read_text())
    assert [b["name"] for b in baselines["baselines"]] == ["unigram", "bigram", "5-gram"]
    train, heldout = open_splits(make_config(texts), out)
    assert baselines["heldout"] == {"tokens": heldout.predictions, "bytes": heldout.bytes}
    assert train.rows(np.arange(4))["tokens"].shape == (4, 32) and train.vocab_size == 320
    for stage in ("read and cleaned texts: 80 documents", "tokenizer: 320", "tokenised texts/train",
                  "baselines", "is ready"):
        assert any(stage in line for line in lines)


def test_the_same_text_gives_the_same_bytes(texts, tmp_path, monkeypatch):
    prepare(make_config(texts), str(tmp_path / "a"), log=silent)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(module, "BATCH_CHARS", 500)
    prepare(make_config(texts), str(tmp_path / "b"), log=silent)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list(tmp_path.glob(".*"))


def test_prepared_data_is_used_again_and_a_changed_source_is_told(tmp_path):
    texts, lines = write_texts(tmp_path / "texts", 20), []
    config, out = make_config(texts), str(tmp_path / "out")
    prepare(config, out, log=silent)
    before = contents(tmp_path / "out")
    assert prepare(config, out, log=lines.append) == out
    assert len(lines) == 1 and "using the data prepared in" in lines[0]
    (texts / "new.txt").write_text("more " * 20)
    prepare(config, out, log=lines.append)
    assert "files of source texts have changed" in lines[-1]
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", [{"min_chars": 10}, {"heldout_fraction": 0.2}, {"clean": ()},
                                    {"tokenizer": TokenizerConfig(vocab_size=321)}])
def test_data_of_another_config_is_not_touched(texts, tmp_path, change):
    prepare(make_config(texts), str(tmp_path / "out"), log=silent)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"data prepared with {next(iter(change))} = .*; use another"):
        prepare(make_config(texts, **change), str(tmp_path / "out"), log=silent)
    assert contents(tmp_path / "out") == before
    for free in ({"seed": 5}, {"seq_len": 8}, {"packing": "none"}):  # of the rows, not of the data
        prepare(make_config(texts, **free), str(tmp_path / "out"), log=silent)


def test_something_else_in_the_way_is_not_touched(texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="expected a prepared directory, .* got something"):
        prepare(make_config(texts), str(tmp_path / "out"), log=silent)
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}
    (tmp_path / "empty").mkdir()
    prepare(make_config(texts), str(tmp_path / "empty"), log=silent)


STAGES = ["_read", "make_tokenizer", "tokenise", "_baselines", "_manifest"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_in_any_stage_leaves_nothing(texts, tmp_path, monkeypatch, stage):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, stage, full)
    with pytest.raises(ValueError, match="expected room for the prepared data, got a full disk; free"):
        prepare(make_config(texts), str(tmp_path / "out"), log=silent)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from lmjax import prepare
from tests.test_prepare import make_config
def stop(*args, **kwargs):
    print("here", flush=True)
    signal.pause()
if sys.argv[3] != "-":
    setattr(prepare, sys.argv[3], stop)
prepare.prepare(make_config(sys.argv[1]), sys.argv[2], log=lambda line: None)
"""


def start(texts, out, stage):
    command = [sys.executable, "-c", KILLED, str(texts), str(out), stage]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_killed_at_any_stage_and_started_again(texts, tmp_path):
    out = tmp_path / "out"
    prepare(make_config(texts), str(tmp_path / "straight"), log=silent)
    for stage in ("tokenise", "_manifest"):
        process = start(texts, out, stage)
        assert process.stdout.readline() == b"here\n"
        with pytest.raises(ValueError, match="expected nobody else at work there, got another process"):
            prepare(make_config(texts), str(out), log=silent)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not out.exists() and (tmp_path / ".out.partial").exists()
    prepare(make_config(texts), str(out), log=silent)
    assert contents(out) == contents(tmp_path / "straight")
    assert not (tmp_path / ".out.partial").exists()


def test_killed_at_random_moments(texts, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    for _ in range(2):
        process = start(texts, out, "-")
        time.sleep(rng.uniform(0.5, 2.5))
        process.kill()
        process.wait()
        process.stdout.close()
        if out.exists():
            store.read_manifest(str(out))
    prepare(make_config(texts), str(out), log=silent)
    open_splits(make_config(texts), str(out), verify=True)


def test_a_tokenizer_that_loses_text_is_refused(texts, tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["alpha beta gamma"] * 50), model_writer=model, vocab_size=14, minloglevel=2)
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = TokenizerConfig(vocab_size=14, path=str(tmp_path / "t.model"))
    with pytest.raises(ValueError, match=r"document \d+.txt of source texts: expected a tokenizer that"):
        prepare(make_config(texts, tokenizer=tokenizer), str(tmp_path / "out"), log=silent)
    assert not (tmp_path / "out").exists()


def test_the_split_is_by_hash_and_never_empty():
    def documents(n):
        return [module.Document(f"d{i}", f"text {i}") for i in range(n)]

    first, second = split_by_hash(documents(5000), 0.1), split_by_hash(documents(9000), 0.1)
    assert set(first["heldout"]) <= set(second["heldout"]) and set(first["train"]) <= set(second["train"])
    assert 400 < len(first["heldout"]) < 600
    for n in (2, 3, 10):
        few = split_by_hash(documents(n), 1e-9)
        assert len(few["heldout"]) == 1 and len(few["train"]) == n - 1


def test_two_sources_keep_apart_and_copies_are_found_across_them(tmp_path):
    a, b = write_texts(tmp_path / "a", 20), write_texts(tmp_path / "b", 30, seed=1)
    (b / "copy.txt").write_text((a / "003.txt").read_text())
    config = make_config(a, sources=(SourceConfig("a", f"text:{a}/*"), SourceConfig("b", f"text:{b}/*")))
    manifest = store.read_manifest(prepare(config, str(tmp_path / "out"), log=silent))
    counts = {n: sum(e[s]["documents"] for s in ("train", "heldout")) for n, e in manifest["sources"].items()}
    assert counts == {"a": 20, "b": 30}
    assert manifest["sources"]["b"]["removed"] == {"invalid_utf8": 0, "too_short": 0, "duplicate": 1}
    train, _ = open_splits(config, str(tmp_path / "out"))
    assert [s.name for s in train.sources] == ["a", "b"]


@pytest.mark.parametrize("setup, message", [
    ("one file", "expected two different documents or more, .* got 1 of the 1 read"),
    ("nothing", "expected files that match, got none"),
    ("all short", "got 0 of the 5 read"),
])
def test_too_little_text(tmp_path, setup, message):
    (tmp_path / "t").mkdir()
    for i in range({"one file": 1, "nothing": 0, "all short": 5}[setup]):
        (tmp_path / "t" / f"{i}.txt").write_text("x" * (1000 if setup == "one file" else 3))
    with pytest.raises(ValueError, match=message):
        prepare(make_config(tmp_path / "t"), str(tmp_path / "out"), log=silent)
    assert not (tmp_path / "out").exists()


def test_synthetic_data_needs_no_preparing(tmp_path):
    with pytest.raises(ValueError, match="expected text to prepare, got synthetic data"):
        prepare(make_config("", sources=(SourceConfig("s", "synthetic"),)), str(tmp_path / "out"), log=silent)
