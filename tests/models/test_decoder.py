"""The decoder: counts against formulas, compute dtype, and its cache against whole rows."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from lmjax.models.flops import embedding_parameters, flops_per_row, flops_per_token
from lmjax.models.heads import HeadConfig
from lmjax.models.model import build_model
from lmjax.tasks.losses import next_token_loss
from lmjax.tree import named_leaves, num_elements

V, D, H, F, LAYERS, T = 48, 32, 4, 56, 2, 10
CLASSIC = dict(positions="learned", norm="layernorm", use_bias=True, tie_embeddings=True)


def model_of(dtype=jnp.float32, **keys):
    config = dict(num_layers=LAYERS, embed_dim=D, num_heads=H, mlp_dim=F, vocab_size=V,
                  max_positions=32, init_std=0.2)
    return build_model(DecoderConfig(**(config | keys)), vocab_size=V, platform="cpu", dtype=dtype)


def batch_of(rows=2, length=T, seed=0):
    tokens = np.random.default_rng(seed).integers(0, V, (rows, length + 1), dtype=np.int32)
    at = np.arange(length, dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
            "segment_ids": np.ones((rows, length), np.int32),
            "positions": np.broadcast_to(at, (rows, length)),
            "loss_mask": np.ones((rows, length), np.float32)}


@functools.cache
def initial(model):
    return jax.jit(model.init)(jax.random.key(0))


def loss_and_gradients(model, params, batch):
    loss_fn = next_token_loss(model)

    def mean(params):
        sums = loss_fn(params, batch, None)
        return sums.total / sums.weight

    return jax.jit(jax.value_and_grad(mean))(params)


# --- counts


@pytest.mark.parametrize("keys, layer, outside", [
    # In a layer: query and out, key and value, gate, up and down, two norms.
    # Outside of layers: two tables and the last norm.
    (dict(num_kv_heads=2), 2 * D * D + 2 * D * D // 2 + 3 * D * F + 2 * D, 2 * V * D + D),
    (dict(qk_norm=True, head_dim=6), 4 * D * H * 6 + 3 * D * F + 2 * D + 2 * 6, 2 * V * D + D),
    (CLASSIC | dict(mlp="gelu"), 4 * (D * D + D) + 2 * D * F + F + D + 4 * D,
     V * D + 32 * D + 2 * D),
    (dict(mlp="relu", positions="none", tie_embeddings=True), 4 * D * D + 2 * D * F + 2 * D,
     V * D + D)])
def test_parameter_counts(keys, layer, outside):
    model = model_of(**keys)
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert num_elements(model.shapes) == LAYERS * layer + outside == num_elements(made)
    tables = V * D * (1 if keys.get("tie_embeddings") else 2)
    tables += 32 * D if keys.get("positions") == "learned" else 0
    assert embedding_parameters(model) == tables


def test_flops_of_frozen_weights_are_those_of_the_gradients_that_pass_through():
    """4 per frozen weight after what is trained, 2 before it; attention likewise."""
    length, model = 32, model_of(head=HeadConfig(5, "plain"))
    lengths = {"tokens": length, "targets": length}
    up = LAYERS * D * F
    layers, head = LAYERS * 4 * D * D + 3 * up, 5 * D
    pairs = LAYERS * D * length / 2  # of heads, their dimensions and visible keys
    for frozen, expected in (
            (None, 6 * (layers + head) + 12 * pairs),
            (r"mlp/up", 6 * (layers - up + head) + 4 * up + 12 * pairs),
            (r"layers/|^norm", 4 * layers + 6 * head + 12 * pairs),  # the embeddings are trained
            (r"embedding|layers/|^norm", 2 * layers + 6 * head + 4 * pairs)):
        accepts = None if frozen is None else lambda path, f=frozen: bool(re.search(f, path))
        found = flops_per_row(model, lengths, accepts)
        assert found == pytest.approx(length * expected, rel=1e-6), frozen
    both = flops_per_row(model, {**lengths, "rejected_tokens": length})
    assert both == 2 * flops_per_row(model, lengths)
    states = flops_per_row(model_of(), {"tokens": length, "second_tokens": length})
    assert states == pytest.approx(2 * length * (6 * layers + 12 * pairs), rel=1e-6)


@pytest.mark.parametrize("keys, matrices", [
    (dict(num_kv_heads=2), 3 * D * D + 3 * D * F),
    (CLASSIC | dict(mlp="gelu"), 4 * D * D + 2 * D * F),  # the tied table is multiplied with once
    (dict(head_dim=16), 8 * D * D + 3 * D * F),
    (dict(sliding_window=8), 4 * D * D + 3 * D * F)])
def test_flops_per_token(keys, matrices):
    """6 FLOPs per weight, and 12 times heads * head_dim per query and visible key."""
    length, model = 256, model_of(**keys)
    window = keys.get("sliding_window", length)
    visible = np.mean([min(t + 1, window) for t in range(length)])
    attention = 12 * LAYERS * H * keys.get("head_dim", D // H) * visible
    expected = 6 * (LAYERS * matrices + V * D) + attention
    assert flops_per_token(model, length) == pytest.approx(expected, rel=0.01)


def test_axes_name_every_dimension():
    for keys in (dict(num_kv_heads=2, qk_norm=True), CLASSIC):
        model = model_of(**keys)
        axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
        for (name, leaf), names in zip(named_leaves(model.shapes), axes, strict=True):
            assert len(leaf.shape) == len(names), name
            assert ("layers" in names) == name.startswith("layers/")


def test_a_vocabulary_too_small_for_the_data_is_refused():
    def build(**keys):
        return build_model(DecoderConfig(**keys), vocab_size=49, platform="cpu", dtype=jnp.float32)

    refusal = r"config\.model\.vocab_size: expected at least 49.* got 48; "
    with pytest.raises(ValueError, match=refusal):
        build(vocab_size=48)
    assert build().config.vocab_size == 49
    with pytest.raises(ValueError, match="attention: .*got 'nope'"):
        build(attention="nope")


# --- compute dtype


@pytest.mark.long
@pytest.mark.parametrize("keys", [
    dict(num_kv_heads=2, qk_norm=True), CLASSIC | dict(mlp="gelu_tanh")], ids=["modern", "classic"])
def test_bfloat16_compute_keeps_float32_parameters(keys):
    exact, model = model_of(**keys), model_of(jnp.bfloat16, **keys)
    params, batch = initial(exact), batch_of(rows=4)
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert {p.dtype for p in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    hidden, table, *_ = jax.eval_shape(model.hidden, params, batch)
    logits = jax.jit(model.logits)(params, batch)
    assert (hidden.dtype, table.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.asarray(jax.jit(exact.logits)(params, batch))
    error = np.sqrt(np.mean((np.asarray(logits) - expected) ** 2)) / expected.std()
    assert 1e-4 < error < 0.03  # above the error of float32, within that of 8 bits in few layers
    loss, grads = loss_and_gradients(model, params, batch)
    exact_loss, exact_grads = loss_and_gradients(exact, params, batch)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.02)
    for (name, a), b in zip(named_leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        if not name.endswith("key/bias"):  # 0 but for rounding
            assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b), name


# --- cached decoding

CACHED = {
    "rope": dict(num_kv_heads=2),
    "learned": CLASSIC,
    "window": dict(sliding_window=3, num_kv_heads=1),
    "softcap": dict(attention_softcap=3.0, logit_softcap=5.0, qk_norm=True),
    "none": dict(positions="none"),
    "unrolled": dict(scan_layers=False),
}


@functools.cache
def cached(name):
    """(compiled step, parameters, an empty cache, the logits of `batch_of()` as whole rows)."""
    model = model_of(**CACHED[name])
    params = initial(model)
    full = np.asarray(jax.jit(model.logits)(params, batch_of()))
    return jax.jit(model.step), params, model.init_cache(2, 16), full


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if i < 3 else pytest.mark.long) for i, name in enumerate(CACHED)])
def test_one_token_at_a_time_equals_the_full_forward(name):
    step, params, cache, full = cached(name)
    for t in range(T):
        logits, cache = step(params, batch_of()["tokens"][:, t : t + 1], cache)
        np.testing.assert_allclose(logits, full[:, t], atol=2e-5 * np.abs(full).max(),
                                   err_msg=f"token {t}")


@pytest.mark.parametrize("name", CACHED)
def test_ragged_prefill_then_decoding_equals_the_full_forward(name):
    """Prompts of 6 and 2 tokens, padded with other tokens, are fed and continued together."""
    step, params, cache, full = cached(name)
    tokens, lengths = batch_of()["tokens"], np.array([6, 2])
    prompt = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], 13).astype(np.int32)
    logits, cache = step(params, prompt, cache, jnp.asarray(lengths - 1, jnp.int32))
    np.testing.assert_array_equal(cache.slot, lengths)
    for more in range(4):
        at = lengths + more
        np.testing.assert_allclose(logits, full[[0, 1], at - 1], atol=2e-5 * np.abs(full).max(),
                                   err_msg=f"{more} tokens later")
        logits, cache = step(params, tokens[[0, 1], at][:, None], cache)


def test_softcap_bounds_the_logits():
    model = model_of(logit_softcap=0.5)
    logits = jax.jit(model.logits)(initial(model), batch_of())
    assert 0.3 < np.abs(logits).max() < 0.5
    plain = np.asarray(jax.jit(model_of().logits)(initial(model), batch_of()), np.float64)
    np.testing.assert_allclose(logits, 0.5 * np.tanh(plain / 0.5), atol=1e-6)


def test_initial_loss_is_that_of_a_uniform_guess():
    model = model_of(init_std=0.02)
    sums = jax.jit(next_token_loss(model))(initial(model), batch_of(rows=8), None)
    assert float(sums.total / sums.weight) == pytest.approx(math.log(V), rel=0.02)
