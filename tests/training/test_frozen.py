"""Frozen parameters: no gradient, no optimizer state, unchanged by steps and by a resumed run."""

import math
import re

import jax
import numpy as np
import pytest
from processes import (
    assert_same_run,
    finish,
    finish_after_a_kill,
    one_line,
    run_here,
)

import lmjax
from lmjax.config import load
from lmjax.data.pipeline import open_splits
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe
from lmjax.tree import named_leaves, num_bytes

SYNTHETIC = "configs/synthetic.py:tiny"
FROZEN = "^embedding/|attention/"
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def made(devices=1, **settings):
    """(program, a batch) of configs/synthetic.py:tiny with these settings."""
    overrides = [f"{key}={value}" for key, value in settings.items()]
    recipe = build_recipe(load(SYNTHETIC, overrides))
    split = open_splits(recipe.data)[0]
    program = make_program(recipe, jax.devices()[:devices], vocab_size=split.vocab_size,
                           fields=split.fields)
    rows = split.rows(np.arange(recipe.train.batch_size))
    return program, {name: jax.device_put(rows[name], x.sharding)
                     for name, x in program.batch.items()}


def stepped(devices=1, **settings):
    """(the state before, the state after, the metrics) of one step, on the host."""
    program, batch = made(devices, **settings)
    state = program.spec.init(3)
    before = jax.device_get(state)
    return before, *jax.device_get(program.traced.lower().compile()(state, batch))


@pytest.mark.long
def test_frozen_parameters_have_no_gradient_and_the_others_move_as_if_nothing_were_frozen():
    settings = {"optimizer.name": "sgd", "optimizer.clip_norm": 0, "optimizer.weight_decay": 0}
    before, after, metrics = stepped(**settings, **{"train.frozen": FROZEN})
    _, free, free_metrics = stepped(**settings)
    paths = [path for path, _ in named_leaves(free.params)]
    assert [path for path, _ in named_leaves(after.frozen)] == [
        path for path in paths if re.search(FROZEN, path)]
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    everything = dict(named_leaves(free.params))
    assert len(everything) == len(jax.tree.leaves((after.params, after.frozen)))
    for path, leaf in named_leaves(after.params):
        np.testing.assert_allclose(leaf, everything[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert metrics["loss"] == pytest.approx(free_metrics["loss"], rel=1e-6)
    assert 0 < metrics["grad_norm"] < free_metrics["grad_norm"]
    # One momentum per trained parameter and none per frozen one.
    assert num_bytes(after.opt_state) == num_bytes(after.params) + 4, "a momentum and a count"


@pytest.mark.long
def test_the_compiled_step_passes_frozen_arrays_through_in_place():
    program, _ = made(**{"train.frozen": FROZEN})
    compiled = program.traced.lower().compile()
    state = num_bytes(program.spec.shapes)
    assert compiled.memory_analysis().alias_size_in_bytes == state
    free = made()[0].traced.lower().compile()
    # The gradients of a layer's four frozen matrices [32, 32] are not computed for the 512 tokens.
    # The compiler counts the loop over layers once.
    saved = free.cost_analysis()["flops"] - compiled.cost_analysis()["flops"]
    assert saved >= 2 * (16 * 32) * 4 * 32 * 32


@pytest.mark.long
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_mesh_gives_the_losses_of_one_device(microbatches):
    settings = {"train.frozen": FROZEN, "train.microbatches": microbatches}
    _, one, metrics = stepped(**settings)
    _, many, on_mesh = stepped(math.prod(MESH.values()), **settings, **MESH)
    assert on_mesh["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert on_mesh["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 many, one)


@pytest.mark.parametrize("frozen, message", [
    ("(", r"frozen: expected a regular expression, got '\(' \("),
    ("mpl/", "config.train.frozen: expected a regular expression for some .* 'mpl/', which none"),
    (".", "config.train.frozen: .* got '.', which all of them match; change it"),
])
def test_a_wrong_expression_is_refused_before_anything_is_compiled(frozen, message, tmp_path,
                                                                   capsys, monkeypatch):
    monkeypatch.setattr("lmjax.training.loop._compile", lambda *args: pytest.fail("compiled"))
    assert run_here(tmp_path / "run", f"train.frozen={frozen}") == 2
    assert re.search(message, one_line(capsys.readouterr().err))


@pytest.mark.long
@pytest.mark.slow
def test_killed_and_resumed_ends_as_one_that_never_was(tmp_path):
    options = ["train.steps=24", "optimizer.warmup_steps=1", "checkpoint.every=4", "eval.every=24",
               "optimizer.ema_decay=0.9", f"train.frozen={FROZEN}"]
    finish(tmp_path / "straight", *options)
    finish_after_a_kill(tmp_path / "run", *options)
    assert_same_run(tmp_path / "straight", tmp_path / "run", ["metrics.jsonl"])
    # A checkpoint holds the whole model, whose frozen parameters are those of the first state.
    program, _ = made()
    for ema in (True, False):
        params = dict(named_leaves(lmjax.load(tmp_path / "run", ema=ema).params))
        for path, leaf in named_leaves(jax.jit(program.model.init)(jax.random.key(0))):
            same = np.array_equal(params[path], leaf)
            assert same == bool(re.search(FROZEN, path)), path
