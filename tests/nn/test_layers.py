"""Layers against their formulas in NumPy float64; dropout by its statistics and its keys."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn.layers import (
    ACTIVATIONS,
    MLP,
    MLP_KINDS,
    NORMS,
    Dense,
    Embedding,
    residual_init,
)
from lmjax.nn.losses import Loss
from lmjax.nn.module import functional, normal
from lmjax.nn.ops import dropout
from lmjax.sharding import MeshConfig, make_layout
from lmjax.tasks.losses import next_token_loss
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.optim.table import make_optimizer
from lmjax.training.state import state_spec
from lmjax.training.step import make_train_step

RNG = np.random.default_rng(0)


def made(build, seed=0):
    """A module as a pure function, its parameters, and its parts.

    Noise is added to the parameters, so that none of them is at its initial 0 or 1.
    """
    parts = functional(build)
    params = parts.init(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(noise.normal(size=p.shape) * 0.5, jnp.float32), params)
    return (lambda params, *args: parts.bind(params)(*args)), params, parts


def numbers(params):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params)


# --- dense and embedding


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("inside, outside, rule", [
    ((6,), (10,), "btd,df->btf"), ((6,), (2, 5), "btd,dhk->bthk"),
    ((2, 5), (6,), "bthk,hkd->btd")])
def test_dense_contracts_the_last_axes(inside, outside, rule, use_bias):
    axes = ("embed", "heads", "head_dim")[: len(inside) + len(outside)]
    apply, params, parts = made(
        lambda r: Dense(inside, outside, axes, use_bias=use_bias, init=normal(1.0), rngs=r))
    x = RNG.normal(size=(2, 3, *inside))
    w = numbers(params)
    expected = np.einsum(rule, x, w["kernel"]) + (w["bias"] if use_bias else 0)
    np.testing.assert_allclose(apply(params, jnp.asarray(x, jnp.float32)), expected, atol=2e-5)
    assert parts.axes["kernel"] == axes
    assert set(params) == ({"kernel", "bias"} if use_bias else {"kernel"})


def test_dense_computes_in_the_dtype_of_its_input_and_stores_float32():
    apply, params, _ = made(lambda r: Dense((6,), (4,), ("embed", "mlp"), use_bias=True,
                                            init=normal(1.0), rngs=r))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x = jnp.asarray(RNG.normal(size=(2, 6)), jnp.bfloat16)
    y = apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), apply(params, x.astype(jnp.float32)),
                               rtol=0.05, atol=0.05)
    grads = jax.grad(lambda p: apply(p, x).astype(jnp.float32).sum())(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_embedding_takes_rows_in_any_dtype():
    apply, params, _ = made(lambda r: Embedding(5, 3, ("vocab", "embed"), init=normal(1.0), rngs=r))
    ids = jnp.array([[0, 4], [2, 2]], jnp.int32)
    np.testing.assert_array_equal(apply(params, ids, jnp.float32),
                                  np.asarray(params["table"])[np.asarray(ids)])
    assert apply(params, ids, jnp.bfloat16).dtype == jnp.bfloat16
    out_of_range = apply(params, jnp.array([9]), jnp.float32)
    np.testing.assert_array_equal(out_of_range[0], params["table"][4])  # not NaN
    grads = jax.grad(lambda p: apply(p, ids, jnp.float32).sum())(params)["table"]
    np.testing.assert_array_equal(grads[:, 0], [1, 0, 2, 0, 1])


def test_the_gradient_of_a_frequent_row_is_summed_in_float32():
    layer = functional(
        lambda rngs: Embedding(3, 4, ("vocab", "embed"), init=normal(1.0), rngs=rngs))
    params = layer.init(jax.random.key(0))
    ids = jnp.zeros((1, 5000), jnp.int32).at[0, 0].set(7)  # one id is beyond the table

    def total(params):
        return jnp.sum(layer.bind(params)(ids, jnp.bfloat16).astype(jnp.float32))

    (gradient,) = jax.tree.leaves(jax.grad(total)(params))
    np.testing.assert_allclose(gradient, np.outer([4999, 0, 1], np.ones(4)), rtol=2**-8)



# --- norms


def expected_norm(name, x, w, eps):
    if name.startswith("layernorm"):
        x = x - x.mean(-1, keepdims=True)
    scale = w.get("scale", 1.0)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (scale + (name == "rmsnorm_1p"))
    return y + w["bias"] if name == "layernorm" else y


@pytest.mark.parametrize("shape", [
    pytest.param((8,), marks=pytest.mark.long), pytest.param((2, 8), marks=pytest.mark.long),
    (2, 3, 8), pytest.param((2, 3, 4, 8), marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NORMS)
def test_norms_against_numpy(name, shape):
    # An eps that is large enough to change the result.
    apply, params, _ = made(lambda r: NORMS[name](8, eps=0.1, rngs=r))
    x = RNG.normal(size=shape) + 3
    np.testing.assert_allclose(apply(params, jnp.asarray(x, jnp.float32)),
                               expected_norm(name, x, numbers(params), 0.1), atol=3e-6)


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_taken_in_float32(name):
    """A bfloat16 norm only rounds its input and output, even if the input is large."""
    apply, params, _ = made(lambda r: NORMS[name](512, eps=1e-6, rngs=r))
    x = jnp.asarray(RNG.normal(size=(4, 512)) * 300 + 100, jnp.bfloat16)
    y = apply(params, x)
    assert y.dtype == jnp.bfloat16
    expected = expected_norm(name, np.asarray(x, np.float64), numbers(params), 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("name", NORMS)
def test_norm_gradients_are_finite_at_zero(name):
    apply, params, _ = made(lambda r: NORMS[name](8, eps=1e-5, rngs=r))
    grads = jax.grad(lambda p, x: apply(p, x).sum(), argnums=(0, 1))(params, jnp.zeros((2, 8)))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# --- activations and the MLP

EXACT = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    # gpt-oss: a steeper sigmoid, and a limit above
    "silu_clamped": lambda x: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-9, 9, 361)
    y = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, EXACT[name](x), atol=2e-6)


def test_the_two_gelus_differ_by_more_than_the_tolerance():
    x = np.linspace(-6, 6, 241)
    gap = np.abs(EXACT["gelu"](x) - EXACT["gelu_tanh"](x)).max()
    assert gap > 4e-4  # the tolerance above is 200 times smaller


@pytest.mark.parametrize("kind, use_bias", [
    *((kind, False) for kind in MLP_KINDS), ("gelu", True), ("swiglu", True),
    *(pytest.param(kind, True, marks=pytest.mark.long)
      for kind in MLP_KINDS if kind not in ("gelu", "swiglu"))])
def test_mlp_against_numpy(kind, use_bias):
    apply, params, parts = made(lambda r: MLP(
        6, 10, kind=kind, use_bias=use_bias, init=normal(0.5), out_init=normal(0.5), rngs=r))
    x, w = RNG.normal(size=(2, 3, 6)), numbers(params)

    def dense(name, x):
        return x @ w[name]["kernel"] + (w[name]["bias"] if use_bias else 0)

    gates = {"swiglu": "silu", "geglu": "gelu_tanh", "geglu_erf": "gelu", "reglu": "relu",
             "swiglu_clamped": "silu_clamped"}
    act, gated = gates.get(kind, kind), kind in gates
    up = dense("up", x)
    up = np.clip(up, -7, 7) + 1 if kind == "swiglu_clamped" else up
    hidden = EXACT[act](dense("gate", x)) * up if gated else EXACT[act](up)
    np.testing.assert_allclose(apply(params, jnp.asarray(x, jnp.float32)), dense("down", hidden),
                               atol=3e-5)
    assert set(params) == ({"gate", "up", "down"} if gated else {"up", "down"})
    assert parts.axes["up"]["kernel"] == ("embed", "mlp")
    assert parts.axes["down"]["kernel"] == ("mlp", "embed")


def test_initial_scales():
    for init, expected in ((residual_init(0.02, 8), 0.02 / 4), (normal(0.02), 0.02)):
        std = float(jnp.std(init(jax.random.key(0), (400, 400), jnp.float32)))
        assert std == pytest.approx(expected, rel=0.02)


# --- dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(rate):
    x = jnp.ones((400, 400))
    y = dropout(x, rate, jax.random.key(0))
    kept = np.asarray(y) != 0
    spread = math.sqrt(rate * (1 - rate) / x.size)  # of the share kept
    assert abs(kept.mean() - (1 - rate)) < 5 * spread
    np.testing.assert_allclose(np.asarray(y)[kept], 1 / (1 - rate), rtol=1e-6)
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * spread / (1 - rate))


def test_dropout_is_off_without_a_key_or_a_rate():
    x = jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)
    assert dropout(x.astype(jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16


def tiny(**keys):
    config = dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=20, init_std=0.3)
    return build_model(DecoderConfig(**(config | keys)), vocab_size=20, platform="cpu",
                       dtype=jnp.float32)


def batch_of(rows=4, length=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (rows, length + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
            "segment_ids": np.ones((rows, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "loss_mask": np.ones((rows, length), np.float32)}


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.long)])
def test_model_dropout_depends_on_the_key_and_nothing_else(scan):
    model = tiny(dropout=0.3, scan_layers=scan)
    params, batch = jax.jit(model.init)(jax.random.key(0)), batch_of()

    @jax.jit
    def hidden(*keys):
        without = tiny(scan_layers=scan)
        runs = [model.hidden(params, batch, key)[0] for key in keys]
        off = model.hidden(params, batch)[0]
        return *runs, off, without.hidden(params, batch, keys[0])[0]

    a, again, b, off, without = hidden(*map(jax.random.key, (1, 1, 2)))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 0.1 and np.abs(a - off).max() > 0.1
    np.testing.assert_allclose(off, without, atol=1e-6)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.long)])
def test_dropout_differs_between_layers(scan):
    """Every MLP writes 1 everywhere, so that the sum tells in how many layers it was kept."""
    model = tiny(dropout=0.5, use_bias=True, scan_layers=scan, num_layers=2, norm="layernorm")
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.shapes)
    block = params["layers"]["block"]
    # Attention stays 0.
    block["mlp"]["down"]["bias"] = jnp.ones_like(block["mlp"]["down"]["bias"])
    params["norm"] = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    hidden_of = jax.jit(lambda key: model.hidden(params, batch_of(rows=64), key)[0])
    hidden = np.asarray(hidden_of(jax.random.key(0)))
    # Each element is 0, 2 or 4 before the last norm. With equal masks in both layers, none is 2.
    levels = [len(np.unique(row.round(4))) for row in hidden.reshape(-1, 16)]
    assert np.mean(np.array(levels) == 3) > 0.9


def step_of(model, microbatches, loss_fn=None):
    config = OptimizerConfig(name="sgd", momentum=0.0, schedule="constant", warmup_steps=0,
                             peak_lr=0.5)
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    spec = state_spec(model, make_optimizer(config, 10, model.axes), layout, ema=False)
    step = make_train_step(loss_fn or next_token_loss(model), spec, layout,
                           make_schedule(config, 10), seed=3, microbatches=microbatches)
    start = spec.init(0)

    def fresh(number=0):
        """A copy of the initial state at step `number`, because a step consumes its input."""
        return jax.tree.map(jnp.copy, start)._replace(step=jnp.asarray(number, jnp.int32))

    return step, fresh


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_step_with_dropout_can_be_replayed(microbatches):
    """The same state and batch give the same bits; the next step draws other masks."""
    step, fresh = step_of(tiny(dropout=0.3, num_layers=1), microbatches)
    batch = batch_of()
    first, again = (step(fresh(), batch) for _ in range(2))
    for a, b in zip(*(jax.tree.leaves(x) for x in (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(step(fresh(1), batch)[1]["loss"]) != float(first[1]["loss"])


def test_every_step_and_microbatch_has_a_key_of_its_own():
    """The loss is a number drawn from the key, counted only in the microbatch of the marked row."""

    def drawn(params, batch, key):
        nats = jax.random.uniform(key) * batch["loss_mask"].sum()
        return Loss(0.0 * params["norm"]["scale"].sum(), nats, jnp.float32(1))

    step, fresh = step_of(tiny(num_layers=1), 4, drawn)
    found = []
    for number in (0, 1):
        for row in range(4):
            marked = np.zeros((4, 1), np.float32)
            marked[row] = 1
            found.append(float(step(fresh(number), {"loss_mask": marked})[1]["loss"]))
    assert len(set(found)) == 8 and min(found) > 0
