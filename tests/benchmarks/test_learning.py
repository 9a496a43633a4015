"""Steps to AdamW's loss: what is run, what is run once only, and the figures of the table."""

import json
import math
from pathlib import Path

import pytest

from lmjax.benchmarks import learning
from lmjax.benchmarks.learning import Found, Row, Run, interpolated, table
from lmjax.cli.main import main
from lmjax.config import load
from lmjax.training.recipe import build_recipe

ROOT = Path(__file__).resolve().parents[2]


def found(row, seed, needed):
    return Found("1.5M", row, ("optimizer.b2=0.9",), seed, 2.0 + seed, 1.5, 0.25, needed)


def test_every_setting_of_the_table_makes_another_recipe():
    assert len({row.settings for row in learning.ROWS.values()}) == len(learning.ROWS)
    for row in learning.ROWS.values():
        if not row.choices:  # the recipe as it is
            continue
        recipes = [build_recipe(load(str(ROOT / learning.RECIPE), (*row.settings, setting)))
                   for choice in row.choices for setting in choice]
        assert len({repr(recipe.optimizer) for recipe in recipes}) > len(recipes) / 2


def test_steps_are_read_between_two_runs_on_a_line_over_their_logarithm():
    assert interpolated((100, 3.0), (400, 2.0), 2.5) == pytest.approx(200)
    assert interpolated((100, 3.0), (400, 2.0), 2.0) == pytest.approx(400)


def test_the_table_compares_each_row_with_the_one_above_it():
    lines = table([found("adamw", 0, 600.0), found("adamw", 1, 500.0), found("muon", 0, 300.0),
                   found("muon", 1, 200.0), found("x", 0, None), found("x", 1, 400.0)], 600)
    assert lines[2] == ("| 1.5M | adamw | 2.5000 | 1.5000 | 0.25 | 550 |  |  | optimizer.b2=0.9 |")
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[6:8] == ["250", "0.45"]  # the geometric mean of 1/2 and 2/5
    logs = [math.log(1 / 2), math.log(2 / 5)]
    t = (sum(logs) / 2) / (abs(logs[0] - logs[1]) / 2)  # mean over its standard error
    assert float(cells[8]) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-3)  # 1 degree
    assert "| 0.25 | more |  |  |" in lines[4]


def test_choices_are_made_one_after_the_other_and_shorter_runs_stop_above_the_target(monkeypatch):
    runs: list[Run] = []

    def run(its):
        runs.append(its)
        worse = {"a=1": 0.3, "a=2": 0.0, "b=1": 0.1, "b=2": 0.2}
        return {"loss": 10 - math.log(its.steps) + sum(worse.get(s, 0) for s in its.settings),
                "bits_per_byte": 1.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(learning, "_run", run)
    monkeypatch.setattr(learning, "ROWS", {
        "adamw": Row(("slow=1",), ()), "x": Row(("fast=1",), (("a=1", "a=2"), ("b=1", "b=2")))})
    report = learning.bench_learning(["x"], ["tiny"], seeds=1, steps=600)
    assert [row["settings"] for row in report["rows"]] == [("slow=1",), ("fast=1", "a=2", "b=1")]
    # AdamW ends at 10 - log 600, which x reaches after 600 e^0.1 steps: not at all.
    assert report["rows"][0]["needed"] == pytest.approx(600)
    assert report["rows"][1]["needed"] is None
    tuned = [its.settings for its in runs if its.row == "x"]
    assert tuned[:4] == [("fast=1", "a=1"), ("fast=1", "a=2"), ("fast=1", "a=2", "b=1"),
                         ("fast=1", "a=2", "b=2")]
    assert {its.steps for its in runs if its.row == "adamw"} == {600, 500}


def test_an_unknown_name_is_refused_before_anything_runs(capsys):
    for words, message in {
            "--optimizers adam": "--optimizers: expected some of adamw, muon",
            "--sizes 7B": "--sizes: expected some of 0.7M, 1.5M, 3.2M",
            "--steps 0": "--steps: expected at least 1",
            "--config.train.steps=1": "--config: expected no --config"}.items():
        assert main(["bench", "learning", *words.split()]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_trained_once(monkeypatch, tmp_path, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning, "ROWS", {
        "adamw": Row(("optimizer.name=adamw", "optimizer.warmup_steps=1"), ()),
        "muon": Row(("optimizer.warmup_steps=1",), ())})
    command = ["bench", "learning", "--sizes", "tiny", "--seeds", "1", "--steps", "6", "--out",
               "figures.json"]
    assert main(command) == 0
    rows = json.loads(Path("figures.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["adamw", "muon"]
    assert rows[0]["needed"] <= 6 and rows[0]["loss"] != rows[1]["loss"]
    assert [path.name for path in Path("runs/learning").iterdir() if path.is_dir()] == ["data-tiny"]
    assert "| tiny | muon |" in capsys.readouterr().out

    monkeypatch.setattr(learning, "train", None)  # nothing is left to run
    assert main(command) == 0 and json.loads(Path("figures.json").read_text())["rows"] == rows
