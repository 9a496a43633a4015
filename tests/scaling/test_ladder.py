"""Ladders and forecasts: their runs, what is written down, and what a report says later."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmjax.cli.main import main
from lmjax.config import load, plain
from lmjax.errors import UserError
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.reporting.forecast import forecast_card
from lmjax.reporting.run_files import read_run
from lmjax.scaling.ladder import (
    fit_ladder,
    forecast,
    observations,
    parse_sizes,
    rungs,
    size_of,
    tokens_of,
)
from lmjax.scaling.law import Law
from lmjax.scaling.pictures import draw_law
from lmjax.scaling.sizes import Size, resized
from lmjax.training.recipe import build_recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/quickstart.py:tiny")
LAW = Law(1.5, 40.0, 0.4, 60.0, 0.35)


def write_run(place: Path, size: float, tokens: int, loss: float, *overrides: str) -> None:
    """The files of a finished run of the tiny recipe."""
    place.mkdir(parents=True, exist_ok=True)
    recipe = plain(build_recipe(load(TINY, overrides)))
    (place / "config.json").write_text(json.dumps(recipe))
    (place / "run.json").write_text(json.dumps({
        "flops_per_token": 6 * size, "tokens_per_step": tokens / 10, "steps": 10,
        "data": {"fingerprint": "f"}}))
    writer = MetricsWriter(place, 0, tensorboard=False)
    writer.train(10, {"loss": loss, "tokens": float(tokens)})
    writer.eval(10, {"loss": loss, "bits_per_byte": loss / 2})
    writer.close()


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    random, workdir = np.random.default_rng(0), tmp_path / "ladder"
    for size in (1e4, 3e4, 1e5):
        for ratio in (10, 30, 90):
            name = f"{size:g}-{ratio}"
            noise = np.exp(1e-3 * random.standard_normal())
            write_run(workdir / name, size, round(size * ratio),
                      LAW.loss(size, size * ratio) * noise)
            with (workdir / "finished.jsonl").open("a") as file:
                file.write(json.dumps({"run": name, "step": 10}) + "\n")
    return workdir


@pytest.mark.long
def test_a_forecast_is_written_once_before_the_run_and_compared_after_it(
        ladder: Path, tmp_path: Path) -> None:
    run, overrides = tmp_path / "big", ["train.steps=40000", "model.num_layers=3"]
    made = forecast(TINY, overrides, ladder, run)
    recipe = build_recipe(load(TINY, overrides))
    size, tokens = size_of(recipe), tokens_of(recipe)
    assert tokens == 40_000 * 8 * 64
    truth = LAW.loss(size, tokens)
    assert made["loss"] == pytest.approx(truth, rel=0.02)
    assert made["low"] < truth < made["high"]
    assert made["times_the_largest"] == pytest.approx(size * tokens / (1e5 * 9e6))
    assert {one["run"] for one in made["runs"]} == {*observations(ladder)[0]}
    with pytest.raises(UserError, match="has a forecast"):
        forecast(TINY, overrides, ladder, run)
    write_run(run, size, tokens, truth)
    card = forecast_card(read_run(run))
    assert f"{truth:.4f}" in card and "inside the interval" in card and "do not" not in card
    write_run(run, size, tokens // 2, 2 * truth)
    card = forecast_card(read_run(run))
    assert "outside the interval" in card and "they do not compare" in card
    with pytest.raises(UserError, match="has begun"):
        forecast(TINY, overrides, ladder, run)


def test_a_forecast_is_of_the_recipe_of_the_ladder(ladder: Path, tmp_path: Path) -> None:
    for change in ("data.seq_len=32", "optimizer.peak_lr=1e-3", "train.batch_size=4",
                   "optimizer.schedule=cosine", "model.norm_position=post"):
        with pytest.raises(UserError, match=change.partition("=")[0]):
            forecast(TINY, [change], ladder, tmp_path / "other")


def test_runs_of_one_law_have_one_base(ladder: Path) -> None:
    scaled = ["model.parametrization=completep", "model.base_num_layers=2"]
    for i, name in enumerate(sorted(observations(ladder)[0])):
        write_run(ladder / name, 1e4, 10**6, 2.0, *scaled, f"model.base_embed_dim={32 << (i > 4)}")
    with pytest.raises(UserError, match="base_embed_dim: 32 -> 64"):
        observations(ladder)
    with pytest.raises(UserError, match="base_embed_dim: expected that of the base model"):
        rungs(TINY, scaled, parse_sizes(["32x2", "64x2"]), [1.0])


def test_runs_that_diverged_are_named(
        ladder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(ladder / "30000-30", 3e4, 900_000, float("nan"))
    found, diverged = observations(ladder)
    assert diverged == ["30000-30"] and len(found) == 8
    assert "left out, since they diverged: 30000-30" in capsys.readouterr().err


def test_a_run_without_a_forecast_has_no_card(ladder: Path) -> None:
    assert forecast_card(read_run(ladder / "10000-10")) == ""


@pytest.mark.long
def test_the_law_of_a_ladder_is_written_and_drawn(ladder: Path) -> None:
    write_run(ladder / "lost", 1e4, 10**6, float("nan"))
    with (ladder / "finished.jsonl").open("a") as file:
        file.write(json.dumps({"run": "lost", "step": 10}) + "\n")
    runs, found, lines = fit_ladder(ladder, [1e15])
    assert lines[-1] == "Left out, since they diverged: lost"
    written = json.loads((ladder / "law.json").read_text())
    assert written["law"]["floor"] == found.law.floor
    assert len({one["sha256"] for one in written["runs"]}) == len(runs) == 9
    draw_law(list(runs.values()), found, ladder / "law.png")
    assert (ladder / "law.png").stat().st_size > 10_000
    line = next(x for x in (ladder / "law.md").read_text().splitlines() if x.startswith("| 1e+15"))
    assert line.split(" | ")[-1] == f"{found.law.loss(*found.law.best(1e15)):.4f} |"


@pytest.mark.long
def test_rungs_train_each_size_for_its_share_of_tokens() -> None:
    runs = rungs(TINY, ["optimizer.warmup_steps=1"], parse_sizes(["32x2", "64x3"]), [1.0, 2.0])
    assert [run.name for run in runs] == ["32x2-1", "32x2-2", "64x3-1", "64x3-2"]
    for run in runs:
        recipe = build_recipe(load(TINY, ["optimizer.warmup_steps=1", *run.overrides]))
        ratio = float(run.name.rpartition("-")[2])
        assert tokens_of(recipe) == pytest.approx(ratio * size_of(recipe), abs=8 * 64)


def test_sizes_keep_the_shape_of_heads_and_mlp() -> None:
    model = build_recipe(load(TINY, [])).model
    assert {*resized(model, Size(96, 5))} == {
        "model.embed_dim=96", "model.num_layers=5", "model.num_heads=6", "model.num_kv_heads=3",
        "model.mlp_dim=192"}
    with pytest.raises(UserError, match="num_heads"):
        resized(model, Size(40, 2))
    with pytest.raises(UserError, match="--sizes"):
        rungs(TINY, [], [Size(40, 2)], [1.0])


def test_what_is_missing_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", TINY, "--workdir", str(tmp_path / "none")]
    for more, message in (
            (["ladder"], "--sizes and --ratios"), (["forecast"], "--run DIR"),
            (["forecast", "--run", str(tmp_path / "r")], "run lmjax scale ladder first"),
            (["ladder", "--sizes", "64", "--ratios", "1"], "WIDTHxDEPTH"),
            (["transfer", "--rates", "1e-3:1e-2"], "--widths or --depths"),
            (["transfer", "--rates", "1e-3", "--widths", "32", "64"], "at least three rates"),
            (["coord-check", "--widths", "32"], "at least two different sizes"),
            (["transfer", "--rates", "1:inf", "--widths", "32", "64"], "at least three rates"),
            (["coord-check", "--widths", "32", "64"], "at least a factor of 4"),
            (["ladder", "--sizes", "64x2", "--ratios", "inf"], "ratios above 0"),
            (["coord-check", "--widths", "32", "128", "--parametrizations", "mu"],
             "one of standard, mup, completep")):
        assert main(["scale", *more, *common]) == 2
        assert message in capsys.readouterr().err
