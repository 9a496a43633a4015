"""The benchmarks compare the same model with the same work on both sides."""

import json

import jax
import numpy as np
import pytest

from lmjax.benchmarks import generate as bench_generate
from lmjax.config import load
from lmjax.data.objectives import Objective
from lmjax.data.rows import Pieces
from lmjax.models.model import build_model
from lmjax.training.recipe import build_recipe
from lmjax.tree import num_elements

ONE = jax.devices()[:1]
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"


@pytest.mark.slow
def test_generation_beside_transformers_gives_the_same_tokens(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    monkeypatch.setattr(jax, "local_devices", lambda *args: ONE)
    for name, value in dict(PROMPT=8, NEW=16, BATCHES=(1, 2)).items():
        monkeypatch.setattr(bench_generate, name, value)
    # Runs the work of the timed process in this one, where it is compiled already.
    monkeypatch.setattr(bench_generate, "_ready",
                        lambda path: bench_generate.main([str(path)]) or 1.0)
    small = ("num_layers=2", "embed_dim=32", "num_heads=4", "num_kv_heads=4", "mlp_dim=64",
             "vocab_size=64", "init_std=0.3")
    recipe = build_recipe(load("configs/bench.py:gpt2-small", [f"model.{item}" for item in small]))
    report = bench_generate.bench_generate(recipe, seconds=0.0, out=str(tmp_path / "figures.json"))
    assert [report["batches"][b]["same_tokens"] for b in (1, 2)] == [1.0, 1.0]
    for row in report["batches"].values():
        assert row["rounds"] == 3 and row["speed_beside_transformers"] > 0
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["batches"]["2"] == report["batches"][2]
    assert "transformers" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert", "t5", "moe"])
def test_the_train_step_beside_ours_is_of_the_same_model(name):
    """It has as many parameters, and it takes the same batch."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    from lmjax.benchmarks.torch_step import torch_model, torch_step

    recipe = build_recipe(load(f"configs/{name}.py:tiny", []))
    objective = Objective(recipe.data.objective, seq_len=recipe.data.seq_len, vocab_size=400)
    model = build_model(recipe.model, vocab_size=objective.vocab_size, platform="cpu",
                        dtype="float32")
    torch.manual_seed(0)
    theirs = torch_model(model.config, recipe.data.seq_len, "cpu")
    assert sum(p.numel() for p in theirs.parameters()) == num_elements(model.shapes)
    flat = np.random.default_rng(0).integers(2, 400, 400)
    pieces = Pieces(flat, np.int64([0, 200]), np.int64([50, 50]), np.int64([0, 1]),
                    np.uint64([1, 2]))
    rows = objective.rows(pieces, 2, (0, 1), words=(np.ones(400, bool),) * 2)
    torch_step(model.config, rows, dtype="float32", platform="cpu", compiled=False)(1)
