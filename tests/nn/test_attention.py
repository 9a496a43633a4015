"""The mask by its rule, influence by gradients through the whole model, and rotary positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn.masking import AttentionMask
from lmjax.nn.positions import apply_rope, rope_rotation

B, T = 2, 12
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0],
                     [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0],
                      [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]], np.int32)


def visible(t, s, row, *, causal=True, window=0):
    """The rule: same document, not padding, not later, within the window."""
    if SEGMENTS[row, t] != SEGMENTS[row, s] or SEGMENTS[row, s] == 0:
        return False
    back = int(POSITIONS[row, t]) - int(POSITIONS[row, s])
    return (not causal or back >= 0) and (not window or abs(back) < window)


def mask_of(causal=True, window=0):
    positions, segments = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
    return AttentionMask(positions, positions, segments, segments, causal, window, in_order=True)


@pytest.mark.parametrize("causal, window", [
    (True, 0), (True, 1), (True, 3), (False, 0), (False, 2)])
def test_the_mask_is_the_rule(causal, window):
    mask = np.asarray(mask_of(causal, window).to_dense())
    rule = dict(causal=causal, window=window)
    expected = [[[visible(t, s, b, **rule) for s in range(T)] for t in range(T)]
                for b in range(B)]
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


# --- positions


def test_a_rotation_of_a_part_of_each_head_leaves_the_rest():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 16))
    rotation = rope_rotation(jnp.arange(3)[None], 6, 100.0)
    turned = apply_rope(x, rotation)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    np.testing.assert_array_equal(turned[..., :6], apply_rope(x[..., :6], rotation))
    assert float(jnp.abs(turned - x)[0, 1:, :, :6].min()) > 0


def test_rope_depends_on_distance_alone():
    """<R_m q, R_n k> is a function of m - n, and rotation keeps the norm."""
    q, k = (jax.random.normal(key, (1, 1, 1, 16)) for key in jax.random.split(jax.random.key(0)))

    def dot(m, n):
        at = [rope_rotation(jnp.full((1, 1), p, jnp.int32), 16, 10_000.0) for p in (m, n)]
        return float(jnp.sum(apply_rope(q, at[0]) * apply_rope(k, at[1])))

    assert dot(7, 3) == pytest.approx(dot(104, 100), abs=2e-4) == pytest.approx(dot(4, 0), abs=2e-4)
    assert abs(dot(7, 3) - dot(3, 7)) > 1e-2 and abs(dot(7, 3) - dot(8, 3)) > 1e-2
    turned = apply_rope(q, rope_rotation(jnp.full((1, 1), 9, jnp.int32), 16, 10_000.0))
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-6)


def test_rope_is_half_split():
    """Pairs are (i, i + K/2), each turned by position * theta^(-2i/K), in float64."""
    x, theta = np.random.default_rng(0).normal(size=(1, 5, 2, 8)), 100.0
    positions = np.array([[0, 1, 5, 17, 300]])
    rotation = rope_rotation(jnp.asarray(positions, jnp.int32), 8, theta)
    out = apply_rope(jnp.asarray(x, jnp.float32), rotation)
    pairs = x[..., :4] + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * theta ** (-np.arange(4) * 2 / 8))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=3e-5)


def test_rope_against_transformers():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install lmjax[oracle]")
    llama = pytest.importorskip(
        "transformers.models.llama.modeling_llama",
        reason="transformers is not installed: pip install lmjax[oracle]")
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 8)).astype(np.float32)
    positions = np.arange(6)[None] * 7
    angles = positions[..., None] * 10_000.0 ** (-np.arange(4) * 2 / 8)
    both = torch.tensor(np.concatenate([angles, angles], -1), dtype=torch.float32)
    heads_first = torch.tensor(x).transpose(1, 2)
    theirs, _ = llama.apply_rotary_pos_emb(heads_first, heads_first, both.cos(), both.sin())
    twice = jnp.asarray(np.repeat(positions, 2, 0), jnp.int32)
    ours = apply_rope(x, rope_rotation(twice, 8, 10_000.0))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-5)


# --- the whole model: which token can influence which

VARIANTS = {
    "rope": dict(positions="rope", num_kv_heads=1),
    "learned": dict(positions="learned", norm="layernorm", use_bias=True, mlp="gelu"),
    "none": dict(positions="none", qk_norm=True),
    "softcap": dict(attention_softcap=5.0, logit_softcap=10.0),
}


def influence(**keys):
    """|d hidden_t / d (input embedding of s)| [B, T, T], through the model's own code.

    Position t of row b holds token b * T + t, which occurs nowhere else. So the gradient of a
    hidden state by the embedding table tells positions apart.
    """
    config = dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_positions=T,
                  init_std=0.3)
    model = build_model(DecoderConfig(**(config | keys)), vocab_size=B * T, platform="cpu",
                        dtype=jnp.float32)
    params = model.init(jax.random.key(0))
    batch = {"tokens": jnp.arange(B * T, dtype=jnp.int32).reshape(B, T),
             "positions": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEGMENTS)}
    # Random weights: the plain sum of a norm's outputs may have no gradient.
    weight = jax.random.normal(jax.random.key(1), (model.config.embed_dim,))

    def outputs(table):
        hidden, *_ = model.hidden(params | {"embedding": {"table": table}}, batch)
        return hidden @ weight

    grads = jax.jit(jax.jacrev(outputs))(params["embedding"]["table"])  # [B, T, B * T, D]
    size = np.abs(np.asarray(grads)).max(-1).reshape(B, T, B, T)
    assert size[0, :, 1].max() == 0 and size[1, :, 0].max() == 0  # rows do not influence each other
    return np.stack([size[0, :, 0], size[1, :, 1]])


@pytest.mark.parametrize("name, window", [
    ("rope", 0), ("rope", 3), ("learned", 0),
    *(pytest.param(*case, marks=pytest.mark.long)
      for case in (("learned", 3), *itertools.product(("none", "softcap"), (0, 3))))])
def test_no_influence_from_the_future_other_documents_or_beyond_the_window(name, window):
    found = influence(**VARIANTS[name], sliding_window=window)
    for b, t, s in itertools.product(range(B), range(T), range(T)):
        if s == t:
            assert found[b, t, s] > 0
        elif visible(t, s, b, window=window):
            assert found[b, t, s] > 1e-8, f"row {b}: {t} does not see {s}"
        else:
            assert found[b, t, s] == 0, f"row {b}: {t} sees {s}"


def test_each_layer_widens_the_window_by_one_window():
    found = influence(num_layers=2, sliding_window=3)
    for t, s in itertools.product(range(9), range(9)):  # the nine tokens of row 1's first document
        assert (found[1, t, s] > 0) == (0 <= t - s <= 4)
