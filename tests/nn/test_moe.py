"""Mixture of experts against a loop over tokens: outputs, dropped choices, losses and counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.model import build_model
from lmjax.nn.losses import Loss, with_experts
from lmjax.nn.module import functional, normal
from lmjax.nn.moe import MoE, block_rows, sort_into_blocks
from lmjax.nn.routing import MoEConfig
from lmjax.sharding import MeshConfig, make_layout
from lmjax.tasks.losses import next_token_loss
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.optim.table import make_optimizer
from lmjax.training.state import state_spec
from lmjax.training.step import make_train_step

B, T, D, F, E = 2, 9, 8, 12, 4
REAL = np.arange(T) < np.array([[9], [6]])


def moe_of(kind="swiglu", **keys):
    config = MoEConfig(experts=E, **keys)
    init = normal(1.0)
    return config, functional(
        lambda rngs: MoE(D, F, config, kind=kind, init=init, out_init=init, rngs=rngs))


@functools.cache
def run(**keys):
    """(config, parameters, x, y, routing)"""
    config, module = moe_of(**keys)
    params = module.init(jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (B, T, D)))
    y, routing = jax.jit(lambda p, x: module.bind(p)(x, jnp.asarray(REAL)))(params, x)
    return config, *jax.tree.map(np.asarray, (params, x, y, routing))


def expert(params, e, x):
    gate, up = x @ params["gate"]["kernel"][e], x @ params["up"]["kernel"][e]
    if "bias" not in params["up"]:
        return (gate / (1 + np.exp(-gate)) * up) @ params["down"]["kernel"][e]
    gate, up = gate + params["gate"]["bias"][e], up + params["up"]["bias"][e]
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return hidden @ params["down"]["kernel"][e] + params["down"]["bias"][e]


def by_hand(config, params, x, rooms=None):
    """(y, choices [B, T, k], which of them got a slot, probabilities, logits), token by token."""
    logits = x @ params["router"]["kernel"] + params["router"].get("bias", 0)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choices = np.argsort(-probs, axis=-1)[..., : config.per_token]
    y, found = np.zeros_like(x), np.zeros(choices.shape, bool)
    for b in range(B):
        taken = np.zeros(E, int)
        for j in range(config.per_token):  # all first choices come before all second choices
            for t in range(x.shape[1]):
                e = choices[b, t, j]
                if rooms is not None and (taken[e] >= rooms or not REAL[b, t]):
                    continue
                taken[e] += 1
                found[b, t, j] = True
                total = probs[b, t, choices[b, t]].sum() if config.normalize else 1.0
                y[b, t] += probs[b, t, e] / total * expert(params, e, x[b, t])
    return y, choices, found, probs, logits


@pytest.mark.parametrize("keys", [
    dict(per_token=2), dict(per_token=3, normalize=False),
    pytest.param(dict(per_token=1), marks=pytest.mark.long)])
def test_dropless_is_a_loop_over_tokens(keys):
    config, params, x, y, _ = run(**keys)
    expected = by_hand(config, params, x)[0]
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("keys, length", [
    (dict(), T), (dict(), 128), (dict(capacity=0.75), T)], ids=["grouped", "blocks", "capacity"])
def test_clamped_experts_with_biases_are_a_loop_over_tokens(keys, length, monkeypatch):
    monkeypatch.setitem(globals(), "REAL", np.ones((B, length), bool))
    config, module = moe_of("swiglu_clamped", bias=True, per_token=2, **keys)
    leaves, tree = jax.tree.flatten(module.shapes)
    keys_ = jax.random.split(jax.random.key(0), len(leaves))
    params = jax.tree.unflatten(tree, [jax.random.normal(key, leaf.shape)
                                       for key, leaf in zip(keys_, leaves, strict=True)])
    x = 2 * jax.random.normal(jax.random.key(1), (B, length, D))
    y, _ = jax.jit(lambda p, x: module.bind(p)(x, jnp.ones((B, length), bool)))(params, x)
    params, x = jax.tree.map(np.asarray, (params, x))
    rooms = 4 if config.capacity else None
    expected = by_hand(config, params, x, rooms)[0]
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.long
@pytest.mark.parametrize("M, E, absent", [(64, 1, 0), (300, 3, 0), (512, 8, 100), (4096, 8, 0)])
def test_blocks_hold_every_choice_once_and_one_expert_each(M, E, absent):
    """absent: choices of other devices' experts, which are sorted last."""
    rng = np.random.default_rng(M)
    # An uneven load, often with an expert that no token chose.
    chosen = np.sort(np.minimum(rng.geometric(0.4, M) - 1, E - 1))
    chosen[M - absent:] = E
    sizes, order = np.bincount(chosen, minlength=E)[:E], rng.permutation(M)
    filled, expert = sort_into_blocks(jnp.asarray(order), jnp.asarray(sizes), block_rows(M, E))
    blocks = np.asarray(filled).reshape(len(expert), -1)
    held = {int(choice): int(e)
            for row, e in zip(blocks, expert, strict=True) for choice in row if choice < M}
    own = M - absent
    assert held == dict(zip(order[:own].tolist(), chosen[:own].tolist(), strict=True))
    assert (blocks < M).sum() == own


