"""Every mesh axis, alone and with others, gives the losses and gradients of one device."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.config import build
from lmjax.models.model import FAMILY_MODULES, build_model
from lmjax.planning.costs import step_costs
from lmjax.planning.hlo import parse
from lmjax.sharding import MESH_AXES, MeshConfig, make_layout
from lmjax.tasks.losses import next_token_loss
from lmjax.training.state import state_spec
from lmjax.training.step import make_train_step
from lmjax.tree import named_leaves

pytestmark = pytest.mark.long

FAMILY = {family.__name__: config for config, family in FAMILY_MODULES.items()}
MOE = dict(experts=4, per_token=2, balance_loss=0.1, z_loss=0.01)
SMALL = dict(num_layers=4, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=16, vocab_size=32,
             init_std=0.2)


def packed_batch(rows=16, length=8):
    """Two documents and padding per row; the mask gives the microbatches different weights."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (rows, length + 1), dtype=np.int32)
    cut, at = rng.integers(2, length - 2, (rows, 1)), np.arange(length)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
             "segment_ids": np.where(at >= length - 1, 0, 1 + (at >= cut)).astype(np.int32),
             "positions": np.where(at >= cut, at - cut, at).astype(np.int32),
             "loss_mask": ((at < length - 1) & (rng.random((rows, length)) < 0.8)).astype(
                 np.float32)}
    return batch | {f"encoder_{name}": batch[name]
                    for name in ("tokens", "segment_ids", "positions")}


def program(mesh, family="Decoder", microbatches=2, **keys):
    """(train step, state, batch) of a model on `mesh`, axis -> devices."""
    config = MeshConfig(**{"data": 1, **mesh})
    size = math.prod(getattr(config, axis) for axis in MESH_AXES)
    layout = make_layout(config, jax.devices()[:size])
    model = build_model(build(FAMILY[family], SMALL | keys), vocab_size=32, platform="cpu",
                        dtype=jnp.float32)
    # The state of this optimizer is the last gradient.
    spec = state_spec(model, optax.trace(0.0), layout, ema=False)
    run = make_train_step(next_token_loss(model), spec, layout, lambda step: 0.0, seed=0,
                          microbatches=microbatches)
    sharding = layout.sharding(("batch", "seq"))
    return run, spec, {name: jax.device_put(x, sharding) for name, x in packed_batch().items()}


def step(mesh, **keys):
    """(metrics, gradients) of a train step, dropout included."""
    run, spec, batch = program(mesh, **keys)
    state, metrics = run(spec.init(0), batch)
    return jax.device_get((metrics, state.opt_state.trace))


# What each model has that a mesh could get wrong.
MODELS = {
    "dense": dict(layer_pattern=("local", "global"), sliding_window=3, qk_norm=True),
    "dropless": dict(moe=MOE, dropout=0.1, positions="learned", max_positions=8),
    "capacity": dict(moe=MOE | {"capacity": 1.0}, tie_embeddings=True),
    "encdec": dict(family="EncDec", dropout=0.1, positions="relative", num_kv_heads=0),
    "encoder": dict(family="Encoder", norm_position="post", embedding_norm="own"),
}


@functools.cache
def on_one_device(model, microbatches):
    return step({}, microbatches=microbatches, **MODELS[model])


