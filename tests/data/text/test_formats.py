"""Files as people have them: every layout gives the same texts, and what gives none is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmjax.data.text import listing
from lmjax.data.text.formats import describe_file
from lmjax.data.text.sources import Broken, Document, SourceConfig, units
from lmjax.data.text.sources import read as read_files

TEXTS = ["plain text", "zwölf Boxkämpfer\n jagen", "日本語, \"quoted\" 😀", "tab\tand  spaces"]
LINES = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def read(uri, budget=1.0, **fields):
    source = SourceConfig(name="s", uri=str(uri), **fields)
    return [item for unit in units(source, 1 << 20) for item in read_files(source, unit, budget)]


def texts(uri, **fields):
    found = read(uri, **fields)
    assert all(isinstance(item, Document) for item in found), found
    return [item.data for item in found]


def lz4(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def zstd(data, window=20):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=window)
    maker = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return maker.compress(data) + maker.flush()


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"hello"
PACKED = {
    "gzip": gzip.compress(LINES), "bz2": bz2.compress(LINES), "xz": lzma.compress(LINES),
    "lz4": lz4(LINES), "zstd": zstd(LINES), "a long window": zstd(LINES, 28),
    "a skippable frame": SKIPPABLE + zstd(LINES), "twice": gzip.compress(gzip.compress(LINES)),
    "several members": b"".join(gzip.compress(line + b"\n") for line in LINES.splitlines()),
    "several frames": b"".join(zstd(line + b"\n") for line in LINES.splitlines()),
    "several xz streams": lzma.compress(LINES[:20]) + b"\0" * 4 + lzma.compress(LINES[20:]),
}


@pytest.mark.parametrize("how", PACKED)
def test_compression_is_told_by_content(tmp_path, how):
    (tmp_path / "a.data").write_bytes(PACKED[how])
    assert texts(f"jsonl:{tmp_path}/*") == TEXTS
    assert texts(f"text:{tmp_path}/*") == [LINES.decode()]
    found = describe_file(str(tmp_path / "a.data"))
    assert (found.format, found.records, found.broken, found.problem) == ("json", 4, 0, "")
    assert found.compression and found.encoding == "utf-8"
    (tmp_path / "a.data").write_bytes(PACKED[how][:-3])
    for scheme in ("jsonl", "text"):
        with pytest.raises(ValueError, match="expected a whole file, got .*fetch it again"):
            read(f"{scheme}:{tmp_path}/*")
    assert "a whole file" in describe_file(str(tmp_path / "a.data")).problem


RECORDS = [{"text": t} for t in TEXTS]
JSON = {
    "an array": json.dumps(RECORDS), "a pretty array": json.dumps(RECORDS, indent=2),
    "a record per line of an array": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "one object with a list": json.dumps({"version": 1, "data": RECORDS}),
    "a pretty object with a list": json.dumps({"version": 1, "data": RECORDS}, indent=1),
    "pretty values": "\n".join(json.dumps(one, indent=2) for one in RECORDS),
    "arrays one after the other": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]),
    "carriage returns": LINES.decode().replace("\n", "\r"),
    "both": LINES.decode().replace("\n", "\r\n"),
    "lines": LINES.decode(),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("layout", JSON)
def test_every_layout_of_json_in_every_encoding(tmp_path, layout, encoding):
    (tmp_path / "a.json").write_bytes(gzip.compress(JSON[layout].encode(encoding)))
    found = read(f"jsonl:{tmp_path}/*")
    assert [item.data for item in found] == TEXTS
    assert [item.id for item in found] == [f"a.json:{i}" for i in range(1, 5)]


def test_a_long_array_is_read_in_pieces_and_a_damaged_one_refused(tmp_path):
    many = [{"text": f"{i} " * 200} for i in range(5000)]
    whole = json.dumps(many)
    (tmp_path / "a.json").write_text(whole)
    assert texts(f"jsonl:{tmp_path}/*") == [one["text"] for one in many]
    for damaged in (whole[:-2], whole[: len(whole) // 2], whole.replace("3000 ", '3000" ', 1)):
        (tmp_path / "a.json").write_text(damaged)
        with pytest.raises(ValueError, match="expected .*, got .*a.json; "):
            read(f"jsonl:{tmp_path}/*")


@pytest.mark.parametrize("record, field", [
    ({"a": {"b": "x\ny"}}, "a.b"), ({"a.b": "x\ny"}, "a.b"), ({"a": ["x", "y"]}, "a"),
    ({"m": [{"c": "x"}, {"c": "y"}]}, "m.c")])
def test_texts_inside_of_records(tmp_path, record, field):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for scheme in ("jsonl", "parquet"):
        assert texts(f"{scheme}:{tmp_path}/a.{scheme}", text_field=field) == ["x\ny"]


@pytest.mark.parametrize("kind", [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_every_type_of_text(tmp_path, kind):
    table = pa.table({"n": range(4), "text": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as out, pa.ipc.new_stream(
            out, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as out, pa.ipc.new_file(
            out, table.schema) as writer:
        writer.write_table(table)
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "d.parquet.gz").write_bytes(packed)
    for name in ("a.parquet", "b.arrow", "c.arrow", "d.parquet.gz"):
        found = read(f"parquet:{tmp_path}/{name}")
        assert [item.data for item in found] == TEXTS
        assert found[3].id == f"{name}:3"


@pytest.mark.parametrize("columns, field, message", [
    ({"text": [1]}, "text", "text in the column 'text', got int64"),
    ({"a": [{"b": "x"}]}, "a.c", "a column 'a.c'"), ({"other": ["x"]}, "text", "set text_field")])
def test_a_column_without_text_is_refused(tmp_path, columns, field, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read(f"parquet:{tmp_path}/*", text_field=field)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter, scheme", [(",", "csv"), (";", "csv"), ("\t", "csv"),
                                               ("\t", "tsv")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv(tmp_path, encoding, delimiter, scheme, end):
    import csv
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    wanted = [text.replace("\n", " ") if end == "\r" else text for text in TEXTS]
    writer.writerows([["id", "text"], *enumerate(wanted)])
    (tmp_path / "a").write_bytes(out.getvalue().encode(encoding))
    found = read(f"{scheme}:{tmp_path}/a")
    assert [item.data for item in found] == wanted
    assert [item.id for item in found] == ["a:1", "a:2", "a:3", "a:4"]


def test_csv_that_is_quoted_otherwise(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"he said \\"hi\\", and"\n2,"more"\n')
    assert texts(f"csv:{tmp_path}/a.csv") == ['he said "hi", and', "more"]
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"Hello" he said\n2\tmore\n')
    assert texts(f"tsv:{tmp_path}/a.tsv") == ['"Hello" he said', "more"]


def test_a_broken_row_takes_no_other_row_with_it(tmp_path):
    rows = [f'{i},"row {i}"' for i in range(50)]
    rows[20] = '20,"never closed'
    rows[30] = "30,too,many"
    (tmp_path / "a.csv").write_text("id,text\n" + "\n".join(rows) + "\n")
    found = read(f"csv:{tmp_path}/a.csv")
    assert [item.data for item in found if isinstance(item, Document)] == [
        f"row {i}" for i in range(50) if i not in (20, 30)]
    assert [item.id for item in found if isinstance(item, Broken)] == ["a.csv:21", "a.csv:31"]


HTML = b"<!DOCTYPE html>\n<html><body>404</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


@pytest.mark.parametrize("scheme, content, message", [
    ("jsonl", HTML, "a web page"), ("csv", HTML, "a web page"), ("jsonl", LFS, "git lfs pull"),
    ("text", LFS, "git lfs pull"), ("parquet", LFS, "git lfs pull"),
    ("jsonl", b"\0" * 99, "1 of 1"), ("jsonl", b'{"error": "denied"}', "1 of 1"),
    ("jsonl", b"PK\x03\x04.", "a zip archive"),
    ("jsonl", b'{"body": "a"}\n' * 50, "50 of 50"), ("csv", LINES, "write jsonl: in the uri"),
    ("text", b"PAR1....PAR1", "write parquet: in the uri"), ("parquet", b"", "a whole Parquet"),
    ("jsonl", LINES + b"broken\n" * 3, "3 of 7 .*a.data:5")])
def test_a_file_is_not_lost_within_the_budget(tmp_path, scheme, content, message):
    good = {"csv": b"text\n" + b"fine\n" * 999, "text": b"fine"}.get(scheme, LINES * 250)
    if scheme != "parquet":
        (tmp_path / "z.data").write_bytes(good)
    (tmp_path / "a.data").write_bytes(content)
    with pytest.raises(ValueError, match=f"source s .*{message}") as error:
        read(f"{scheme}:{tmp_path}/*", budget=0.02)
    assert "\n" not in str(error.value)


def test_one_broken_record_among_others_is_within_the_budget(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"broken\n")
    assert len(read(f"jsonl:{tmp_path}/*", budget=0.02)) == 5


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize("record, field, has", [
    ({"content": "x", "id": 1}, "text", r"\['content', 'id'\]"),
    ({"text": {"body": "x", "lang": "en"}}, "text.bdy", r"\['text.body', 'text.lang'\]"),
    ({"turns": [{"said": "x"}], "id": "1"}, "text", r"'turns.said'")])
def test_a_missing_field_is_told_with_those_that_are_there(tmp_path, kind, record, field, has):
    table, file = pa.Table.from_pylist([record] * 3), tmp_path / "a"
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "arrow":
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "\n".join([json.dumps(record)] * 3)
        file.write_text(lines if kind == "jsonl" else f"[{lines}]".replace("\n", ","))
    scheme = "jsonl" if kind == "json" else kind
    with pytest.raises(ValueError, match=f"{has}.*; set text_field"):
        read(f"{scheme}:{file}", budget=0.02, text_field=field)


def test_links_folders_and_pipes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/z.txt").write_text("once")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/zz.txt").symlink_to("z.txt")
    os.link(tmp_path / "in/z.txt", tmp_path / "in/zzz.txt")
    assert read(f"text:{tmp_path}/**/*.txt") == [Document("in/z.txt", "once")]
    (tmp_path / "in/gone.txt").symlink_to("nothing")
    with pytest.raises(ValueError, match="gone.txt, a link to nothing"):
        read(f"text:{tmp_path}/in/*.txt")
    (tmp_path / "in/gone.txt").unlink()
    os.mkfifo(tmp_path / "in/pipe.txt")
    for pattern in ("in/*.txt", "in/pipe.txt"):
        with pytest.raises(ValueError, match="regular files, got .*pipe.txt, a pipe"):
            read(f"text:{tmp_path}/{pattern}")
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(ValueError, match=r"the directory .*a.parquet; write .*/\*.parquet/\*"):
        read(f"parquet:{tmp_path}/*.parquet")


@pytest.mark.parametrize("number, device", [(0, None), (7, None), (None, 5), (0, 5)])
def test_files_of_one_number_are_several_without_hard_links(number, device, tmp_path, monkeypatch):
    """As mounts of object stores number them: no file may be lost."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "link.txt").symlink_to("b.txt")
    stat = os.stat

    def numbered(path, *args, **kwargs):
        found = stat(path, *args, **kwargs)
        if not str(path).endswith(".txt"):
            return found
        values = list(found)
        values[1] = found.st_ino if number is None else number
        values[2] = found.st_dev if device is None else device
        return os.stat_result(values)

    monkeypatch.setattr(os, "stat", numbered)
    files = listing.matching(f"{tmp_path}/*.txt")
    assert [name for name, _ in files] == ["a.txt", "b.txt", "c.txt"]


