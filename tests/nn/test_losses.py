"""The loss against a float64 log-softmax in numpy, in one piece, in chunks and in microbatches."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn.losses import Loss, cross_entropy
from lmjax.sharding import MeshConfig, make_layout, use_layout
from lmjax.tasks.losses import next_token_loss
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.optim.table import make_optimizer
from lmjax.training.state import state_spec
from lmjax.training.step import make_eval_step, make_train_step

B, T, D, V = 3, 12, 8, 37
Z = 0.1  # the coefficient of log(Z)^2


def inputs(size=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden, table = size * rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets, mask = rng.integers(0, V, (B, T)), (rng.random((B, T)) < 0.6)
    hidden, table = hidden.astype(dtype), table.astype(dtype)
    return hidden, table, targets.astype(np.int32), mask.astype(np.float32)


def exact(hidden, table, targets, mask, softcap=0.0):
    """Computes in float64: (total, nats, weight), d total / d hidden and d total / d table."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    raw = hidden @ table.T
    logits = softcap * np.tanh(raw / softcap) if softcap else raw
    top = logits.max(-1, keepdims=True)
    log_z = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    nats = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p, one_hot = np.exp(logits - log_z[..., None]), np.eye(V)[targets]
    d = (p - one_hot + 2 * Z * log_z[..., None] * p) * mask[..., None]
    d = d * (1 - np.tanh(raw / softcap) ** 2) if softcap else d
    sums = (((nats + Z * log_z**2) * mask).sum(), (nats * mask).sum(), mask.sum())
    return sums, d @ table, np.einsum("btv,btd->vd", d, hidden)


def ours(hidden, table, targets, mask, **keys):
    def total(hidden, table):
        sums = cross_entropy(hidden, table, targets, mask, z_loss=Z, **keys)
        return sums.total, sums

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, sums), grads = gradient(hidden, table)
    assert isinstance(sums, Loss) and not sums.extra
    return sums[:3], *grads


@pytest.mark.parametrize("chunk", [0, 4, *(
    pytest.param(chunk, marks=pytest.mark.long) for chunk in (1, 12, 100))])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_values_and_gradients_against_float64(chunk, softcap):
    args = inputs(size=2.0)
    sums, d_hidden, d_table = ours(*args, softcap=softcap, chunk=chunk)
    expected, expected_hidden, expected_table = exact(*args, softcap=softcap)
    assert {s.dtype for s in sums} == {jnp.dtype("float32")}
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, expected_hidden, atol=2e-5)
    np.testing.assert_allclose(d_table, expected_table, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 4])
