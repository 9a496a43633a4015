"""Preparing data: the same text gives the same bytes, complete or not at all, over nothing else."""

import dataclasses
import errno
import gzip
import json
import os
import re
import sys
import xml.dom.minidom

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import contents, make_config, silent, write_texts

from lmjax.cli import errors
from lmjax.data import store
from lmjax.data.config import CurateConfig, DecontaminateConfig, DedupConfig
from lmjax.data.pipeline import open_splits
from lmjax.data.preparation import curate, shards
from lmjax.data.preparation import prepare as module
from lmjax.data.preparation.curate import split_key
from lmjax.data.preparation.engine import Engine
from lmjax.data.preparation.engine_beam import BeamEngine
from lmjax.data.preparation.ledger import trace
from lmjax.data.preparation.prepare import prepare
from lmjax.data.text.filters import GopherRepetition
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig, tokenizer_from_bytes
from lmjax.errors import UserError


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


def test_the_stored_documents_are_the_texts(texts, tmp_path):
    lines = []
    out = prepare(make_config(texts), str(tmp_path / "out"), log=lines.append)
    tokenizer = tokenizer_from_bytes((tmp_path / "out/tokenizer.model").read_bytes())
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
    for told in ("1-ingest: 80 documents", "8-tokenizer: 320", "9-tokens", "baselines", "is ready"):
        assert any(told in line for line in lines)


def test_the_tokenizer_may_be_at_another_place_and_no_other(texts, tmp_path):
    """As $SLURM_TMPDIR moves it from job to job."""
    for name, seed in (("one", texts), ("two", None)):
        if seed is None:
            seed = write_texts(tmp_path / "other", 90)
            for i in range(40):
                (seed / f"more{i}.txt").write_text(f"zebra quagga okapi {i} " * 60)
        prepare(make_config(seed), str(tmp_path / name), log=silent)

    def config(path, vocab_size=320):
        return make_config(texts, tokenizer=TokenizerConfig(vocab_size, path=str(path)))

    first, out = tmp_path / "1/tok.model", str(tmp_path / "out")
    first.parent.mkdir()
    first.write_bytes((tmp_path / "one/tokenizer.model").read_bytes())
    prepare(config(first), out, log=silent)
    first.parent.rename(tmp_path / "2")
    lines = []
    prepare(config(tmp_path / "2/tok.model"), out, log=lines.append)
    assert "using the data" in lines[0]
    assert open_splits(config(tmp_path / "2/tok.model"), out)[0].predictions
    for other, words in ((tmp_path / "two/tokenizer.model", "prepared with .* got another"),
                         (tmp_path / "gone", "does not exist"), ("", "prepared with tokenizer")):
        with pytest.raises(UserError, match=words):
            prepare(config(other), out, log=silent)


ALL = CurateConfig(
    gopher_repetition=GopherRepetition(max_top_2gram_chars=0.9, max_top_3gram_chars=0.9,
                                       max_top_4gram_chars=0.9),
    dedup=DedupConfig(threshold=0.5, window=8, line_documents=3, line_chars=5), workers=1)


# What these stages write for the texts of `everything`. A release that changes the bytes repeats
# them, and all stages after them, in directories that an older release began.
FOUND = {"3-exact": "310139109d4127be", "4-near": "1782ef24426c7dc6", "5-cuts": "7cc9c42cb40ff8ad"}


def everything(tmp_path, monkeypatch):
    """A config with every stage at work on many shards."""
    texts = write_texts(tmp_path / "texts", 60)
    for i in range(6):  # near copies, and one that is exact but for spaces
        (texts / f"copy{i}.txt").write_text((texts / f"{i:03}.txt").read_text() + "\nalpha beta 77")
    (texts / "exact.txt").write_text((texts / "007.txt").read_text() + "  ")
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)  # many shards, for several workers
    evals = DecontaminateConfig(sources=(SourceConfig("e", f"text:{texts}/020.txt"),), words=5)
    return texts, dataclasses.replace(ALL, decontaminate=evals)


def limit_memory(monkeypatch, engine):
    """Gives an engine so little memory that it cuts the records into many ranges."""
    memory = property(lambda self: 20_000, lambda self, value: None)
    monkeypatch.setattr(engine, "memory", memory, raising=False)


