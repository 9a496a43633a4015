"""Adapters: they begin as nothing, add what the merged weights have, and follow their formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.models.model import FAMILY_MODULES, build_model
from lmjax.nn.adapters import (
    KINDS,
    AdapterConfig,
    column_lengths,
    initial_magnitudes,
    is_adapter,
    merge_adapters,
)
from lmjax.tree import join_trees, named_leaves, split_tree

FAMILY = {family.__name__: config for config, family in FAMILY_MODULES.items()}
SMALL = dict(num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, vocab_size=32, init_std=0.2)
MODELS = {
    "Decoder": dict(num_kv_heads=2, qkv_bias=True),
    "Encoder": dict(norm_position="post", mlp="gelu", norm="layernorm", use_bias=True),
    "EncDec": dict(positions="relative"),
}


@functools.cache
def model_of(family, adapter):
    model = build_model(build(FAMILY[family], SMALL | MODELS[family]), vocab_size=32,
                        platform="cpu", dtype=jnp.float32)
    return model.with_adapters(adapter)


def batch_of(rows=2, length=6):
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 32, (rows, length), dtype=np.int32),
             "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
             "segment_ids": np.ones((rows, length), np.int32)}
    return batch | {f"encoder_{name}": x for name, x in batch.items()}


def trained(model):
    """Parameters whose adapters are as if they had been trained."""
    params = initial_magnitudes(jax.jit(model.init)(jax.random.key(0)))
    own, base = split_tree(params, is_adapter)
    rng = np.random.default_rng(1)
    return join_trees(jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), own), base)


MARKS = {("Decoder", "dora"): (), ("Encoder", "lora"): pytest.mark.long,
         ("EncDec", "rslora"): pytest.mark.long}


@pytest.mark.long
@pytest.mark.parametrize("family, kind", [
    pytest.param(family, kind, marks=MARKS.get((family, kind), pytest.mark.slow))
    for family in MODELS for kind in KINDS])
def test_merged_weights_compute_the_same(family, kind):
    model = model_of(family, AdapterConfig(kind=kind, rank=3, targets="."))
    params, batch = trained(model), batch_of()
    plain = jax.jit(model.plain.logits)
    merged = plain(merge_adapters(params, model.adapter), batch)
    np.testing.assert_allclose(jax.jit(model.logits)(params, batch), merged, rtol=0,
                               atol=1e-5 * np.abs(merged).max())
    without = plain(split_tree(params, is_adapter)[1], batch)
    assert np.abs(merged - without).max() > 0.1, "the adapters change nothing"


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.long), "dora"])
def test_new_adapters_change_nothing_and_have_the_initial_values_of_peft(kind):
    model = model_of("Decoder", AdapterConfig(kind=kind, rank=8, targets="mlp/|attention/out"))
    params, batch = initial_magnitudes(jax.jit(model.init)(jax.random.key(0))), batch_of()
    base = split_tree(params, is_adapter)[1]
    np.testing.assert_allclose(jax.jit(model.logits)(params, batch),
                               jax.jit(model.plain.logits)(base, batch), rtol=1e-5, atol=1e-5)
    leaves = dict(named_leaves(params))
    fan_in = {"mlp/gate": 16, "mlp/up": 16, "mlp/down": 24, "attention/out": 16}
    for path, size in fan_in.items():
        a, b = (leaves[f"layers/block/{path}/adapter/{name}"] for name in "ab")
        # kaiming_uniform with a=sqrt(5) is uniform within 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(size)
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert not np.any(b)
    assert {path for path in leaves if is_adapter(path)} == {
        f"layers/block/{path}/adapter/{name}" for path in fan_in
        for name in ("a", "b", *["magnitude"] * (kind == "dora"))}


def test_scales():
    assert AdapterConfig(kind="lora", rank=4, alpha=8).scale == 2
    assert AdapterConfig(kind="rslora", rank=4, alpha=8).scale == 4
    assert AdapterConfig(kind="dora", rank=16, alpha=8).scale == 0.5


def test_column_lengths_are_those_of_the_sum():
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=size) for size in ((3, 4, 5, 2), (3, 4, 6), (6, 5, 2)))
    whole = w + 0.7 * np.tensordot(a, b, 1)
    lengths = column_lengths(*(jnp.asarray(x, jnp.float32) for x in (w, a, b)), 0.7)
    np.testing.assert_allclose(lengths, np.sqrt((whole**2).sum((0, 1))), rtol=1e-5)


@pytest.mark.long
def test_dropout_is_of_the_adapters_input_alone_and_follows_its_key():
    model = model_of("Decoder", AdapterConfig(kind="lora", rank=3, targets=".", dropout=0.5))
    params, batch = trained(model), batch_of()
    hidden = jax.jit(lambda params, seed: model.hidden(params, batch, jax.random.key(seed)).x_BTD)
    one, again, two = (hidden(params, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 0.1
    fresh = jax.jit(model.init)(jax.random.key(0))  # whose adapters add nothing
    np.testing.assert_array_equal(hidden(fresh, 1), hidden(fresh, 2))


@pytest.mark.parametrize("settings, message", [
    ({"kind": "qlora"}, "adapter.kind: expected one of , lora, rslora, dora"),
    ({"targets": "["}, r"adapter.targets: expected a regular expression, got '\['"),
    ({"alpha": 0}, "adapter.alpha: expected more than 0, got 0"),
    ({"dropout": 1}, "adapter.dropout: expected 0 <= dropout < 1, got 1"),
])
def test_wrong_settings_are_named(settings, message):
    from lmjax.training.recipe import build_recipe

    with pytest.raises(ValueError, match=message):
        build_recipe({"adapter": settings})


def test_targets_that_no_matrix_has_are_refused():
    with pytest.raises(ValueError, match=r"adapter.targets: expected .* for some of "
                       r"attention/key, .*mlp/up, got 'q_proj'; change it"):
        model_of("Decoder", AdapterConfig(kind="lora", targets="q_proj"))