def test_a_file_that_changes_while_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = SourceConfig(name="s", uri=f"jsonl:{tmp_path}/*")
    found = read_files(source, units(source, 1)[0])
    next(found)
    (tmp_path / "a.jsonl").write_bytes(LINES * 2)
    with pytest.raises(ValueError, match="changed while it was read"):
        list(found)


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.long if kind == "bomb" else pytest.mark.slow)
    for kind in ("rows", "repeated", "bomb", "default")])
def test_memory_is_bounded_by_bytes(tmp_path, kind):
    """A process reads 1,000 rows of 2 MB, one value in 5,000 rows, or 4 GB of zeros.

    Or 385 MB of distinct texts in one row group, as pyarrow writes them by default.
    """
    if kind == "bomb":
        with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as out:
            for _ in range(1024):
                out.write(bytes(4 << 20))
    elif kind == "default":
        pq.write_table(pa.table({"text": [f"{i:07}" * 11_000 for i in range(5000)]}),
                       tmp_path / "a.parquet")
    elif kind == "rows":
        with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())]),
                              write_batch_size=8, use_dictionary=False) as out:
            out.write_table(pa.table({"text": [f"{i:07}" * (2 << 17) for i in range(1000)]}))
    else:
        pq.write_table(pa.table({"text": pa.array(["x" * (2 << 20)] * 5000).dictionary_encode()}),
                       tmp_path / "a.parquet")
    scheme = "jsonl" if kind == "bomb" else "parquet"
    code = ("import resource, sys; from lmjax.data.text.sources import *; "
            f"s = SourceConfig('s', '{scheme}:{tmp_path}/*'); import pyarrow.parquet; "
            "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
            "n = sum(1 for u in units(s, 1) for _ in read(s, u)); "
            "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    records, grown = map(int, done.stdout.split())
    assert records == {"rows": 1000, "bomb": 1}.get(kind, 5000)
    assert grown < 400 << 10, f"{grown >> 10} MiB"