@pytest.mark.long
def test_any_number_of_workers_and_any_memory_give_the_same_bytes(tmp_path, monkeypatch):
    texts, whole = everything(tmp_path, monkeypatch)
    prepare(make_config(texts, curate=whole), str(tmp_path / "a"), log=silent)
    limit_memory(monkeypatch, Engine)
    config = make_config(texts, curate=dataclasses.replace(whole, workers=3))
    prepare(config, str(tmp_path / "b"), log=silent)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    receipts = [json.loads((tmp_path / side / "receipts/7-finish.json").read_text())
                for side in "ab"]
    assert receipts[0]["output"] == receipts[1]["output"]
    for name, output in FOUND.items():
        receipt = json.loads((tmp_path / f"a/receipts/{name}.json").read_text())
        assert receipt["output"].startswith(output)
    assert len(receipts[0]["facts"]["shards"]) > 4
    removed = receipts[0]["facts"]["sources"]["texts"]["removed"]
    assert removed["near_copy"][0] >= 6 and removed["exact_copy"][0] == 1
    assert removed["contaminated"][0] >= 1
    assert receipts[0]["facts"]["sources"]["texts"]["changed"]["repeated_window"] > 0
    assert not list(tmp_path.glob(".*"))
    assert any("exact.txt was removed in 7-finish by exact_copy for 007.txt" in line
               for line in trace(str(tmp_path / "a"), "exact.txt"))
    assert any("copy3.txt" in line or "003.txt" in line
               for line in trace(str(tmp_path / "a"), "003.txt"))
    with pytest.raises(UserError, match="the id of a document that was read, got 'none.txt'"):
        trace(str(tmp_path / "a"), "none.txt")
    found = json.loads((tmp_path / "a/contamination.json").read_text())
    assert found[0]["id"] == "020.txt" and "020.txt" in found[0]["documents"]
    assert 0 < found[0]["words"][0] <= found[0]["words"][1]  # some had been cut as repeated windows
    xml.dom.minidom.parse(str(tmp_path / "a/data_report.html"))  # well formed
    assert "near_copy" in (tmp_path / "a/data_report.html").read_text()


@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_apache_beam_gives_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    texts, whole = everything(tmp_path, monkeypatch)
    prepare(make_config(texts, curate=whole), str(tmp_path / "a"), log=silent)
    limit_memory(monkeypatch, BeamEngine)
    beam = dataclasses.replace(whole, beam=("--runner=FnApiRunner",))
    prepare(make_config(texts, curate=beam), str(tmp_path / "b"), log=silent)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(os.listdir(tmp_path)) == 3  # nothing is left of the work
    none = SourceConfig("none", f"text:{tmp_path}/none/*")
    with pytest.raises(ValueError, match="expected files that match, got none"):
        prepare(make_config(texts, curate=beam, sources=(none,)), str(tmp_path / "c"), log=silent)


