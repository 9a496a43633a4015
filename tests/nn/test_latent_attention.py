"""Latent attention: cached decoding equals the whole row, kernels and meshes agree, and refusals.

`tests/huggingface/test_decoders.py` compares it with transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.models.decoder import DecoderConfig
from lmjax.models.flops import flops_per_token
from lmjax.models.model import build_model
from lmjax.models.packing import pack_params
from lmjax.nn.adapters import AdapterConfig
from lmjax.nn.packed import Quantization
from lmjax.sharding import MeshConfig, make_layout, use_layout
from lmjax.tasks.losses import next_token_loss

T, V = 12, 40
MOE = dict(experts=8, per_token=3, mlp_dim=12, shared_dim=16, scores="sigmoid", groups=4,
           top_groups=2, correction=True, scale=1.5, first_dense=1)
KEYS = dict(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=40, vocab_size=V, moe=MOE,
            latent=dict(kv_rank=16, query_rank=24, nope_dim=8, rope_dim=4, value_dim=10),
            rope_scaling=dict(kind="yarn", factor=4.0, original_positions=8, mscale=0.7,
                              mscale_all_dim=0.9))


def config_of(**keys):
    return build(DecoderConfig, KEYS | keys, path="config")


@functools.cache
def model_of(kernel="xla", experts=True):
    keys = {} if experts else {"moe": {}}
    return build_model(config_of(attention=kernel, **keys), vocab_size=V, platform="cpu",
                       dtype=jnp.float32)


def filled(model):
    """Parameters of which none is at its start: norms and biases count, too."""
    def fill(key):
        leaves, tree = jax.tree.flatten(model.init(key))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [leaf + 0.1 * jax.random.normal(own, leaf.shape)
                                         for leaf, own in zip(leaves, keys, strict=True)])

    return jax.jit(fill)(jax.random.key(0))


@functools.cache
def params_of():
    return filled(model_of())


def batch_of(rows=2):
    tokens = np.random.default_rng(0).integers(1, V, (rows, T + 1), dtype=np.int32)
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": at,
            "segment_ids": np.ones_like(at), "loss_mask": np.ones(at.shape, np.float32)}


def decoded(model, params):
    """The logits of all positions, by a prompt of 5 tokens, one of 4, and single tokens."""
    cache, parts, at, extend = model.init_cache(2, T), [], 0, jax.jit(model.extend)
    for n in (5, 4, 1, 1, 1):
        logits, cache = extend(params, batch_of()["tokens"][:, at:at + n], cache)
        parts, at = [*parts, logits], at + n
    return jnp.concatenate(parts, axis=1), cache


@pytest.mark.parametrize("kernel", ["xla", pytest.param("chunked", marks=pytest.mark.long)])
def test_decoding_with_the_latent_cache_gives_the_logits_of_the_whole_row(kernel):
    model, params = model_of(kernel), params_of()
    expected = jax.jit(model.logits)(params, batch_of())
    got, cache = decoded(model, model.for_decoding(params))
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()), rtol=0)
    shapes = {x.shape for x in jax.tree.leaves(cache.layers)}
    assert shapes == {(2, 1, T, 4), (2, 1, T, 16)}  # the rotated keys and the latents alone


def _rounded_cache():
    # Rounding would let tokens take other experts.
    model = model_of(experts=False)
    return model.with_kv_cache("int8"), filled(model)


def _adapted():
    model = model_of().with_adapters(AdapterConfig(kind="lora", rank=2, targets="attention"))
    return model, filled(model)


def _packed():
    q = Quantization(weights="int8")
    return model_of().with_quantization(q), pack_params(model_of().functional, params_of(), q)


@pytest.mark.long
@pytest.mark.parametrize("changed, bound", [
    (_rounded_cache, 0.03), (_adapted, 2e-5), (_packed, 2e-5)],
    ids=["int8-cache", "adapters", "packed"])
def test_decoding_of_other_forms_is_that_of_the_whole_row(changed, bound):
    model, params = changed()
    expected = jax.jit(model.logits)(params, batch_of())
    got, _ = decoded(model, model.for_decoding(params))
    np.testing.assert_allclose(got, expected, atol=bound * float(jnp.abs(expected).max()), rtol=0)


def loss_and_gradients(model):
    def mean(params, batch):
        sums = next_token_loss(model)(params, batch, None)
        return sums.total / sums.weight

    return jax.jit(jax.value_and_grad(mean))


@pytest.mark.long
def test_a_kernel_that_needs_values_as_large_as_keys_has_the_same_gradients():
    expected = loss_and_gradients(model_of())(params_of(), batch_of())
    got = loss_and_gradients(model_of("chunked"))(params_of(), batch_of())
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), got,
                 expected)
    correction = expected[1]["layers"]["block"]["mlp"]["correction"]
    assert not correction.any()  # no gradient reaches what only chooses


@pytest.mark.long
@pytest.mark.parametrize("mesh", [dict(data=2, expert=2, tensor=2), dict(data=2, fsdp=2, tensor=2)],
                         ids=["expert", "fsdp"])
def test_a_mesh_computes_what_one_device_does(mesh):
    model, layout = model_of(), make_layout(MeshConfig(**mesh))
    placed = jax.device_put(params_of(), layout.tree(model.axes, model.shapes))

    @jax.jit
    def run(params, batch):
        with use_layout(layout):
            return loss_and_gradients(model)(params, batch)

    expected = loss_and_gradients(model)(params_of(), batch_of(4))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
                 run(placed, batch_of(4)), expected)


def test_attention_costs_the_sizes_of_keys_and_of_values():
    short, long = (flops_per_token(model_of(), n) for n in (100, 200))
    seen = (200 - 100) / 2  # more keys, on average, under causality
    assert long - short == pytest.approx(6 * 2 * 4 * (12 + 10) * seen)


@pytest.mark.parametrize("keys, refusal", [
    (dict(latent=KEYS["latent"] | {"rope_dim": 3}), "rope_dim: expected an even number"),
    (dict(latent={"query_rank": 8}), "query_rank: expected 0 without kv_rank"),
    (dict(num_kv_heads=2), "num_kv_heads: expected num_kv_heads at its default with latent"),
    (dict(sliding_window=4), "sliding_window: expected sliding_window at its default"),
    (dict(parametrization="mup", base_embed_dim=8), "parametrization: .* with latent.kv_rank"),
    (dict(moe=MOE | {"first_dense": 2}), "moe.first_dense: expected fewer than num_layers=2"),
    (dict(moe=MOE | {"groups": 3}), "moe.groups: expected a divisor of experts=8"),
    (dict(moe=MOE | {"top_groups": 0}), "moe.top_groups: expected 1 to groups=4"),
    (dict(moe=MOE | {"per_token": 5}), "moe.per_token: expected at most the 4 experts"),
    (dict(moe=MOE | {"scores": "tanh"}), "moe.scores: expected one of softmax, sigmoid")])
def test_refusals(keys, refusal):
    with pytest.raises(ValueError, match=refusal):
        config_of(**keys)
