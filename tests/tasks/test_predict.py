"""Answers of models with a task: lm.predict, lm.classify and `lmjax predict`."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from classifiers import LABELS, make, sentence
from processes import ROOT, one_line

import lmjax
from lmjax.cli.main import main
from lmjax.errors import UserError
from lmjax.tasks.task import Sizes

TEXTS = [sentence(i, most) for i, most in enumerate([1, 80, 3, 9])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(family, kind) -> the directory of a model."""
    folder = tmp_path_factory.mktemp("classifiers")
    for family in ("encoder", "decoder"):
        make(folder / family, family, input="{film.text}")
    make(folder / "multi", kind="multi")
    make(folder / "regression", "decoder", kind="regression")
    return folder


def record(text):
    return {"film": {"text": text}, "id": 3}


@pytest.mark.long
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_an_answer_is_that_of_the_logits_whatever_else_is_asked(family, saved):
    lm = lmjax.load(saved / family)
    together = lm.predict([record(text) for text in TEXTS])
    assert [lm.predict([record(text)])[0] for text in TEXTS] == together
    for text, answer, found in [*zip(TEXTS, together, lm.classify(TEXTS), strict=True)][::3]:
        ids = lm.reader.ids(text, 64 - len(lm.reader.prefix) - len(lm.reader.suffix))
        logits = np.asarray(lm.logits([ids]))[0, -1 if family == "decoder" else 0]
        p = np.exp(logits) / np.exp(logits).sum()
        assert answer["label"] == found["label"] == LABELS[int(p.argmax())]
        assert answer["confidence"] == pytest.approx(found["confidence"], abs=1e-5)
        np.testing.assert_allclose(list(found["probabilities"].values()), p, atol=1e-5)
    assert np.ptp([answer["confidence"] for answer in together]) > 0.01


@pytest.mark.long
def test_several_labels_and_numbers(saved):
    several = lmjax.load(saved / "multi")
    for answer, found in zip(several.predict([{"text": text} for text in TEXTS]),
                             several.classify(TEXTS), strict=True):
        assert answer["labels"] == found["labels"] == [
            label for label, p in found["probabilities"].items() if p > 0.5]
        np.testing.assert_allclose(list(answer["confidence"].values()),
                                   list(found["probabilities"].values()), atol=1e-5)
    numbers = lmjax.load(saved / "regression")
    found = [answer["value"] for answer in numbers.classify(TEXTS)]
    again = [answer["value"] for answer in numbers.predict([{"text": text} for text in TEXTS])]
    np.testing.assert_allclose(found, again, atol=1e-5)
    assert np.ptp(found) > 0.1


def test_what_a_model_cannot_answer_is_said_in_one_line(saved):
    lm = lmjax.load(saved / "decoder")
    for use in (lambda: lm.generate(["a"]), lambda: lm.score(["a"]),
                lambda: lm.generate_ids([[1, 5]])):
        with pytest.raises(UserError, match="scores its vocabulary.*head of the task classifica"):
            use()
    with pytest.raises(UserError, match=r"records\[1\].*'film.text'"):
        lm.predict([record("a"), {"text": "b"}])
    with pytest.raises(UserError, match=r"records\[0\]: expected a record"):
        lm.predict("a")
    with pytest.raises(UserError, match="write both texts into task.input"):
        lm.classify(["a"], ["b"])
    with pytest.raises(UserError, match="pairs: expected 2 second texts.*got 1"):
        lmjax.load(saved / "encoder").classify(["a", "b"], ["c"])


