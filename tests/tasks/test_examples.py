"""Labelled examples: from files of every format to packed rows, and what is refused on the way."""

import csv
import dataclasses
import json
import random

import numpy as np
import pytest

from lmjax.config import build
from lmjax.data.config import DataConfig
from lmjax.data.reading import Reader, make_reader
from lmjax.data.text.sources import read
from lmjax.data.tokenizers import prepared_tokenizer, sentencepiece_tokenizer
from lmjax.errors import UserError
from lmjax.tasks.chat import Chat
from lmjax.tasks.classification import Classification
from lmjax.tasks.prepare import Setting, prepare_examples, read_manifest
from lmjax.tasks.questions import Questions
from lmjax.tasks.reading import read_text
from lmjax.tasks.rows import open_examples
from lmjax.tasks.tagging import Tagging
from lmjax.tasks.task import Sizes
from lmjax.tasks.templates import check_template, fill

LENGTH = 32
WORDS = "alpha beta gamma delta one two three four".split()


def records(count=120, seed=0):
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 9))), "n": i,
             "label": rng.choice(["no", "yes"])} for i in range(count)]


def write(path, rows, kind="jsonl"):
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            out.writeheader()
            out.writerows(rows)
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        import pyarrow as pa
        pq.write_table(pa.Table.from_pylist(rows), path)
    return f"{kind}:{path}"


def setting(uri, task=None, **data):
    fields = {"sources": [{"name": "s", "uri": uri}], "tokenizer": {"vocab_size": 290},
              "seq_len": LENGTH, "heldout_fraction": 0.25, **data}
    return Setting(task or Classification(), build(DataConfig, fields), Sizes(LENGTH))


def prepared(made, out, family="encoder", log=None):
    prepare_examples(made, str(out), make_tokenizer=lambda texts: sentencepiece_tokenizer(
        made.data.tokenizer, texts), make_reader=lambda tokenizer: make_reader(
            tokenizer, family, made.data, {}), log=log or (lambda line: None))
    return str(out)


def opened(made, out):
    return open_examples(made.task, made.data, out, sizes=made.sizes, vocab_size=300)


def examples_in(split):
    """Every example of a split as (tokens, targets, mask), from its packed rows."""
    found = []
    batch = split.rows(np.arange(split.num_rows()))
    for row in range(split.num_rows()):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            found.append(tuple(tuple(batch[name][row][inside].tolist())
                               for name in ("tokens", "targets", "loss_mask", "positions")))
    return sorted(found)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    rows = records()
    as_text = [{key: str(value) for key, value in row.items()} for row in rows]
    a = setting(write(tmp_path / "a.jsonl", as_text), validation_of(tmp_path, as_text))
    b = setting(write(tmp_path / f"b.{kind}", as_text, kind), a.task)
    first, second = (examples_in(opened(made, prepared(made, tmp_path / name))[1]["heldout"])
                     for name, made in (("x", a), ("y", b)))
    assert first == second


def validation_of(tmp_path, rows):
    uri = write(tmp_path / "validation.jsonl", rows[:20])
    return build(Classification, {"validation": [{"name": "v", "uri": uri}]})


def test_the_split_by_hash_keeps_every_example_once_and_copies_together(tmp_path):
    rows = records(200)
    made = setting(write(tmp_path / "a.jsonl", rows + rows[:50]))
    out = prepared(made, tmp_path / "out")
    manifest = read_manifest(out)
    counts = {name: part["examples"] for name, part in manifest["splits"].items()}
    assert sum(counts.values()) == 250 and 20 < counts["s/heldout"] < 90
    text = (tmp_path / "out/s/heldout/records.jsonl").read_text()
    kept = [json.loads(line) for line in text.splitlines()]
    held = {row["n"] for row in kept}
    copies = [row["n"] for row in kept]
    assert all(copies.count(n) == 1 + (n < 50) for n in held)


