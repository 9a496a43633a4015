"""`lmjax bench pruning`: every way trained and measured once, in a table and a picture."""

import json
from pathlib import Path

import pytest

from lmjax.benchmarks.pruning import table
from lmjax.cli.main import main


def test_the_table_compares_with_the_dense_run() -> None:
    def line(way, kind, perplexity, **more):
        return {"way": way, "kind": kind, "perplexity": perplexity, "nonzero": 2_000_000,
                "flops": 5.0, "steps": 10, **more}

    lines = table([line("nothing", "dense", 10.0), line("layers=1", "pruned", 11.0, flops=4.0),
                   line("layers=1", "alone", 12.0, steps=1000)])
    assert lines[2] == "| nothing | 2.00 | 100% | 10 | 10.00 | +0.0% |"
    assert lines[3] == "| layers=1 | 2.00 | 80% | 10 | 11.00 | +10.0% |"
    assert lines[4] == "| layers=1, the same shape alone | 2.00 | 100% | 1,000 | 12.00 | +20.0% |"


@pytest.mark.slow
def test_every_way_is_run_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = ["--config", "configs/quickstart.py:tiny", "--config.train.steps=6",
              "--config.optimizer.warmup_steps=0", "--config.data.heldout_fraction=0.2",
              '--config.data.sources=[{"name": "short", "uri": "text:examples/*.py"}]']
    assert main(["train", *config, "--workdir", str(tmp_path / "dense")]) == 0
    texts = tmp_path / "text.txt"
    texts.write_text(Path("lmjax/nn/moe.py").read_text())

    def bench(steps: int = 4) -> int:
        return main(["bench", "pruning", *config, "--run", str(tmp_path / "dense"), "--work",
                     str(tmp_path / "work"), "--steps", str(steps), "--texts", str(texts),
                     "--ways", "weights=0.5", "layers=1", "mlp=0.5"])

    assert bench() == 0
    file = tmp_path / "work" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["way"], line["kind"]) for line in lines] == [
        ("nothing", "dense"), ("weights=0.5", "pruned"), ("weights=0.5", "gradual"),
        ("layers=1", "pruned"), ("mlp=0.5", "pruned"), ("layers=1", "alone"), ("mlp=0.5", "alone")]
    dense, sparse, gradual, layers, _, alone, _ = lines
    assert sparse["nonzero"] == gradual["nonzero"] < dense["nonzero"]
    assert alone["nonzero"] == layers["nonzero"] < dense["nonzero"]
    # As many FLOPs as the dense run's 6 steps and the 4 that followed.
    spent = 6 * dense["flops"] + 4 * layers["flops"]
    assert abs(alone["steps"] * alone["flops"] - spent) <= alone["flops"] / 2
    assert (tmp_path / "work" / "curves.png").stat().st_size > 10_000
    assert bench() == 0 and file.read_text().count("\n") == len(lines)
    capsys.readouterr()
    assert bench(steps=5) == 2
    assert "name another --work" in capsys.readouterr().err
