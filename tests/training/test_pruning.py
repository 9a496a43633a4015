"""`config.pruning`: zeros by the cubic schedule, which a run keeps and a resumed run repeats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import assert_same_run, finish, finish_after_a_kill

import lmjax
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.models.packing import TABLES, as_matrix, matrices
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.table import make_optimizer
from lmjax.training.pruning import PruningConfig, gradual_pruning
from lmjax.training.recipe import build_recipe
from lmjax.tree import named_leaves

SIZES = dict(num_layers=2, scan_layers=True, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24,
             vocab_size=32)


def zeros_of(functional, params):
    """Path -> the zeros of every output of a matrix that is pruned."""
    return {path: np.asarray(jnp.sum(as_matrix(dict(named_leaves(params))[path], how) == 0, -1))
            for path, how in matrices(functional).items() if path not in TABLES}


@pytest.mark.long
def test_the_share_is_reached_even_if_its_step_is_skipped():
    """A step at fault leaves the weights as they were; the counts of steps go on."""
    model = build_model(DecoderConfig(**{**SIZES, "num_layers": 1}), vocab_size=32, platform="cpu",
                        dtype=jnp.float32)
    config, steps = PruningConfig(weights=0.5, start=2, end=8, every=100), 11
    tx = gradual_pruning(config, steps, model.functional)
    params = jax.tree.map(lambda s: jnp.sin(jnp.arange(math.prod(s.shape)) + 1.0).reshape(s.shape),
                          model.shapes)
    nothing, state, update = jax.tree.map(jnp.zeros_like, params), tx.init(params), jax.jit(
        tx.update)
    for step in range(steps):
        updates, state = update(nothing, state, params)
        params = params if step == 8 else optax.apply_updates(params, updates)
    for path, zeros in zeros_of(model.functional, params).items():
        inputs = dict(named_leaves(params))[path].size // zeros.size
        assert set(zeros.flat) == {inputs // 2}, path


@pytest.mark.long
def test_zeros_follow_the_schedule_and_are_the_smallest():
    model = build_model(DecoderConfig(**SIZES), vocab_size=32, platform="cpu", dtype=jnp.float32)
    config, steps = PruningConfig(weights=0.5, start=2, end=8, every=3), 10
    optimizer = OptimizerConfig(name="sgd", peak_lr=1e-3, schedule="constant", warmup_steps=0)
    tx = optax.chain(make_optimizer(optimizer, steps, model.axes, keep_zeros=True),
                     gradual_pruning(config, steps, model.functional))
    params = jax.jit(model.init)(jax.random.key(0))
    state, update = tx.init(params), jax.jit(tx.update)
    grads = jax.tree.map(lambda p: jnp.sin(100 * p), params)
    share = 0.0
    for step in range(steps):
        updates, state = update(grads, state, params)
        before, params = params, optax.apply_updates(params, updates)
        if step in (2, 5, 8):
            share = 0.5 * (1 - (1 - (step - 2) / 6) ** 3)
        for path, zeros in zeros_of(model.functional, params).items():
            inputs = dict(named_leaves(params))[path].size // zeros.size
            assert set(zeros.flat) == {round(share * inputs)}, (path, step)
    assert share == 0.5
    path = next(iter(zeros_of(model.functional, params)))
    how = matrices(model.functional)[path]
    last, first = (as_matrix(dict(named_leaves(p))[path], how) for p in (params, before))
    np.testing.assert_array_equal(last == 0, first == 0)  # after `end`, the same ones
    assert float(jnp.mean(dict(named_leaves(params))["embedding/table"] == 0)) == 0


@pytest.mark.parametrize("keys, message", [
    (dict(pruning=dict(weights=1.0)), "pruning.weights: expected a share from 0 to below 1"),
    (dict(pruning=dict(weights=0.5, start=60, end=20)), "start < end < train.steps=100"),
    (dict(pruning=dict(weights=0.5), adapter=dict(kind="lora")), "0 with adapters"),
    (dict(pruning=dict(weights=0.5), optimizer=dict(ema_decay=0.9)), "optimizer.ema_decay"),
])
def test_refusals(keys, message):
    with pytest.raises(UserError, match=message):
        build_recipe({"train": dict(steps=100), **keys})


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_the_same_zeros(tmp_path):
    """On a mesh, with zeros that are half of every output from the tenth step on."""
    keys = ("pruning.weights=0.5", "pruning.end=10", "pruning.every=2", "train.steps=20",
            "checkpoint.every=4", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    finish(tmp_path / "straight", *keys, devices=8)
    finish_after_a_kill(tmp_path / "killed", *keys, devices=8)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    lm = lmjax.load(tmp_path / "killed")
    for path, zeros in zeros_of(lm.model.functional, lm.params).items():
        inputs = dict(named_leaves(lm.params))[path].size // zeros.size
        assert set(zeros.flat) == {round(0.5 * inputs)}, path
