"""Reading: the same documents from each kind of file, a clear error for each kind of damage."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmjax.data.text.sources import Broken, Document, SourceConfig, check_budget, identity, units
from lmjax.data.text.sources import read as read_files

TEXTS = ["plain text", "zwölf Boxkämpfer\n jagen", "日本語のテキスト 😀", "tab\tand  spaces\r\n"]


def read(uri, budget=0.0, size=1 << 20, **kwargs):
    """(documents, broken records), after the check of the budget."""
    source = SourceConfig(name="s", uri=str(uri), **kwargs)
    found = [item for files in units(source, size) for item in read_files(source, files)]
    broken = [item for item in found if isinstance(item, Broken)]
    documents = [item for item in found if isinstance(item, Document)]
    check_budget(source, documents=len(documents), broken=len(broken), budget=budget,
                 example=(broken[0].id, broken[0].reason) if broken else ())
    return documents, broken


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def jsonl(texts, key="text"):
    lines = [json.dumps({"id": i, key: t}, ensure_ascii=i % 2 == 0) + "\n"
             for i, t in enumerate(texts)]
    return "".join(lines).encode()


def test_text_files_in_sorted_order_with_relative_ids(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"d{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"d{i % 2}" / f"{i}.txt").write_bytes(text.encode())
    for size in (1, 40, 1 << 20):  # of a unit of work: any cut gives the same documents
        documents, _ = read(f"text:{tmp_path}/**/*.txt", size=size)
        assert documents == [Document(f"d{i % 2}/{i}.txt", TEXTS[i]) for i in (0, 2, 1, 3)]
    assert read(f"text:{tmp_path}/d0/0.txt")[0] == [Document("0.txt", TEXTS[0])]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress),
                                          (".zst", zstd)])
def test_jsonl(tmp_path, suffix, pack):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl(TEXTS) + b"\n"))
    documents, _ = read(f"jsonl:{tmp_path}/*")
    assert [d.data for d in documents] == TEXTS
    assert documents[1].id == f"a.jsonl{suffix}:2"


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress),
                                          (".zst", zstd)])
def test_a_truncated_file_is_an_error_not_an_early_end(tmp_path, suffix, pack):
    whole = pack(jsonl([os.urandom(200).hex() for _ in range(2000)]))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected"):
        read(f"jsonl:{tmp_path}/*")


def test_two_compressed_members_are_one_file(tmp_path):
    members = [gzip.compress(jsonl(texts)) for texts in (TEXTS[:1], TEXTS[1:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members))
    assert [d.data for d in read(f"jsonl:{tmp_path}/*")[0]] == TEXTS


def test_jsonl_that_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS))
    assert [d.data for d in read(f"jsonl:{tmp_path}/*")[0]] == TEXTS


def test_parquet(tmp_path):
    pq.write_table(pa.table({"body": TEXTS, "n": range(4)}), tmp_path / "a.parquet",
                   row_group_size=3)
    documents, _ = read(f"parquet:{tmp_path}/*.parquet", text_field="body")
    assert [d.data for d in documents] == TEXTS and documents[3].id == "a.parquet:3"
    with pytest.raises(ValueError, match="expected a column 'text', got .*body.*set text_field"):
        read(f"parquet:{tmp_path}/*.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="expected a whole Parquet file"):
        read(f"parquet:{tmp_path}/b.parquet", text_field="body")


def test_the_standard_library_is_there_without_what_is_installed():
    documents, _ = read("builtin:python-stdlib", budget=0.05)
    ids = [d.id for d in documents]
    assert "argparse.py" in ids and ids == sorted(ids) and sum(len(d.data) for d in documents) > 5e6
    assert not any("site-packages" in i or "__pycache__" in i for i in ids)


@pytest.mark.parametrize("line, message", [
    ('{"text": "a"', "no JSON: "),
    ('{"other": "a"}', r"nothing under 'text' \(it has \['other'\]\)"),
    ('{"text": 3}', "int under 'text'"),
    ("[1]", r"nothing under 'text' \(it has list\)"),
    ("[" * 100_000, "no JSON: "),
    (r'"half a pair: \ud800"', r"nothing under 'text' \(it has str\)"),
    (r'{"\ud800": "\udc00"}', "nothing under 'text'"),
    (r'{"text": "\ud800"}', "no UTF-8: "),
])
def test_a_broken_record_is_set_aside_and_over_the_budget_an_error(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n" + '{"text": "too"}\n')
    documents, broken = read(f"jsonl:{tmp_path}/a.jsonl", budget=0.5)
    assert [d.data for d in documents] == ["fine", "too"]
    assert [b.id for b in broken] == ["a.jsonl:2"]
    # The report writes both as UTF-8.
    assert broken[0].raw.encode() and broken[0].reason.encode()
    message = f"at most 20.0% of .*got 1 of 3 .such as a.jsonl:2: {message}"
    with pytest.raises(ValueError, match=message) as error:
        read(f"jsonl:{tmp_path}/a.jsonl", budget=0.2)
    assert "\n" not in str(error.value)


def test_invalid_utf8_is_counted_and_over_the_budget_an_error(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes(b"fine")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    documents, broken = read(f"text:{tmp_path}/*", budget=0.1)
    assert len(documents) == 9 and [b.id for b in broken] == ["bad.txt"]
    assert "\\xe9" in broken[0].raw
    with pytest.raises(ValueError, match=r"at most 5.0% .*got 1 of 10 \(such as bad.txt: no UTF-8"):
        read(f"text:{tmp_path}/*", budget=0.05)
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "caf\xe9"}\n{"text": "half \\ud800"}\n{"text": "fine"}\n')
    documents, broken = read(f"jsonl:{tmp_path}/a.jsonl", budget=1.0)
    assert [d.data for d in documents] == ["fine"]
    assert [b.id for b in broken] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize("uri",
                         ["text:{}/none*", "text:{}/missing/*", "text:{}", "jsonl:{}/empty.jsonl",
                                 "builtin:python", "tfds:no_such_dataset_at_all"])
def test_nothing_there(tmp_path, uri):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="source s .*expected .*, got .*; ") as error:
        read(uri.format(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"uri": "books/*.txt"}, {"uri": "txt:a"}, {"uri": "text:"},
                                    {"name": "a/b"}, {"uri": "synthetic:many"}, {"weight": 0.0},
                                    {"weight": float("nan")}])
def test_a_bad_source_is_refused_at_once(fields):
    with pytest.raises(ValueError, match="expected .*, got .*; "):
        SourceConfig(**{"name": "a", "uri": "text:x"} | fields)


@pytest.mark.long
def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    records = {"train": [(i, {"text": t}) for i, t in enumerate(TEXTS)],
               "test": [(0, {"text": "other"})]}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="little", version="1.0.0", features=features, data_dir=tmp_path,
        split_datasets=records,
        disable_shuffling=True)
    documents, _ = read("tfds:little", data_dir=str(tmp_path))
    assert [d.data for d in documents] == TEXTS
    assert [d.data for d in read("tfds:little#test", data_dir=str(tmp_path))[0]] == ["other"]
    assert [d.data for d in read(f"tfds:{tmp_path}/little/1.0.0#test")[0]] == ["other"]
    with pytest.raises(ValueError, match="expected a prepared split 'dev'"):
        read("tfds:little#dev", data_dir=str(tmp_path))


def test_identity_follows_the_files(tmp_path):
    source = SourceConfig(name="s", uri=f"text:{tmp_path}/*")
    assert identity(source) == ""
    (tmp_path / "a").write_text("one")
    first = identity(source)
    assert first and identity(source) == first
    (tmp_path / "b").write_text("two")
    assert identity(source) != first


def test_importing_the_data_layer_does_not_import_tensorflow():
    code = ("import sys, lmjax.data, lmjax.data.preparation.prepare; "
            "assert not {m for m in sys.modules if m.startswith('tensorflow')}")
    subprocess.run([sys.executable, "-c", code], check=True)