def test_without_apache_beam_it_is_asked_for(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    config = make_config(texts, curate=CurateConfig(beam=("--runner=FnApiRunner",)))
    told = r"data.curate.beam: expected Apache Beam, .*; pip install lmjax\[beam\]"
    with pytest.raises(UserError, match=told):
        prepare(config, str(tmp_path / "out"), log=silent)


@pytest.mark.parametrize("package, extra, changed", [
    ("tensorflow_datasets", "tfds", {"sources": (SourceConfig("c4", "tfds:c4/en"),)}),
    ("ftfy", "clean", {"clean": ("newlines", "ftfy")})])
def test_a_package_that_is_not_installed_is_asked_for(package, extra, changed, texts, tmp_path,
                                                      monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    told = rf"expected the package .*, got none.*; pip install 'lmjax\[{extra}\]'"
    with pytest.raises(ValueError, match=told) as e:
        prepare(make_config(texts, **changed), str(tmp_path / "out"), log=silent)
    assert errors.explain(e.value)[0] == 2


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
    with pytest.raises(ValueError, match=f"data prepared with {next(iter(change))} = .*; repeat"):
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


STAGES = [("ingest", "1-ingest", curate), ("clean_shard", "2-clean", curate),
          ("make_tokenizer", "8-tokenizer", None),
          ("write_store", "store", module)]


@pytest.mark.parametrize("function, stage, where", STAGES)
def test_a_full_disk_in_any_stage_leaves_what_was_finished(texts, tmp_path, monkeypatch, function,
                                                           stage, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    lines, options = [], {}
    with monkeypatch.context() as patched:
        if function == "make_tokenizer":
            options[function] = full
        else:
            patched.setattr(where, function, full)
        patched.chdir(tmp_path)
        message = "/out: expected room for the prepared data, got a full disk"
        with pytest.raises(UserError, match=message):
            prepare(make_config(texts), "out", log=silent, **options)
    finished = sorted(path.name for path in (tmp_path / ".out.partial").iterdir())
    assert not (tmp_path / "out").exists() and all(name < stage for name in finished)
    prepare(make_config(texts), str(tmp_path / "out"), log=lines.append)
    assert [line.split(":")[1].strip() for line in lines if "done before" in line] == finished
    assert not (tmp_path / ".out.partial").exists()


def cut_short(path):
    whole = gzip.compress(os.urandom(50_000).hex().encode())
    (path / "a.jsonl.gz").write_bytes(whole[:30_000])


@pytest.mark.parametrize("make, message", [
    (cut_short, "whole file"),
    (lambda p: (p / "a.jsonl").write_text(""), "at least one document, got none"),
    (lambda p: pq.write_table(pa.table({"body": ["x" * 50]}), p / "a.parquet"),
     "a column 'text', got .'body'"),
    (lambda p: (p / "a.jsonl").write_bytes(b'{"text": "\xe9"}\n'),
     "at most 2.0% of broken records, got 1 of 1"),
    (lambda p: None, "files that match, got none"),
])
def test_bad_input_is_refused_in_one_line(tmp_path, make, message):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    scheme = "parquet" if (tmp_path / "in/a.parquet").exists() else "jsonl"
    config = make_config("", sources=(SourceConfig("bad", f"{scheme}:{tmp_path}/in/*"),))
    with pytest.raises(ValueError, match=f"source bad .*expected .*{message}") as error:
        prepare(config, str(tmp_path / "out"), log=silent)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_evaluation_sets_that_cannot_be_read_are_refused(texts, tmp_path):
    """Otherwise nothing would be kept out of the corpus, and nobody would know."""
    (tmp_path / "e.jsonl").write_text('{"question": "alpha beta gamma alpha beta"}\n' * 3)
    evals = DecontaminateConfig(sources=(SourceConfig("e", f"jsonl:{tmp_path}/e.jsonl"),), words=5)
    config = make_config(texts, curate=CurateConfig(decontaminate=evals, workers=1))
    told = (r"source e .*got 3 of 3 \(such as e.jsonl:1: nothing under 'text' \(it has "
            r"\['question'\]\)\); set text_field, repair")
    with pytest.raises(ValueError, match=told):
        prepare(config, str(tmp_path / "out"), log=silent)


def test_a_very_long_line_is_a_counted_skip(tmp_path):
    texts = write_texts(tmp_path / "texts", 10)
    (texts / "long.txt").write_text("x" * 50_000_000)
    (texts / "empty.txt").write_text("")
    manifest = store.read_manifest(prepare(make_config(texts), str(tmp_path / "out"), log=silent))
    assert manifest["sources"]["texts"]["removed"] == {"too_long": 1, "too_short": 1}


def test_a_change_of_the_config_repeats_only_what_depends_on_it(texts, tmp_path, monkeypatch):
    before, lines = module.write_store, []
    monkeypatch.setattr(module, "write_store", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(make_config(texts), str(tmp_path / "out"), log=silent)
    monkeypatch.setattr(module, "write_store", before)
    tokenizer = TokenizerConfig(vocab_size=330)
    prepare(make_config(texts, tokenizer=tokenizer), str(tmp_path / "out"), log=lines.append)
    done = [line.split(":")[1].strip() for line in lines if "done before" in line]
    assert done == ["1-ingest", "2-clean", "3-exact", "7-finish"]
    prepare(make_config(texts, tokenizer=tokenizer), str(tmp_path / "straight"), log=silent)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_tokenizer_that_loses_text_is_accepted_with_a_count(texts, tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["alpha beta gamma"] * 50), model_writer=model, vocab_size=14,
        minloglevel=2)
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = TokenizerConfig(vocab_size=14, path=str(tmp_path / "t.model"))
    said: list[str] = []
    out = prepare(make_config(texts, tokenizer=tokenizer), str(tmp_path / "out"), log=said.append)
    told = r"documents do not come back exactly .*\(document \d+.txt of source texts: '"
    assert any(re.search(told, line) for line in said)
    entry = store.read_manifest(out)["sources"]["texts"]
    assert all(entry[split]["lost"]["documents"] for split in ("train", "heldout"))


def test_the_split_is_by_hash_and_never_empty(texts, tmp_path):
    keys = np.array([split_key(f"d{i}", f"text {i}") for i in range(5000)], np.uint64)
    assert 400 < (keys < np.uint64(2**64 // 10)).sum() < 600 and len(set(keys)) == 5000
    config = make_config(texts, heldout_fraction=1e-9)
    manifest = store.read_manifest(prepare(config, str(tmp_path / "out"), log=silent))
    assert manifest["sources"]["texts"]["heldout"]["documents"] == 1
    two = write_texts(tmp_path / "two", 2)
    for fraction in (1e-9, 0.1, 1 - 1e-9):  # one of two documents is held out all the same
        config = make_config(two, tokenizer=TokenizerConfig(vocab_size=290),
                             heldout_fraction=fraction)
        out = prepare(config, str(tmp_path / f"two-{fraction}"), log=silent)
        entry = store.read_manifest(out)["sources"]["texts"]
        assert entry["train"]["documents"] == entry["heldout"]["documents"] == 1


def test_two_sources_keep_apart_and_copies_are_found_across_them(tmp_path):
    a, b = write_texts(tmp_path / "a", 20), write_texts(tmp_path / "b", 30, seed=1)
    (b / "copy.txt").write_text((a / "003.txt").read_text())
    sources = SourceConfig("a", f"text:{a}/*"), SourceConfig("b", f"text:{b}/*")
    config = make_config(a, sources=sources)
    manifest = store.read_manifest(prepare(config, str(tmp_path / "out"), log=silent))
    counts = {name: entry["train"]["documents"] + entry["heldout"]["documents"]
              for name, entry in manifest["sources"].items()}
    assert counts == {"a": 20, "b": 30}
    assert manifest["sources"]["b"]["removed"] == {"exact_copy": 1}
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
        config = make_config("", sources=(SourceConfig("s", "synthetic"),))
        prepare(config, str(tmp_path / "out"), log=silent)