def write(path, texts):
    path.write_text("".join(json.dumps(record(text)) + "\n" for text in texts))
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_predict_writes_a_line_per_record_and_goes_on_after_the_last_whole_one(saved, tmp_path,
                                                                               capsys):
    source, out = write(tmp_path / "in.jsonl", TEXTS * 100), tmp_path / "out.jsonl"
    command = ["predict", str(saved / "encoder"), "--input", str(source), "--out", str(out)]
    assert main(command) == 0
    whole = out.read_bytes()
    expected = lmjax.load(saved / "encoder").predict([record(text) for text in TEXTS])
    assert [line["answer"] for line in answers(out)] == expected * 100
    assert answers(out)[1]["record"] == record(TEXTS[1]) and len(set(
        line["id"] for line in answers(out))) == 400
    out.write_bytes(whole[: len(whole) * 2 // 3])  # cut within a line
    assert main(command) == 0
    assert out.read_bytes() == whole
    assert "400 records, 400 of them new" in capsys.readouterr().out
    before = out.read_bytes()
    for other in (["predict", str(saved / "decoder"), *command[2:]],
                  [*command[:3], str(write(tmp_path / "other.jsonl", TEXTS)), *command[4:]],
                  [*command, "--column", "input=id"]):
        assert main(other) == 2
        assert "expected answers of this checkpoint to this input, got others" in one_line(
            capsys.readouterr().err)
    assert out.read_bytes() == before


@pytest.mark.long
def test_predict_reads_other_formats_and_columns_and_tells_what_is_no_record(saved, tmp_path,
                                                                             capsys):
    table = tmp_path / "in.csv"
    table.write_text("review,stars\ngreat film,3\n,1\ndull,2\n")
    out = tmp_path / "out.jsonl"
    command = ["predict", str(saved / "multi"), "--input", str(table), "--out", str(out)]
    assert main(command) == 2
    assert "in.csv:1: expected a column 'text', got a record with 'review', 'stars'" in one_line(
        capsys.readouterr().err)
    assert not out.exists()
    assert main([*command, "--column", "input=review"]) == 0
    lines = answers(out)
    lm = lmjax.load(saved / "multi")
    assert [line["answer"] for line in lines if "error" not in line] == lm.predict(
        [{"text": line["record"]["review"]} for line in lines if "error" not in line])
    assert lines[-1]["record"] == {"review": "dull", "stars": "2"}
    for wrong, said in ((["--column", "inputs=review"], "KEY one of input, label, pair"),
                        (["--input", str(tmp_path / "none.csv")], "a file of records, got"),
                        (["--input", __file__], "records as JSON lines, CSV")):
        assert main([*(command if wrong[0] == "--column" else
                       [*command[:2], *command[4:]]), *wrong]) == 2
        assert said in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_a_killed_predict_ends_with_the_bytes_of_one_that_was_not(saved, tmp_path):
    texts = [sentence(i, 30) for i in range(1500)]
    source = write(tmp_path / "in.jsonl", texts)

    def start(out):
        code = "import sys\nfrom lmjax.cli.main import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "predict", str(saved / "encoder"), "--input",
                   str(source), "--out", str(out)]
        return subprocess.Popen(command, cwd=ROOT, env={
            **os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")})

    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    assert start(straight).wait(timeout=300) == 0
    for least in (1, 600):
        process = start(killed)
        while process.poll() is None and (
                not killed.exists() or killed.read_bytes().count(b"\n") < least):
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert 0 < killed.stat().st_size < straight.stat().st_size
    assert start(killed).wait(timeout=300) == 0
    assert killed.read_bytes() == straight.read_bytes()


IOB2 = {"labels": ["O", "B-X", "I-X"], "counts": [1, 1, 1], "scheme": "iob2"}
LONG = " ".join(sentence(i, 40) for i in range(8))


@pytest.mark.long
def test_words_get_the_tags_of_their_first_pieces(tmp_path):
    tags = make(tmp_path / "tags", name="tagging", tokens="a.w", facts=IOB2)
    words = [text.split() for text in (TEXTS[0], LONG, *TEXTS[2:])]
    found = tags.tag(words)
    assert [answer["words"] for answer in found] == words
    assert tags.predict([{"a": {"w": words[0]}}]) == found[:1] == tags.tag(words[:1])
    assert None in found[1]["tags"] and None not in found[0]["tags"]  # the second is too long
    ids = tags.reader.ids(TEXTS[3])
    p = np.exp(np.asarray(tags.logits([ids]))[0])
    firsts = np.cumsum([len(its) for its in tags.tokenizer.encode_words(words[3])])
    at = len(tags.reader.prefix) + np.array([0, *firsts[:-1]])
    assert found[3]["tags"] == [IOB2["labels"][i] for i in p[at].argmax(axis=-1)]


@pytest.mark.long
def test_an_answer_is_the_likeliest_of_all_windows(tmp_path):
    facts = {"unanswerable": False}
    lm = make(tmp_path / "asks", name="questions", stride=8, facts=facts, model={"token_types": 0})
    contexts = [LONG, TEXTS[3], LONG]
    answers = lm.answer(["film ?"] * 3, contexts)
    assert answers[0] == answers[2] == lm.answer(["film ?"], contexts[:1])[0]
    for context, answer in zip(contexts[:2], answers, strict=False):
        record = {"question": "film ?", "context": context}
        encoded = lm.recipe.task.encode(record, lm.reader, facts, Sizes(64), labelled=False)
        best = -np.inf, 0, 0
        for window in (encoded.columns, *encoded.more):
            p_T2 = np.asarray(jax.nn.log_softmax(lm.logits([window["tokens"].tolist()])[0], axis=0))
            inside = np.flatnonzero(window["ends"])
            best = max(best, *((p_T2[i, 0] + p_T2[j, 1], window["begins"][i], window["ends"][j])
                               for i in inside for j in inside if i <= j < i + 30))
        assert (answer["start"], answer["end"]) == best[1:]
        assert answer["text"] == context[best[1] : best[2]]
        assert answer["confidence"] == pytest.approx(np.exp(best[0]), abs=1e-5)
        assert bool(encoded.more) == (context == LONG)


@pytest.mark.long
def test_what_the_model_was_not_trained_for_is_refused(tmp_path):
    tags = make(tmp_path / "tags", name="tagging", facts=IOB2)
    for call, said in ((lambda: tags.answer(["a"], ["b"]), "a model that answers questions"),
                       (lambda: tags.tag(["a b"]), r"texts\[0\]"),
                       (lambda: tags.tag([["a"], []]), "a list of words")):
        with pytest.raises(UserError, match=said):
            call()
    asks = make(tmp_path / "asks", name="questions", facts={"unanswerable": False})
    for call, said in ((lambda: asks.tag([["a"]]), "a model that tags words"),
                       (lambda: asks.answer(["a", "b"], ["c"]), "2 texts, one per question")):
        with pytest.raises(UserError, match=said):
            call()