def test_bfloat16_inputs_are_summed_in_float32(chunk):
    args = inputs(dtype=jnp.bfloat16)
    sums, d_hidden, d_table = ours(*args, chunk=chunk)
    expected, expected_hidden, expected_table = exact(*args)
    # Only the inputs are rounded: the sums are as exact as from float32.
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert d_hidden.dtype == d_table.dtype == jnp.bfloat16
    for got, want in ((d_hidden, expected_hidden), (d_table, expected_table)):
        np.testing.assert_allclose(np.asarray(got, np.float64), want,
                                   atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("chunk", [0, 4])
def test_large_logits_stay_finite(chunk):
    args = inputs(size=1e4)
    sums, *grads = ours(*args, chunk=chunk)
    np.testing.assert_allclose(sums, exact(*args)[0], rtol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("chunk", [0, 4])
def test_masked_positions_reach_nothing(chunk):
    hidden, table, targets, mask = inputs()
    sums, d_hidden, _ = ours(hidden, table, targets, mask, chunk=chunk)
    assert (np.asarray(d_hidden)[mask == 0] == 0).all()
    assert (np.asarray(d_hidden)[mask > 0] != 0).any(-1).all()
    other = np.where(mask > 0, targets, 5).astype(np.int32)
    np.testing.assert_array_equal(ours(hidden, table, other, mask, chunk=chunk)[0], sums)
    nothing, *grads = ours(hidden, table, targets, np.zeros_like(mask), chunk=chunk)
    assert all(float(s) == 0 for s in nothing) and all((np.asarray(g) == 0).all() for g in grads)


def test_mask_weights_count():
    hidden, table, targets, mask = inputs()
    weights = np.where(mask > 0, 0.25, 0.0).astype(np.float32)
    expected = np.array(exact(hidden, table, targets, mask)[0]) / 4
    np.testing.assert_allclose(ours(hidden, table, targets, weights)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_gradients_scale_with_what_the_total_is_used_for(chunk):
    """The forward pass makes the gradient; what the total is used for still scales it."""
    hidden, table, targets, mask = inputs()

    def grad(use):
        return jax.jit(jax.grad(
            lambda h: use(cross_entropy(h, table, targets, mask, chunk=chunk))))(hidden)

    plain = np.asarray(grad(lambda s: s.total))
    np.testing.assert_allclose(grad(lambda s: s.total / s.weight), plain / mask.sum(), rtol=1e-5,
                               atol=1e-7)
    total = float(cross_entropy(hidden, table, targets, mask).total)
    np.testing.assert_allclose(grad(lambda s: s.total**2), 2 * total * plain, rtol=1e-4, atol=1e-3)


def test_without_z_loss_the_total_is_the_cross_entropy():
    sums = cross_entropy(*inputs())
    assert float(sums.total) == float(sums.nats) == pytest.approx(exact(*inputs())[0][1], rel=1e-5)


def test_a_chunk_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"config\.train\.loss_chunk: expected a divisor of .* 12, "
                       "got 5; "):
        cross_entropy(*inputs(), chunk=5)


def test_chunks_never_hold_all_logits():
    """The compiled values and gradients hold no array as large as the logits of the batch."""
    b, t, d, v, chunk = 2, 64, 8, 512, 8
    shapes = [jax.ShapeDtypeStruct(*s) for s in (
        ((b, t, d), "float32"), ((v, d), "float32"), ((b, t), "int32"), ((b, t), "float32"))]

    def compiled(chunk):
        def loss(hidden, table, targets, mask):
            return cross_entropy(hidden, table, targets, mask, softcap=5.0, z_loss=Z,
                                 chunk=chunk).total

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()

    def largest(program):
        found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
        return max(int(np.prod([int(n) for n in dims.split(",")])) for dims in found)

    whole, parts = compiled(0), compiled(chunk)
    assert largest(whole) >= b * t * v  # so the measure sees them where they are
    assert largest(parts) <= b * chunk * v
    logits = 4 * b * t * v
    assert parts.memory_analysis().temp_size_in_bytes < logits
    assert whole.memory_analysis().temp_size_in_bytes > logits


# --- through the step


def tiny(**keys):
    config = dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=V, init_std=0.2)
    return build_model(DecoderConfig(**(config | keys)), vocab_size=V, platform="cpu",
                       dtype=jnp.float32)


def initial():
    return jax.tree.map(jnp.copy, _initial())  # the step takes its input apart


@functools.cache
def _initial():
    return jax.jit(tiny().init)(jax.random.key(0))


def uneven_batch(rows=8, length=12):
    """Rows that count 12, 1, 7, ... tokens: a mean of row means would be another number."""
    tokens = np.random.default_rng(1).integers(0, V, (rows, length + 1), dtype=np.int32)
    counts = np.array([12, 1, 7, 0, 2, 12, 1, 3])[:rows, None]
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
            "segment_ids": np.ones((rows, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "loss_mask": (np.arange(length) < counts).astype(np.float32)}


def trained(microbatches, *, steps=2, chunk=0, batch=None):
    model = tiny()
    config = OptimizerConfig(name="sgd", momentum=0.0, schedule="constant", warmup_steps=0,
                             peak_lr=0.5, clip_norm=0.0,
                             weight_decay=0.0)
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    spec = state_spec(model, make_optimizer(config, 10, model.axes), layout, ema=False)
    step = make_train_step(next_token_loss(model, z_loss=1e-2, chunk=chunk), spec, layout,
                           make_schedule(config, 10),
                           seed=0, microbatches=microbatches)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec.shapes)
    state = zeros._replace(params=initial())
    for _ in range(steps):
        state, metrics = step(state, batch or uneven_batch())
    return state.params, metrics


@pytest.mark.parametrize("microbatches, chunk", [
    (4, 3), *(pytest.param(*case, marks=pytest.mark.long) for case in ((2, 0), (8, 0)))])
def test_microbatches_weigh_every_token_alike(microbatches, chunk):
    (params, metrics), (other, others) = trained(1), trained(microbatches, chunk=chunk)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in ("loss", "grad_norm", "param_norm", "weight"):
        assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    assert float(metrics["weight"]) == 38


def test_the_step_reports_the_mean_over_tokens():
    model, batch = tiny(), uneven_batch()
    params = initial()
    log_p = jax.nn.log_softmax(jax.jit(model.logits)(params, batch))
    chosen = np.take_along_axis(np.asarray(log_p, np.float64), batch["targets"][..., None], -1)
    nats = -chosen[..., 0]
    expected = (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    assert float(trained(2, steps=1)[1]["loss"]) == pytest.approx(expected, rel=1e-5)
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    sums = make_eval_step(next_token_loss(model), layout)(params, batch)
    assert float(sums.nats / sums.weight) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_tokens_changes_nothing():
    batch = uneven_batch()
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    params, metrics = trained(2, batch=batch)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(initial()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sharded_vocabulary_is_never_gathered():
    """With the vocabulary split in two, only sums are sent, each less than a share of logits."""
    layout = make_layout(MeshConfig(data=4, tensor=2))
    hidden = jax.ShapeDtypeStruct((8, 16, 8), jnp.float32,
                                  sharding=layout.sharding(("batch", "seq", "act_embed")))
    table = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=layout.sharding(("vocab", "embed")))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=layout.sharding(("batch", "seq")))

    def total(hidden, table, targets, mask):
        with use_layout(layout):
            return cross_entropy(hidden, table, targets, mask, softcap=5.0, z_loss=1e-4).total

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)),
                       out_shardings=(layout.replicated, (hidden.sharding, table.sharding)))
    text = gradient.lower(hidden, table, tokens, tokens).compile().as_text()
    sent = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text)
    sizes = [math.prod(int(n) for n in dims.split(",") if n)
             for types, _ in sent for dims in re.findall(r"\[([\d,]*)\]", types)]
    assert {kind for _, kind in sent} == {"all-reduce"}
    assert max(sizes) == 2 * 16 * 8  # d hidden, or d table; a share of logits has 1024
    # Over the vocabulary: the maximum, the sum, the target's logit, d hidden. Over the batch: d
    # table, two totals.
    assert len(sizes) <= 7