def assert_same(mesh, model, microbatches=2, **keys):
    """Checks that `model` on `mesh` computes what it does on one device.

    keys: further settings, which change no result.
    """
    one, one_grads = on_one_device(model, microbatches)
    metrics, grads = step(mesh, microbatches=microbatches, **MODELS[model], **keys)
    for name, value in one.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for (name, a), b in zip(named_leaves(grads), jax.tree.leaves(one_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=name)


TRIPLES = [  # which hold every pair of axes
    ("data", "stage", "fsdp", "dense", dict(remat="full")),
    ("data", "stage", "context", "dense", dict(attention="ring")),
    ("fsdp", "context", "tensor", "dense", dict(attention="chunked")),
    ("data", "expert", "tensor", "dropless", dict(remat="dots")),
    ("stage", "expert", "tensor", "dropless", {}),
    ("fsdp", "expert", "context", "capacity", {}),
]
DEFAULT = [{"stage", "expert", "tensor"}, {"fsdp", "expert", "context"}]


def test_the_triples_hold_every_pair():
    held = {frozenset(pair) for *axes, _, _ in TRIPLES for pair in itertools.combinations(axes, 2)}
    assert held == {frozenset(pair) for pair in itertools.combinations(MESH_AXES, 2)}


@pytest.mark.parametrize("a, b, c, model, keys", [
    pytest.param(*triple, marks=() if set(triple[:3]) in DEFAULT else pytest.mark.slow)
    for triple in TRIPLES])
def test_three_axes_at_a_time_compute_what_one_device_does(a, b, c, model, keys):
    assert_same({a: 2, b: 2, c: 2}, model, **keys)


ALONE = [("data", 8, "dense", {}), ("fsdp", 8, "dense", {}), ("tensor", 2, "dense", {}),
         ("tensor", 4, "encdec", {}),
         ("context", 4, "dense", dict(attention="ring")), ("context", 8, "encoder", {}),
         ("expert", 4, "dropless", {}),
         ("stage", 2, "dense", {})]


@pytest.mark.parametrize("axis, ways, model, keys", [
    pytest.param(*case, marks=() if case[0] == "tensor" else pytest.mark.slow) for case in ALONE])
def test_an_axis_alone_computes_what_one_device_does(axis, ways, model, keys):
    assert_same({axis: ways}, model, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, model", [
    ({"stage": 2, "data": 2}, "encdec"), ({"stage": 2, "data": 2}, "encoder"),
    ({"fsdp": 2, "context": 2, "tensor": 2}, "encdec"),
    ({"fsdp": 2, "context": 2, "tensor": 2}, "encoder")])
def test_the_other_families_go_over_any_axes_too(mesh, model):
    assert_same(mesh, model)


def test_what_is_kept_in_the_hosts_memory_changes_nothing():
    assert_same({"fsdp": 2}, "dense", remat="query+host:out")


def test_stages_that_would_cut_the_pattern_are_refused():
    with pytest.raises(ValueError, match="mesh.stage: expected 4 stages of whole repetitions .*; "
                       "change"):
        step({"stage": 4}, **MODELS["dense"])


# --- what is sent

# name -> mesh, model, keys, the collectives that it needs, and those that it must not have
STRATEGIES = {
    "data": (dict(data=2), "dense", {}, {"all-reduce"},
             {"all-gather", "reduce-scatter", "all-to-all"}),
    "fsdp": (dict(fsdp=2), "dense", {}, {"all-gather", "reduce-scatter"}, {"collective-permute"}),
    "tensor": (dict(tensor=2), "dense", {}, {"all-reduce"}, {"all-to-all", "reduce-scatter"}),
    "ring": (dict(context=2), "dense", dict(attention="ring"), {"collective-permute"},
             {"all-to-all"}),
    "capacity": (dict(expert=2), "capacity", {}, {"all-to-all"}, {"collective-permute"}),
    "dropless": (dict(expert=2), "dropless", {}, {"all-gather", "reduce-scatter"},
                 {"collective-permute"}),
    "stage": (dict(stage=2), "dense", {}, {"collective-permute"}, {"all-gather", "all-to-all"}),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("fsdp", "capacity", "stage") else pytest.mark.slow)
    for name in STRATEGIES])
def test_a_strategy_sends_what_it_should(name):
    mesh, model, keys, needed, forbidden = STRATEGIES[name]
    run, spec, batch = program(mesh, **MODELS[model], **keys)
    found = step_costs(parse(run.lower(spec.shapes, batch).compile().as_text()), 2).collectives
    kinds = {c.kind for c in found}
    assert needed <= kinds and not forbidden & kinds, found
    if name == "stage":  # in each of M + S - 1 steps: a microbatch forward, its derivative back
        hops = [c for c in found if c.kind == "collective-permute" and "roll" in c.op_name]
        assert {(c.times, c.bytes) for c in hops} == {(2 + 2 - 1, 8 * 8 * 16 * 4)}
        assert len(hops) <= 3
    whole = 16 * 8 * 32 * 4  # the logits of all rows, or the gradient of them
    assert max(c.bytes for c in found) < whole


@pytest.mark.parametrize("rules, length", [({}, 4), ({"stream_seq": ("context",)}, 8)])
def test_the_stream_between_layers_is_split_by_tensor(rules, length):
    """Sequence parallelism: each device keeps half of [layers, rows, T, D] for remat."""
    run, spec, batch = program({"tensor": 2, "rules": rules}, microbatches=1, remat="full",
                               embed_dim=24, num_layers=3)
    text = run.lower(spec.shapes, batch).compile().as_text()
    assert set(re.findall(r"f32\[3,16,(\d+),24\]", text)) == {str(length)}