@pytest.mark.long
def test_a_column_may_say_which_split_a_record_belongs_to(tmp_path):
    rows = [{**row, "part": {"of": ["train", "dev", 3][row["n"] % 3]}} for row in records(90)]
    uri = write(tmp_path / "a.jsonl", rows)
    task = build(Classification, {
        name: [{"name": name, "uri": uri, "where": f"part.of={value}"}]
        for name, value in (("validation", "dev"), ("test", "3"))})
    made = setting(uri, task)
    source = dataclasses.replace(made.data.sources[0], where="part.of=train")
    made = made._replace(data=dataclasses.replace(made.data, sources=(source,)))
    out = prepared(made, tmp_path / "out")
    assert {name: part["examples"] for name, part in read_manifest(out)["splits"].items()} == {
        "s/train": 30, "validation/heldout": 30, "test/test": 30}
    text = (tmp_path / "out/validation/heldout/records.jsonl").read_text()
    assert {json.loads(line)["part"]["of"] for line in text.splitlines()} == {"dev"}
    for where, said in (("split=train", "a column 'split' for where='split=train'"),
                        ("part.of=tests", "records with where='part.of=tests', got none")):
        bad = made._replace(data=dataclasses.replace(made.data, sources=(
            dataclasses.replace(source, where=where),)))
        with pytest.raises(UserError, match=said):
            prepared(bad, tmp_path / "bad")
    with pytest.raises(UserError, match="where texts are read, got where='part.of=train'"):
        list(read(source, [("a", str(tmp_path / "a.jsonl"))]))
    with pytest.raises(UserError, match="COLUMN=VALUE, such as split=test"):
        dataclasses.replace(source, where="test")


def test_packed_rows_hold_the_examples_of_unpacked_rows(tmp_path):
    uri = write(tmp_path / "a.jsonl", records())
    packed, single = setting(uri), setting(uri, packing="none")
    a = opened(packed, prepared(packed, tmp_path / "a"))[1]["heldout"]
    b = opened(single, prepared(single, tmp_path / "b"))[1]["heldout"]
    assert a.num_rows() < b.num_rows()
    assert examples_in(a) == examples_in(b)
    places = [place for row in range(a.num_rows()) for place in a.sources[0].places(row)]
    assert sorted(place.example for place in places) == list(range(b.num_rows()))


def test_rows_are_a_pure_function_of_their_number(tmp_path):
    made = setting(write(tmp_path / "a.jsonl", records()))
    train, _ = opened(made, prepared(made, tmp_path / "out"))
    again, _ = opened(made, str(tmp_path / "out"))
    g = np.array([7, 0, 300, 7])
    for name, values in train.rows(g).items():
        assert np.array_equal(values, again.rows(g)[name])
        assert np.array_equal(values[0], train.rows(g[3:])[name][0])
    other = setting(write(tmp_path / "b.jsonl", records(seed=1)))
    assert opened(other, prepared(other, tmp_path / "other"))[0].fingerprint != train.fingerprint


def test_what_is_too_long_is_cut_and_counted_in_a_table(tmp_path):
    rows = records(40) + [{"text": "alpha " * 60, "n": -1, "label": "no"}] * 4
    lines = []
    made = setting(write(tmp_path / "a.jsonl", rows))
    out = prepared(made, tmp_path / "out", log=lines.append)
    parts = read_manifest(out)["splits"].values()
    tokenizer = prepared_tokenizer(out)
    over = [len(tokenizer.encode(row["text"])) + 2 - LENGTH for row in rows]  # with BOS and EOS
    assert sum(part["cut_examples"] for part in parts) == sum(n > 0 for n in over) >= 4
    assert sum(part["cut_tokens"] for part in parts) == sum(n for n in over if n > 0)
    head, *table = [line for line in lines if "/" in line or "too long" in line][:3]
    assert "too long" in head and all(len(line) == len(head) for line in table)


def test_a_pair_is_cut_at_the_longer_text():
    class Tokenizer:
        bos_id = 0

    class Names:
        tokenizer = Tokenizer()

        def encode(self, text):
            return [int(word) for word in text.split()]

    reader = Reader(Names(), (1,), (2,), 0, (2,), (), (2, 2), 1)
    read = read_text(reader, "10 11 12 13 14 15", 10, "20 21")
    assert read.ids.tolist() == [1, 10, 11, 12, 13, 2, 2, 20, 21, 2] and read.cut == 2
    assert read.types.tolist() == [0] * 7 + [1] * 3
    even = read_text(reader, "10 11 12 13 14 15", 8, "20 21 22 23 24 25")
    assert even.ids.tolist() == [1, 10, 11, 2, 2, 20, 21, 2] and even.cut == 8


def test_a_template_is_filled_from_nested_columns_numbers_and_lists():
    record = {"q": "why", "a": {"b": 3}, "lines": ["x", "y"], "x.y": True}
    text = fill("{{{q}}} {a.b} {lines} {x.y}", record)
    assert text == "{why} 3 x\ny true"


@pytest.mark.parametrize("template", ["no column", "half {a", "a} half", "{}"])
def test_a_template_without_columns_is_refused(template):
    with pytest.raises(UserError, match="columns in braces"):
        check_template(template, "input")


def test_a_template_over_messages_is_refused():
    with pytest.raises(UserError, match="the task chat"):
        fill("{chosen}", {"chosen": [{"role": "user", "content": "x"}]})


