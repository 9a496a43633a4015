"""Every shipped config, shrunk, learns, and learns alike on one device and on a mesh of eight."""

import dataclasses
import functools
import json
import sysconfig

import jax
import numpy as np
import pytest

from lmjax.config import load
from lmjax.data.pipeline import open_splits
from lmjax.sharding import MeshConfig
from lmjax.training.loop import train
from lmjax.training.recipe import build_recipe

# Each config with overrides with which it learns in seconds, on a mesh that splits heads in two.
CONFIGS = {
    "quickstart": ["train.steps=60", "model.num_kv_heads=2"], "moe": [], "latent": [],
    "bert": [], "t5": [], "bart": []}
ONE = jax.devices()[:1]
LAST = 10  # steps whose losses are compared with the baseline
SAME = 8  # steps after which rounding may have grown


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    """The recipe of a config, on one small corpus that is prepared once per vocabulary size."""
    folder = tmp_path_factory.mktemp("pretraining")

    @functools.cache
    def of(name):
        mapping = load(f"configs/{name}.py:tiny", [
            f"data.sources.0.uri=text:{sysconfig.get_paths()['stdlib']}/json/*.py",
            "data.heldout_fraction=0.1",
            "eval.every=0", "sample.every=0", "checkpoint.every=1000", *CONFIGS[name]])
        mapping["data"]["directory"] = str(folder / str(mapping["data"]["tokenizer"]["vocab_size"]))
        return build_recipe(mapping)

    return of


def losses(recipe, workdir):
    train(recipe, workdir, log=lambda line: None)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([r["loss"] for r in records if "loss" in r])


def unigram(recipe):
    """Returns the cross-entropy of the last steps' targets under the frequencies of all targets.

    A model that knows these frequencies from the start and looks at no token has this loss.
    """
    split, _ = open_splits(recipe.data, recipe.data.directory)
    steps, size = recipe.train.steps, recipe.train.batch_size

    def targets(first, last):
        rows = split.rows(np.arange(first * size, last * size))
        return rows["targets"][rows["loss_mask"] > 0]

    every, last = targets(0, steps), targets(steps - LAST, steps)
    return float(-np.log(np.bincount(every)[last] / len(every)).mean())


def names(*fast):
    """The configs, of which only these are trained where every second counts."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in CONFIGS])


@pytest.mark.long
@names("bert")
def test_a_shipped_config_beats_its_unigram_baseline(recipe_of, name, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *args: ONE)
    recipe = recipe_of(name)
    found = losses(recipe, tmp_path / "run")
    assert len(found) == recipe.train.steps
    assert found[-LAST:].mean() < unigram(recipe) < found[0]


@names()
def test_a_shipped_config_trains_alike_on_a_mesh(recipe_of, name, tmp_path, monkeypatch):
    recipe = recipe_of(name)
    assert recipe.model.dims.num_kv_heads % 2 == 0
    assert recipe.train.compute_dtype == "auto"  # float32 on a CPU
    short = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, steps=SAME),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=dataclasses.replace(recipe.optimizer, warmup_steps=2))
    meshed = losses(short, tmp_path / "mesh")
    monkeypatch.setattr(jax, "devices", lambda *args: ONE)
    alone = losses(dataclasses.replace(short, mesh=MeshConfig()), tmp_path / "alone")
    np.testing.assert_allclose(meshed, alone, rtol=1e-5)
    assert alone[-1] < alone[0]
