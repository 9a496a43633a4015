"""The benchmark of data measures every stage and objective, and names missing libraries."""

import json
import sys

import pytest

from lmjax.benchmarks import data as bench_data
from lmjax.benchmarks import pipeline as bench_pipeline
from lmjax.cli.main import main


@pytest.mark.slow
def test_every_stage_and_every_objective_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_data, "CHARS", 200_000)
    monkeypatch.setattr(bench_pipeline, "DOCUMENTS", 60)
    monkeypatch.setattr(bench_pipeline, "STEPS", 1)
    for name in ("datatrove", "grain"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    out = tmp_path / "figures.json"
    assert main(["bench", "data", "--seconds", "0.01", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) >= {"clean and filter", "exact dedup", "tokenise",
                         "MinHash dedup, 3000 characters", "MinHash dedup, datasketch",
                         *(f"rows, {name}" for name in bench_pipeline.OBJECTIVES)}
    assert all(row["tokens_per_s"] > 0 and name in printed.out for name, row in rows.items())
    for library in ("datatrove", "Grain"):
        assert f"no comparison with {library}" in printed.err
