"""Documents that are unlike examples of good text are removed, and the report says so."""

import dataclasses
import json
import xml.dom.minidom

import pyarrow.parquet as pq
import pytest
from small_corpus import make_config, sentences, shuffled, silent

from lmjax.data.config import CurateConfig, QualityConfig
from lmjax.data.preparation.prepare import prepare
from lmjax.data.text.sources import SourceConfig
from lmjax.errors import UserError


@pytest.mark.long
def test_what_is_unlike_the_examples_is_removed_from_the_sources_that_are_judged(tmp_path):
    good, junk = sentences(360, seed=1), shuffled(sentences(60, seed=2))
    files = {"examples": good[:120], "web": good[120:320] + junk[:40],
             "notes": junk[40:] + good[320:]}
    for name, texts in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"id": f"{name}{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    examples, web, notes = (SourceConfig(name, f"jsonl:{tmp_path}/{name}.jsonl") for name in files)
    quality = QualityConfig(good=(examples,), only=("web",))
    config = make_config("", sources=(web, notes), curate=CurateConfig(quality=quality, workers=1))
    out = tmp_path / "out"
    prepare(config, str(out), log=silent)
    gone = pq.read_table(out / "ledger.parquet").to_pylist()
    numbers = {int(row["id"].rpartition(":")[2]) - 1 for row in gone if row["rule"] == "quality"}
    assert len(numbers & set(range(200, 240))) >= 38 and len(numbers - set(range(200, 240))) <= 8
    assert len(numbers) == len(gone)  # all by this rule, all of this source
    threshold = json.loads((out / "receipts/2-quality.json").read_text())["facts"]["threshold"]
    assert all(row["value"] < threshold and not row["by"] for row in gone)
    xml.dom.minidom.parse(str(out / "data_report.html"))
    assert "Likeness to the examples" in (out / "data_report.html").read_text()


@pytest.mark.parametrize("change, told", [
    (dict(only=("wbe",)), "curate.quality.only: expected .*web.*wbe"),
    (dict(good=(SourceConfig("few", "jsonl:{}/few.jsonl"),)), "expected 100 different .* got 3")])
def test_a_quality_filter_that_cannot_be_is_refused(tmp_path, change, told):
    lines = [json.dumps({"text": text}) + "\n" for text in sentences(40, seed=1)]
    (tmp_path / "few.jsonl").write_text("".join(lines[:3] * 60))
    (tmp_path / "web.jsonl").write_text("".join(lines))
    web = SourceConfig("web", f"jsonl:{tmp_path}/web.jsonl")
    good = tuple(dataclasses.replace(s, uri=s.uri.format(tmp_path))
                 for s in change.get("good", (web,)))
    with pytest.raises(UserError, match=told):
        curated = CurateConfig(quality=QualityConfig(**{**change, "good": good}), workers=1)
        prepare(make_config("", sources=(web,), curate=curated), str(tmp_path / "out"), log=silent)


@pytest.mark.long
def test_a_copy_of_what_the_filter_removes_stays_where_it_is_not_judged(tmp_path):
    """The first copy, of the judged source, goes; that of the other source does not go with it."""
    good, junk = sentences(320, seed=1), shuffled(sentences(60, seed=2))
    files = {"examples": good[:120], "web": junk[:30] + good[120:], "notes": junk[:30] + junk[30:]}
    for name, texts in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": text}) + "\n" for text in texts))
    examples, web, notes = (SourceConfig(name, f"jsonl:{tmp_path}/{name}.jsonl") for name in files)
    curate = CurateConfig(quality=QualityConfig(good=(examples,), only=("web",)), workers=1)
    prepare(make_config("", sources=(web, notes), curate=curate), str(tmp_path / "out"), log=silent)
    gone = pq.read_table(tmp_path / "out/ledger.parquet").to_pylist()
    assert {row["rule"] for row in gone} <= {"quality", "exact_copy"}
    judged = [row for row in gone if row["rule"] == "quality"]
    copies = [row for row in gone if row["rule"] == "exact_copy"]
    assert len(judged) >= 28 and len(copies) <= 2  # only those of what the filter missed
