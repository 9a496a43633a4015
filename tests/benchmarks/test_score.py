"""The benchmark of scoring measures each piece of work beside the logits of the same rows."""

import itertools
import json

import pytest

from lmjax.benchmarks import score as bench_score
from lmjax.benchmarks.rounds import Turn, in_turn
from lmjax.cli.main import main

TINY = ("num_layers=1", "embed_dim=16", "num_heads=2", "mlp_dim=16", "vocab_size=64")


def test_scores_are_measured_beside_logits(monkeypatch, tmp_path, capsys):
    for name, value in dict(LENGTH=20, BATCHES=(1, 2), END=2, TURN=0.001).items():
        monkeypatch.setattr(bench_score, name, value)
    out = tmp_path / "figures.json"
    assert main(["bench", "score", "--config", "configs/bench.py", "--seconds", "0.01", "--out",
                 str(out), *(f"--config.model.{item}" for item in TINY)]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    scores = {"score 20 tokens x 1", "score 20 tokens x 2", "score the last 2 of 20 x 1"}
    assert set(report["beside_logits"]) == scores
    assert set(report["seconds"]) == scores | {"logits 20 tokens x 1", "logits 20 tokens x 2"}
    assert report["vocabulary"] == 64 and report["unit"] == "CPU s" and report["rounds"] >= 3
    assert all(value > 0 and name in printed for name, value in report["seconds"].items())
    assert all(f"{value:.2f}" in printed for value in report["beside_logits"].values())


def test_an_encoder_is_refused_before_it_is_made(capsys):
    assert main(["bench", "score", "--config", "configs/bert.py:tiny"]) == 2
    assert "--config: expected a decoder" in capsys.readouterr().err


@pytest.mark.parametrize("amount", [1, 4])
def test_a_turn_is_timed_by_the_clock_that_is_passed(amount):
    """Here each look at the clock adds 8 seconds, whatever the time."""
    ticks = itertools.count(step=8)
    times = in_turn([Turn("a", lambda: None, amount), Turn("b", lambda: None)], 0.0,
                    lambda: float(next(ticks)))
    assert times == {"a": [8.0 / amount] * 3, "b": [8.0] * 3}