def test_numbers_name_the_labels_of_a_config(tmp_path):
    rows = [{**row, "label": int(row["label"] == "yes")} for row in records()]
    uri, facts = write(tmp_path / "a.jsonl", rows), {}
    for name, labels in (("named", ("no", "yes")), ("bare", ())):
        out = prepared(setting(uri, Classification(labels=labels)), tmp_path / name)
        facts[name] = read_manifest(out)["facts"]
    assert facts["named"]["labels"] == ["no", "yes"] and facts["bare"]["labels"] == ["0", "1"]
    assert facts["named"]["counts"] == facts["bare"]["counts"]


def test_examples_of_another_reading_or_family_are_refused(tmp_path):
    made = setting(write(tmp_path / "a.jsonl", records()))
    out = prepared(made, tmp_path / "out")
    with pytest.raises(UserError, match="read as the model reads"):
        prepared(made, out, family="decoder")
    with pytest.raises(UserError, match="family"):
        prepared(made._replace(family="decoder"), out)


def test_two_sources_of_one_name_are_refused(tmp_path):
    uri = write(tmp_path / "a.jsonl", records())
    task = build(Classification, {"test": [{"name": "t", "uri": uri}, {"name": "t", "uri": uri}]})
    with pytest.raises(UserError, match="config.task.test: .*'t'"):
        prepared(setting(uri, task), tmp_path / "out")


def broken(rows, **change):
    return [{**row, **(change if i % 5 == 0 else {})} for i, row in enumerate(rows)]


REFUSED = {
    "an unknown column": ({}, {"input": "{txt}"}, "the column 'txt' of config.task.input"),
    "a label not in the set": ({}, {"labels": ["no", "maybe", "yes"]}, "none of 'maybe'"),
    "a class without a name": ({}, {"labels": ["no"]}, "at least two classes"),
    "a label of no class": ({}, {"labels": ["no", "n"]}, "none of 'n'"),
    "labels that are empty": ({"label": " "}, {}, "expected a class"),
    "labels that are missing": ({"label": None}, {}, "null under 'label'"),
    "weights below 0": ({}, {"class_weights": {"yes": -1.0}}, "more than 0"),
    "no number": ({}, {"kind": "regression"}, "expected a number"),
    "no list of labels": ({}, {"kind": "multi"}, "a list of labels under 'label'"),
    "weights of no class": ({}, {"class_weights": {"yess": 2.0}}, "got yess"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path):
    change, task, message = REFUSED[name]
    uri = write(tmp_path / "a.jsonl", broken(records(), **change))
    with pytest.raises(UserError) as caught:
        prepared(setting(uri, build(Classification, task)), tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("task", "change", "message"), [
    (Tagging(tokens="words", tags="tags"), {}, "the first record: expected a list of 2 tags"),
    (Questions(context="text"), {}, "the first record: expected the answer 'zz' in the context"),
    (Chat(template="plain"), {}, "the first record: expected a column messages, conv"),
    (Classification(), {"label": None}, "the first record: expected a column 'label'")])
def test_if_no_record_is_an_example_the_first_ones_fault_is_told(task, change, message, tmp_path):
    rows = [{**row, "words": [row["text"], "b"], "tags": ["O"], "question": "why?", "answers": "zz",
             **change} for row in records()]
    with pytest.raises(UserError) as caught:
        prepared(setting(write(tmp_path / "a.jsonl", rows), task), tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_without_an_example_names_the_share(tmp_path):
    made = setting(write(tmp_path / "a.jsonl", records(20)), heldout_fraction=1e-4)
    with pytest.raises(UserError, match=r"one example to be heldout.*raise data.heldout_fraction"):
        prepared(made, tmp_path / "out")


def test_a_few_broken_records_are_counted_and_left_out(tmp_path):
    rows = records(200)
    rows[3]["label"] = None
    made = setting(write(tmp_path / "a.jsonl", rows))
    parts = read_manifest(prepared(made, tmp_path / "out"))["splits"]
    assert sum(part["left_out"] for part in parts.values()) == 1
    assert sum(part["examples"] for part in parts.values()) == 199


def test_texts_are_no_examples(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="records with columns"):
        prepared(setting(f"text:{tmp_path}/a.txt"), tmp_path / "out")


def test_prepared_examples_of_another_setting_are_refused_and_kept(tmp_path):
    uri = write(tmp_path / "a.jsonl", records())
    out = prepared(setting(uri), tmp_path / "out")
    before = read_manifest(out)
    with pytest.raises(UserError, match="task.input"):
        prepared(setting(uri, Classification(input="{text} {n}")), tmp_path / "out")
    assert read_manifest(out) == before
