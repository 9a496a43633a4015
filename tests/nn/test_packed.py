"""Packed weights: the integers, their products against those of unpacked weights, and training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.model import Model, build_model
from lmjax.models.packing import matrices, pack_params, unpack_params
from lmjax.nn import packed
from lmjax.nn.kernels import native
from lmjax.nn.packed import (
    FEW_ROWS,
    FORMATS,
    NOT_QUANTIZED,
    Quantization,
    by_inputs,
    by_outputs,
    pack,
    rounded_to,
)
from lmjax.training.recipe import build_recipe
from lmjax.tree import named_leaves, num_bytes

RNG = np.random.default_rng(0)


def weights(outputs: int, inputs: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal((outputs, inputs), np.float32))


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    w = weights(5, 96)
    near = pack(w, "int8").dense(jnp.float32)
    step = np.abs(w).max(1, keepdims=True) / 127
    assert (np.abs(near - w) <= step / 2 * 1.0001).all()


def test_int4_has_a_scale_per_group_and_half_a_byte_per_weight() -> None:
    w = weights(5, 256)
    made = pack(w, "int4", 64)
    assert made.values.shape == (5, 128) and made.values.dtype == jnp.uint8
    groups = np.asarray(w).reshape(5, 4, 64)
    steps = np.abs(groups).max(2, keepdims=True) / 7
    near = np.asarray(made.dense(jnp.float32)).reshape(groups.shape)
    assert (np.abs(near - groups) <= steps / 2 * 1.0001).all()
    np.testing.assert_allclose(np.abs(near).max(2), np.abs(groups).max(2), rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "inputs", "group"), [
    (1, 70, 256, 128), (2, 3, 96, 32), (3, 65, 192, 128), (7, 130, 64, 64), (1, 1, 34, 128),
    (FEW_ROWS + 1, 40, 128, 32)])
def test_a_product_is_that_of_the_unpacked_weights(format: str, rows: int, outputs: int,
                                                   inputs: int, group: int) -> None:
    """Few rows go through the native product, more rows through XLA."""
    w = pack(weights(outputs, inputs), format, group)
    x = jnp.asarray(RNG.standard_normal((rows, inputs), np.float32))
    got = jax.jit(packed.matmul)(x, w)
    want = np.asarray(x, np.float64) @ np.asarray(w.dense(jnp.float32), np.float64).T
    # The activations of int8_dynamic have 8 bits.
    np.testing.assert_allclose(got, want, atol=0.3 if format == "int8_dynamic" else 3e-5)


def test_without_a_compiler_xla_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = pack(weights(33, 128), "int4", 64), weights(2, 128)
    with_native = packed.matmul(x, w)
    monkeypatch.setattr(native, "is_available", lambda: False)
    np.testing.assert_allclose(packed.matmul(x, w), with_native, atol=3e-5)


def test_a_compiler_that_fails_is_said_once(tmp_path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cc:1: error: no' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not native._registered.__wrapped__()
    assert "x.cc:1: error: no" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_tiny_floats_stay_what_they_are_after_a_product() -> None:
    """A library that is linked for fast maths would make them zeros in the whole process."""
    packed.matmul(weights(1, 64), pack(weights(8, 64), "int8"))
    assert np.float32(1e-40) * np.float32(0.5) != 0


def test_products_of_few_rows_have_gradients_and_are_mapped() -> None:
    w, x = pack(weights(12, 64), "int4", 32), weights(3, 64)
    got = jax.grad(lambda x: jnp.sum(jnp.sin(packed.matmul(x, w))))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ w.dense(jnp.float32).T)))(x)
    np.testing.assert_allclose(got, want, atol=1e-4)
    mapped = jax.vmap(lambda row: packed.matmul(row[None], w)[0])(x)
    np.testing.assert_allclose(mapped, packed.matmul(x, w), atol=1e-5)


def test_a_row_of_rounded_activations_does_not_depend_on_the_number_of_rows() -> None:
    w, x = pack(weights(12, 64), "int8_dynamic"), weights(FEW_ROWS + 1, 64)
    np.testing.assert_allclose(packed.matmul(x[:1], w), packed.matmul(x, w)[:1], atol=1e-4)


def test_kernels_are_turned_to_outputs_and_back() -> None:
    w = jnp.asarray(RNG.standard_normal((2, 3, 4, 5), np.float32))  # layers, two in, one out
    turned = by_outputs(w, 2, lead=1)
    assert turned.shape == (2, 5, 12)
    np.testing.assert_array_equal(turned[1, 2], w[1, :, :, 2].ravel())
    np.testing.assert_array_equal(by_inputs(turned, w.shape, 2, lead=1), w)


def model_of(**changed: object) -> Model:
    config = build(DecoderConfig, dict(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2,
                                       mlp_dim=96, vocab_size=128) | changed)
    return build_model(config, vocab_size=128, platform="cpu", dtype=jnp.float32)


@pytest.mark.parametrize("changed", [
    {}, pytest.param({"tie_embeddings": True}, marks=pytest.mark.long),
    pytest.param({"moe": {"experts": 4, "per_token": 2}}, marks=pytest.mark.long)])
def test_a_packed_model_computes_what_its_unpacked_weights_do(changed: dict) -> None:
    model, quantization = model_of(**changed), Quantization("int4", 32)
    params = model.init(jax.random.key(0))
    small = model.with_quantization(quantization)
    tree = pack_params(model.functional, params, quantization)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), tree) == jax.tree.map(
        lambda p: (p.shape, p.dtype), small.shapes)
    back = unpack_params(model.functional, tree, quantization)
    tokens = jnp.asarray(RNG.integers(0, 128, (2, 12)), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens),
             "positions": jnp.broadcast_to(jnp.arange(12)[None], tokens.shape)}
    want = model.logits(back, batch)
    np.testing.assert_allclose(small.logits(tree, batch), want, atol=1e-5)
    # Decoding, with weights that lie one by one, as on a CPU.
    step, ready = jax.jit(small.step), small.for_decoding(tree)
    _, cache = step(ready, tokens[:, :11], small.init_cache(2, 16))
    logits, _ = step(ready, tokens[:, 11:], cache)
    np.testing.assert_allclose(logits, want[:, -1], atol=1e-5)
    assert num_bytes(tree) < 0.25 * num_bytes(params)


@pytest.mark.long
@pytest.mark.parametrize("family", [EncoderConfig, EncDecConfig])
def test_every_family_is_packed(family: type) -> None:
    config = build(family, dict(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4,
                                mlp_dim=96, vocab_size=128))
    model = build_model(config, vocab_size=128, platform="cpu", dtype=jnp.float32)
    quantization = Quantization("int4", 32)
    tree = pack_params(model.functional, model.init(jax.random.key(0)), quantization)
    tokens = jnp.asarray(RNG.integers(0, 128, (2, 12)), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens),
             "positions": jnp.broadcast_to(jnp.arange(12)[None], tokens.shape)}
    batch |= {f"encoder_{name}": x for name, x in batch.items()}
    got = model.with_quantization(quantization).logits(tree, batch)
    want = model.logits(unpack_params(model.functional, tree, quantization), batch)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_is_packed() -> None:
    names = {name for name, _ in named_leaves(model_of().shapes)}
    which = set(matrices(model_of().functional))
    assert which < names
    assert {name.rsplit("/", 1)[1] for name in names - which} == {"scale"}  # norms


@pytest.mark.long
def test_training_sees_rounded_weights_and_moves_those_below() -> None:
    model, quantization = model_of(), Quantization("int4", 32)
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(RNG.integers(0, 128, (2, 12)), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens),
             "positions": jnp.broadcast_to(jnp.arange(12)[None], tokens.shape)}
    rounded = unpack_params(model.functional, pack_params(
        model.functional, params, quantization), quantization)
    rounded |= {key: params[key] for key in ("embedding", "head")}  # tables are not rounded

    def loss(params: dict) -> jax.Array:
        return jnp.mean(jnp.square(model.logits(params, batch)))

    with rounded_to(quantization):
        value, grads = jax.value_and_grad(loss)(params)
    want, want_grads = jax.value_and_grad(loss)(rounded)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for (name, got), (_, expected) in zip(named_leaves(grads), named_leaves(want_grads),
                                          strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.long
def test_training_does_not_round_routers() -> None:
    model = model_of(moe={"experts": 4, "per_token": 2})
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(RNG.integers(0, 128, (2, 12)), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens),
             "positions": jnp.broadcast_to(jnp.arange(12)[None], tokens.shape)}
    quantization = Quantization("int4", 32)
    want = unpack_params(model.functional, pack_params(model.functional, params, quantization),
                         quantization) | {key: params[key] for key in ("embedding", "head")}
    with rounded_to(quantization):
        got = model.logits(params, batch)
    np.testing.assert_allclose(got, model.logits(want, batch), atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(UserError, match="quantization.weights: expected one of"):
        Quantization("int3")
    with pytest.raises(UserError, match="expected an even number, got 33"):
        Quantization("int4", 33)
    with pytest.raises(UserError, match="expected no adapters, which are merged before weights"):
        build_recipe({"adapter": {"kind": "lora"}, "quantization": {"weights": "int8"}})
    packed_model = model_of().with_quantization(Quantization("int8"))
    assert packed_model.with_quantization(NOT_QUANTIZED).quantization == NOT_QUANTIZED
    assert dataclasses.asdict(packed_model.quantization)["weights"] == "int8"
