"""Coordinate checks and the transfer of rates."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import lmjax
from lmjax.cli.main import main
from lmjax.scaling import coordinates
from lmjax.scaling import transfer as transfer_module
from lmjax.scaling.coordinates import FLAT, JUDGED, OF_WIDTH, Line
from lmjax.scaling.pictures import draw_transfers
from lmjax.scaling.sizes import Size
from lmjax.scaling.transfer import (
    Point,
    Transfer,
    Valley,
    parse_rates,
    points_of,
    read_transfers,
    table,
    wanted,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/quickstart.py:tiny")
# Random tokens: nothing has to be prepared.
SYNTHETIC = ["--config.data.sources=[{\"name\": \"chain\", \"uri\": \"synthetic:64\"}]",
             "--config.data.tokenizer.vocab_size=64", "--config.model.scan_layers=true",
             "--config.data.seq_len=32", "--config.data.packing=concat"]


def valley(width: int, best: float) -> Valley:
    """Losses that are a parabola in the logarithm of the rate."""
    rates = parse_rates("1e-3:1.6e-2")
    return Valley(Size(width, 2), rates, tuple(
        2 + 0.1 * math.log(rate / best) ** 2 for rate in rates))


def test_a_shift_is_counted_in_steps_of_the_grid(tmp_path: Path) -> None:
    wide = valley(256, 3e-3 / 2)
    transfer = Transfer("standard", "width", (valley(32, 3e-3), wide))
    assert wide.best == pytest.approx(3e-3 / 2)
    assert transfer.shift == pytest.approx(-2)
    assert table([transfer])[-1].startswith("standard: the best rate moves by 2.0 steps")
    draw_transfers([transfer], tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


def test_a_best_rate_at_the_end_of_the_grid_is_not_known() -> None:
    edge = valley(32, 1e-4)
    assert math.isnan(edge.best)
    assert "at an end of the grid" in "".join(table([Transfer("mup", "width", (edge, edge))]))


def test_a_diverged_run_is_no_best_rate() -> None:
    lost = Valley(Size(32, 2), (1e-3, 2e-3, 4e-3, 8e-3), (2.3, 2.1, 2.2, math.nan))
    assert 1e-3 < lost.best < 4e-3


def test_the_best_rate_below_one_that_diverged_is_the_one_that_was_tried() -> None:
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    base = Valley(Size(32, 2), rates, (2.3, 2.2, 2.1, math.inf))
    wide = Valley(Size(64, 2), rates, (2.3, 2.2, math.inf, math.nan))
    assert (base.best, wide.best) == (4e-3, 2e-3)
    rows = table([Transfer("mup", "width", (base, wide))])
    assert "4.00e-03 (the next rate diverged)" in rows[2] and "moves by 2.0 steps" in rows[-1]
    assert math.isnan(Valley(Size(32, 2), rates, (2.3, math.inf, math.nan, math.nan)).best)
    assert math.isnan(Valley(Size(32, 2), rates, (math.nan, math.nan, 2.2, 2.1)).best)


def test_what_a_run_diverged_with_is_no_missing_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of(TINY, [], parametrizations=["mup"], widths=[32, 64], depths=[],
                       rates=[1e-3, 2e-3, 4e-3], seeds=1)
    losses = {point.run.name: {1e-3: 2.0, 2e-3: math.nan}[point.rate]
              for point in points if point.rate < 4e-3}
    monkeypatch.setattr(transfer_module, "_losses", lambda *_: losses)
    [found] = read_transfers(points, tmp_path)
    assert found.valleys[0].losses[:2] == (2.0, math.inf)
    assert math.isnan(found.valleys[0].losses[2])


def test_parametrizations_share_the_runs_of_the_base() -> None:
    points = points_of(TINY, [], parametrizations=["standard", "completep"], widths=[32, 64],
                       depths=[2, 4], rates=[1e-3, 2e-3], seeds=1)
    assert len(points) == 2 * 3 * 2
    assert len({point.run.name for point in points}) == 2 * (1 + 2 * 2)
    wide = next(point.run for point in points if point.run.name.startswith("completep-64x2"))
    assert {"model.parametrization=completep", "model.base_embed_dim=32",
            "model.base_num_layers=2"} < {*wide.overrides}


def test_the_search_ends_once_the_best_rate_has_worse_neighbours() -> None:
    """Against the minimum over the whole grid; a high rate diverges."""
    rates = parse_rates("1e-3:3.2e-2")
    points = points_of(TINY, [], parametrizations=["standard", "mup"], widths=[32, 64, 128],
                       depths=[], rates=rates, seeds=2)
    runs = {point.run.name: point for point in points}

    def loss(point: Point) -> float:
        best = 8e-3 if point.parametrization == "mup" else 8e-3 * 32 / point.size.embed_dim
        return math.nan if point.rate > 2e-2 else math.log(point.rate / best) ** 2

    known: dict[str, float] = {}
    while found := wanted(points, known):
        assert not {run.name for run in found} & {*known}
        known |= {run.name: loss(runs[run.name]) for run in found}
    for name in ("standard", "mup"):
        for width in (32, 64, 128):
            own = [point for point in points if point.parametrization == name
                   and point.size.embed_dim == width]
            best = min((x for x in own if x.rate < 2e-2), key=loss).rate
            at = rates.index(best)
            assert {*rates[max(at - 1, 0): at + 2]} <= {
                point.rate for point in own if point.run.name in known}
    assert len(known) < 0.7 * len(runs)


def test_a_line_is_flat_if_all_that_is_judged_is() -> None:
    def line(last: float) -> Line:
        return Line("mup", "width", (32, 64), {
            name: [[1.0, 1.0], [1.0, last if name == "change of logits" else 1.0]]
            for name in (*JUDGED, *OF_WIDTH)})

    assert line((1 + FLAT) ** 1.9).is_flat and not line((1 + FLAT) ** 2.1).is_flat


def test_a_result_is_kept_for_one_version_and_its_data(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(coordinates, "observe", lambda recipe, train: measured.append(
        recipe.model.embed_dim) or {name: np.ones(2) for name in (*JUDGED, *OF_WIDTH)})

    def check(*more: str) -> int:
        overrides = [item.removeprefix("--config.") for item in SYNTHETIC]
        coordinates.coordinate_check(
            TINY, [*overrides, *more], tmp_path, parametrizations=["mup"], widths=[32, 128],
            depths=[], steps=1, seeds=1)
        return len(measured)

    assert check() == check() == 2
    file = tmp_path / "coordinates.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # a kill has cut the last line off
    assert check() == check() == 3
    monkeypatch.setattr(lmjax, "__version__", "another")
    assert check() == 5
    assert check("data.seed=1") == 7
    assert measured == [32, 128, 128, 32, 128, 32, 128]


@pytest.mark.slow
def test_activations_keep_their_size_only_where_they_should(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["scale", "coord-check", "--config", TINY, "--workdir", str(tmp_path), *SYNTHETIC,
               "--config.optimizer.peak_lr=3e-3", "--config.optimizer.groups=[]",
               "--config.model.tie_embeddings=true"]
    assert main([*command, "--widths", "64", "128", "256", "--parametrizations", "mup"]) == 0
    assert main([*command, "--widths", "64", "128", "256", "--parametrizations", "standard"]) == 1
    found = json.loads((tmp_path / "coord_check.json").read_text())
    assert found[0]["deviation"]["change of logits"] > 0.5
    assert (tmp_path / "coord_check.png").stat().st_size > 10_000
    assert "standard is not flat in width" in capsys.readouterr().out