@pytest.mark.parametrize("per_token", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_cpu_computes_the_same_in_blocks_as_by_ragged_dot(per_token, monkeypatch):
    _, module = moe_of(per_token=per_token)
    params = module.init(jax.random.key(0))
    x, g = jax.random.normal(jax.random.key(1), (2, 4, 64, D))

    def outputs():
        y, back = jax.vjp(
            jax.jit(lambda p, x: module.bind(p)(x, jnp.ones((4, 64), bool))[0]), params, x)
        return jax.tree.leaves((y, back(g)))

    assert block_rows(4 * 64 * per_token, E) >= 16
    blocks = outputs()
    monkeypatch.setattr("lmjax.nn.moe.block_rows", lambda M, E: 0)
    for a, b in zip(blocks, outputs(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("capacity, rooms", [(0.5, 3), (0.75, 4), (50.0, T)])
def test_an_expert_takes_no_more_than_its_capacity_first_choices_first(capacity, rooms):
    config, params, x, y, routing = run(per_token=2, capacity=capacity)
    expected, _, found, *_ = by_hand(config, params, x, rooms)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    assert (not found[REAL].all()) == (capacity < 50)
    assert routing.dropped == pytest.approx(1 - found[REAL].mean(), abs=1e-6)


def test_the_losses_and_counts_leave_padding_out():
    config, params, x, _, routing = run(per_token=2)
    _, choices, _, probs, logits = by_hand(config, params, x)
    counts = np.bincount(choices[REAL].ravel(), minlength=E)
    np.testing.assert_array_equal(routing.counts, counts)
    expected = E * np.sum(counts / REAL.sum() * probs[REAL].mean(0))
    assert routing.balance == pytest.approx(expected, rel=1e-5)
    assert expected > 2  # an even load gives `per_token`
    z = np.mean(np.log(np.exp(logits[REAL]).sum(-1)) ** 2)
    assert routing.z == pytest.approx(z, rel=1e-5)
    assert routing.dropped == 0


def test_the_losses_weigh_as_much_as_the_tokens():
    routing = jax.tree.map(lambda a: jnp.asarray(a)[None], run(per_token=2)[4])
    loss = with_experts(Loss(jnp.float32(6), jnp.float32(6), jnp.float32(3)), routing,
                        MoEConfig(experts=E, balance_loss=0.1, z_loss=0.01))
    per_token = 0.1 * float(routing.balance[0]) + 0.01 * float(routing.z[0])
    assert float(loss.total) == pytest.approx(6 + 3 * per_token)
    assert loss.nats == 6
    load = np.asarray(routing.counts[0]) * E / routing.counts.sum()
    assert loss.extra["experts_most"] / 3 == pytest.approx(load.max())
    assert loss.extra["experts_least"] / 3 == pytest.approx(load.min())


def test_shared_experts_are_added():
    config, params, x, y, _ = run(per_token=2, shared_dim=16)
    shared = params.pop("shared")
    gate, up = x @ shared["gate"]["kernel"], x @ shared["up"]["kernel"]
    shared_y = (gate / (1 + np.exp(-gate)) * up) @ shared["down"]["kernel"]
    expected = by_hand(config, params, x)[0] + shared_y
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def tiny_step(devices=1, microbatches=1, axes=None, **moe):
    """(step, state, batch) of a model with experts on this many devices."""
    config = build(DecoderConfig, dict(
        num_layers=2, embed_dim=16, num_heads=2, mlp_dim=16, vocab_size=32,
        moe=dict(experts=E, **moe)))
    model = build_model(config, vocab_size=32, platform="cpu", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 17), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
             "segment_ids": np.ones((8, 16), np.int32),
             "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
             "loss_mask": np.ones((8, 16), np.float32)}
    layout = make_layout(MeshConfig(**axes or {}), jax.devices()[:devices])
    optimizer = OptimizerConfig(name="sgd", momentum=0.0, peak_lr=1e-3, warmup_steps=0)
    spec = state_spec(model, make_optimizer(optimizer, 10, model.axes), layout, ema=False)
    run = make_train_step(next_token_loss(model), spec, layout, make_schedule(optimizer, 10),
                          seed=0, microbatches=microbatches)
    return run, spec.init(0), jax.device_put(batch, layout.sharding(("batch", "seq")))


def correction_of(state):
    return np.asarray(state.params["layers"]["block"]["mlp"]["correction"])


def test_each_step_moves_the_correction_towards_an_even_load():
    rate, start = 0.001, np.tile(0.01 * np.array([1, -1, 1, -1], np.float32), (2, 1))
    run, state, batch = tiny_step(scores="sigmoid", correction=True, correction_rate=rate,
                                  balance_loss=0.0)
    state.params["layers"]["block"]["mlp"]["correction"] += start  # two experts get all tokens
    spreads, expected = [], start
    for _ in range(16):
        state, metrics = run(state, batch)
        counts = np.asarray(metrics["expert_counts"])
        expected = expected + rate * np.sign(counts.mean(axis=1, keepdims=True) - counts)
        np.testing.assert_allclose(correction_of(state), expected, rtol=0, atol=1e-6)
        spreads.append(np.ptp(counts, axis=1).mean())
    assert np.mean(spreads[-4:]) < 0.3 * spreads[0]  # the loads came nearer to each other
    limit = {"max_loss": jnp.float32(0.0)}  # a step that is skipped moves nothing
    state, _ = run(state, {**batch, **limit})
    np.testing.assert_allclose(correction_of(state), expected, rtol=0, atol=1e-6)


def test_a_correction_is_fixed_without_a_rate_and_refused_without_a_bias():
    run, state, batch = tiny_step(scores="sigmoid", correction=True)
    assert not correction_of(run(state, batch)[0]).any()
    with pytest.raises(UserError, match="correction_rate: expected 0 without correction, got 0.1"):
        MoEConfig(experts=E, correction_rate=0.1)
    with pytest.raises(UserError, match="family: expected family at its default with moe.corr"):
        build(EncDecConfig, dict(moe=dict(experts=E, correction=True, correction_rate=0.1)))


@pytest.mark.long
@pytest.mark.parametrize("capacity", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_mesh_and_microbatches_change_nothing(capacity):
    """One step gives the same loss, gradient norm and expert counts on 8 devices and on one."""
    def step(devices, microbatches, **axes):
        run, state, batch = tiny_step(devices, microbatches, axes, capacity=capacity,
                                      balance_loss=0.1, z_loss=0.01, correction=True,
                                      correction_rate=0.1)
        state, metrics = run(state, batch)
        return jax.device_get(metrics) | {"correction": correction_of(state)}

    one, many = step(1, 1), step(8, 1, data=2, fsdp=2, tensor=2)
    for name in ("expert_counts", "correction"):
        np.testing.assert_array_equal(one[name], many[name])
    assert one["expert_counts"].shape == (2, E) and one["expert_counts"].sum() == 2 * 8 * 16 * 2
    for name in ("loss", "grad_norm", "experts_balance", "experts_z", "experts_dropped",
                 "experts_most"):
        assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert (one["experts_dropped"] > 0) == (capacity > 0)
    if capacity:
        return
    parts = step(1, 2)
    for name in ("expert_counts", "correction"):
        np.testing.assert_array_equal(parts[name], one[name])
    assert parts["loss"] == pytest.approx(one["loss"], rel=1e-5)
