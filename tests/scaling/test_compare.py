"""Comparisons: which runs share a row, which order they have, and what a page says of them."""

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lmjax.cli.main import main
from lmjax.errors import UserError
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.scaling.compare import write_comparison
from lmjax.scaling.groups import choose_metric, differing, group_runs, read_runs, short

SVG = "{http://www.w3.org/2000/svg}"


def write_run(workdir: Path, bits: float, *, rate: float = 1e-3, seed: int = 0, steps: int = 20,
              **more: object) -> Path:
    workdir.mkdir(parents=True)
    config = {"optimizer": {"peak_lr": rate, "name": "adamw"}, "model": {"num_layers": 2},
              "train": {"seed": seed, "steps": 20}, "data": {"seed": seed, "seq_len": 64},
              "eval": {"every": 10}, **more}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "run.json").write_text(json.dumps({
        "parameters": 1000, "tokens_per_step": 128, "flops_per_token": 6000.0, "steps": 20}))
    writer = MetricsWriter(workdir, 0, tensorboard=False)
    for step in range(1, steps + 1):
        writer.train(step, {"loss": 4 - step / 10, "tokens": 128.0 * step})
        writer.timing(step, {"seconds": 2.0 * step, "step_seconds": 2.0})
        if step % 10 == 0:
            writer.eval(step, {"loss": 2 * bits + 20 - step, "bits_per_byte": bits + 20 - step})
    writer.close()
    return workdir


def test_seeds_share_a_row_with_the_interval_of_student(tmp_path):
    values = [2.0, 2.1, 2.3]
    for seed, bits in enumerate(values):
        write_run(tmp_path / f"a{seed}", bits, seed=seed)
    write_run(tmp_path / "b", 1.9, rate=2e-3)
    groups = group_runs(read_runs([tmp_path]), "bits_per_byte")
    assert [group.name for group in groups] == ["peak_lr=0.002", "peak_lr=0.001"]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert groups[1].mean == pytest.approx(np.mean(values))
    assert groups[1].half_width == pytest.approx((high - low) / 2)
    assert math.isnan(groups[0].half_width)


def test_what_changes_nothing_that_is_learnt_makes_no_group(tmp_path):
    write_run(tmp_path / "a", 2.0, checkpoint={"every": 5}, watch={"log": 1})
    write_run(tmp_path / "b", 2.1, checkpoint={"every": 50})
    assert len(group_runs(read_runs([tmp_path]), "loss")) == 1


def test_higher_is_better_where_it_is_and_runs_without_a_value_come_last(tmp_path):
    for name, accuracy in (("a", 0.5), ("b", 0.9)):
        path = write_run(tmp_path / name, 2.0, rate=accuracy)
        writer = MetricsWriter(path, 20, tensorboard=False)
        writer.eval(20, {"loss": 1.0, "accuracy": accuracy})
        writer.close()
    write_run(tmp_path / "c", 2.0, rate=5.0, steps=5)
    groups = group_runs(read_runs([tmp_path]), "accuracy")
    assert [group.mean for group in groups[:2]] == [0.9, 0.5]
    assert math.isnan(groups[2].mean)


def test_the_metric_is_the_first_that_all_runs_have(tmp_path):
    write_run(tmp_path / "a", 2.0)
    assert choose_metric(read_runs([tmp_path])) == "bits_per_byte"
    path = write_run(tmp_path / "b", 2.0, rate=2.0, steps=5)
    writer = MetricsWriter(path, 5, tensorboard=False)
    writer.eval(5, {"loss": 1.0})
    writer.close()
    runs = read_runs([tmp_path])
    assert choose_metric(runs) == "loss"
    assert choose_metric(runs, "bits_per_byte") == "bits_per_byte"
    with pytest.raises(UserError, match="--metric: expected one of bits_per_byte, loss, got 'f1'"):
        choose_metric(runs, "f1")
    with pytest.raises(UserError, match="config.eval.every above 0"):
        choose_metric(read_runs([write_run(tmp_path / "c", 2.0, steps=5)]))


def test_a_group_with_a_diverged_run_comes_last_whatever_the_run_had_before(tmp_path):
    for seed in range(2):
        path = write_run(tmp_path / f"a{seed}", 1.0, seed=seed)
    writer = MetricsWriter(path, 20, tensorboard=False)
    writer.eval(30, {"loss": math.nan, "bits_per_byte": math.nan})
    writer.close()
    write_run(tmp_path / "b", 2.0, rate=2e-3)
    rows = write_comparison([tmp_path], tmp_path / "page.html")[2:]
    assert rows[0].startswith("| peak_lr=0.002 |")
    assert "| none of 1 run |" in rows[1]


def test_keys_are_short_unless_two_would_be_the_same():
    assert short(["model.num_layers", "encoder.num_layers", "optimizer.peak_lr"]) == {
        "model.num_layers": "model.num_layers", "encoder.num_layers": "encoder.num_layers",
        "optimizer.peak_lr": "peak_lr"}
    assert differing([{"a": 1, "b": [1]}, {"a": 1, "b": [2]}, {"a": 1}]) == ["b"]


@pytest.mark.parametrize("many", [False, True])
def test_a_page_is_valid_and_says_what_the_table_says(tmp_path, many, capsys):
    extra = {f"key{i}": i for i in range(9)} if many else {}
    write_run(tmp_path / "runs" / "a", 2.0)
    write_run(tmp_path / "runs" / "b<&>", 1.5, rate=2e-3, more=extra)
    out = tmp_path / "page.html"
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    tree = ElementTree.fromstring(out.read_text().removeprefix("<!DOCTYPE html>\n"))
    text = "".join(tree.itertext())
    assert len(list(tree.iter(f"{SVG}svg"))) == 4
    rows = [row.strip("| ").split(" | ") for row in printed[:-1]]
    assert len({len(row) for row in rows}) == 1
    for row in (rows[0], *rows[2:]):
        assert all(cell in text for cell in row)
    assert rows[2][0] == ("b<&>" if many else "peak_lr=0.002")
    assert ("more.key3" in text) == many
    assert f"| {1.5:.4f} |" in printed[2]
    assert "2,560" in printed[2] or "2.6k" in printed[2]  # tokens of 20 steps


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none")]) == 2
    assert "which is none; give the --workdir" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    run = write_run(tmp_path / "a", 2.0)
    assert len(read_runs([tmp_path, run])) == 1
    assert len(write_comparison([tmp_path, run], tmp_path / "page.html")) == 3
