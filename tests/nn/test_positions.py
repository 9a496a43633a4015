"""Rotary scalings and relative buckets against transformers, sinusoids against their formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.positions import RopeScaling, relative_buckets, rope_rotation, sinusoids

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
K, THETA = 16, 500.0
# our scaling -> the arguments of transformers'
SCALINGS = {
    "none": (RopeScaling(), dict(rope_type="default")),
    "linear": (RopeScaling(kind="linear", factor=4.0), dict(rope_type="linear", factor=4.0)),
    "ntk": (RopeScaling(kind="ntk", factor=2.0, original_positions=64, length=200),
            dict(rope_type="dynamic", factor=2.0)),
    "llama3": (RopeScaling(kind="llama3", factor=8.0, original_positions=64),
               dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=64)),
    "yarn": (RopeScaling(kind="yarn", factor=8.0, original_positions=64, beta_fast=4.0),
             dict(rope_type="yarn", factor=8.0, beta_fast=4.0,
                  original_max_position_embeddings=64)),
    "yarn-factor": (
        RopeScaling(kind="yarn", factor=8.0, original_positions=64, attention_factor=1.5),
        dict(rope_type="yarn", factor=8.0, attention_factor=1.5,
             original_max_position_embeddings=64)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling, keys = SCALINGS[name]
    config = LlamaConfig(hidden_size=2 * K, num_attention_heads=2, max_position_embeddings=64,
                         rope_parameters={"rope_theta": THETA, **keys})
    positions = np.arange(200)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    ours = rope_rotation(jnp.asarray(positions, jnp.int32), K, THETA, scaling)
    for a, b in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(a, b[..., : K // 2], atol=3e-5)
    if name != "none":
        plain = rope_rotation(jnp.asarray(positions, jnp.int32), K, THETA)
        assert np.abs(plain[0] - ours[0]).max() > 0.1


def test_ntk_raises_theta_by_the_factor_where_no_length_is_given():
    """The fastest frequency stays, the slowest falls by exactly the factor."""
    positions, scaling = jnp.ones((1, 1), jnp.int32), RopeScaling(kind="ntk", factor=4.0)
    plain, ours = (np.arctan2(sin, cos)[0, 0] for cos, sin in (
        rope_rotation(positions, K, THETA), rope_rotation(positions, K, THETA, scaling)))
    np.testing.assert_allclose((plain / ours)[[0, -1]], [1.0, 4.0], rtol=1e-5)


def test_invalid_scalings_are_refused():
    refused = {
        "original_positions: expected at least 1": dict(kind="yarn"),
        "kind: expected one of none, linear, ntk, llama3, yarn": dict(kind="nkt"),
        "factor: expected at least 1": dict(factor=0.5),
        "high_freq_factor: expected more than low_freq_factor=1.0, got 1.0; raise it":
            dict(kind="llama3", original_positions=8, high_freq_factor=1.0),
    }
    for message, keys in refused.items():
        with pytest.raises(ValueError, match=message):
            RopeScaling(**keys)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 12), (16, 100)])
def test_relative_buckets_are_those_of_transformers(bidirectional, buckets, distance):
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = np.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(torch.tensor(offsets), bidirectional, buckets,
                                                     distance)
    ours = relative_buckets(jnp.zeros((1, 1), jnp.int32), jnp.asarray(offsets[None], jnp.int32),
                            bidirectional=bidirectional, buckets=buckets, distance=distance)
    np.testing.assert_array_equal(ours[0, 0], expected)


def test_sinusoids():
    positions = np.array([[0, 1, 7, 500]])
    angles = positions[..., None] / 10_000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(sinusoids(jnp.asarray(positions, jnp.int32), 8),
                               np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=3e-5)
