"""Attention against a loop in numpy float64, and what no position may learn about another, by gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models import build_model
from lmjax.models.decoder import DecoderConfig
from lmjax.nn.kernels import KERNELS, attend, choose_kernel
from lmjax.nn.positions import apply_rope, rope_rotation
from lmjax.nn.visibility import Visibility

B, T, H, G, K = 2, 12, 4, 2, 8
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]], np.int32)


def visible(t, s, row, *, causal=True, window=0):
    """The rule in words: same document, not padding, not later, nearer than the window."""
    if SEGMENTS[row, t] != SEGMENTS[row, s] or SEGMENTS[row, s] == 0:
        return False
    back = int(POSITIONS[row, t]) - int(POSITIONS[row, s])
    return (not causal or back >= 0) and (not window or abs(back) < window)


def naive(q, k, v, sees, scale, softcap):
    """out[b, t, h] in float64, one query and head at a time; sees(b, t, s) -> bool."""
    out = np.zeros(q.shape, np.float64)
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if keys:
            g = h // (q.shape[2] // k.shape[2])
            scores = np.array([q[b, t, h].astype(np.float64) @ k[b, s, g] for s in keys]) * scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, keys, g].astype(np.float64)
    return out


def qkv(seed=0, kv_heads=G, size=1.0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, K), (B, T, kv_heads, K), (B, T, kv_heads, K))
    return [(size * rng.normal(size=s)).astype(np.float32) for s in shapes]


def seeing(causal=True, window=0):
    at = jnp.asarray(POSITIONS), jnp.asarray(POSITIONS)
    return Visibility(*at, jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), causal=causal, window=window, in_order=True)


@pytest.mark.parametrize("causal, window", [(True, 0), (True, 1), (True, 3), (False, 0), (False, 2)])
def test_visibility_is_the_rule(causal, window):
    mask = np.asarray(seeing(causal, window).mask())
    rule = dict(causal=causal, window=window)
    expected = [[[visible(t, s, b, **rule) for s in range(T)] for t in range(T)] for b in range(B)]
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window, softcap, causal", [(0, 0.0, True), (3, 0.0, True), (3, 2.0, True), (0, 0.0, False)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_against_a_loop(kernel, kv_heads, window, softcap, causal):
    q, k, v = qkv(kv_heads=kv_heads, size=2.0)
    if softcap and not KERNELS[kernel].softcap:
        pytest.skip(f"{kernel} has no softcap, and choose_kernel says so")
    out = attend(q, k, v, seeing(causal, window), scale=0.4, softcap=softcap, kernel=kernel)
    expected = naive(q, k, v, lambda b, t, s: visible(t, s, b, causal=causal, window=window), 0.4, softcap)
    np.testing.assert_allclose(out, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel):
    q, k, v = qkv(size=100.0)
    out = attend(q, k, v, seeing(), scale=1.0, kernel=kernel)
    np.testing.assert_allclose(out, naive(q, k, v, lambda b, t, s: visible(t, s, b), 1.0, 0.0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_that_see_nothing_give_zero_and_finite_gradients(kernel, softcap):
    q, k, v = qkv()
    see = seeing()
    see = see._replace(q_segments=see.q_segments.at[1, 4].set(9))  # besides row 0's padding

    def run(q, k, v):
        return attend(q, k, v, see, scale=0.4, softcap=softcap, kernel=kernel)

    out, pull = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
    blind = ~np.asarray(see.mask()).any(-1)
    assert blind.sum() == 3
    assert (np.asarray(out)[blind] == 0).all() and (np.asarray(out)[~blind] != 0).all()
    dq, dk, dv = pull(jnp.ones_like(out))
    assert all(np.isfinite(g).all() for g in (dq, dk, dv))
    assert (np.asarray(dq)[blind] == 0).all()
    assert (np.asarray(dk)[0, -2:] == 0).all() and (np.asarray(dv)[0, -2:] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_against_differences(kernel):
    """The vector-Jacobian product along a random direction, against the loop in float64."""
    q, k, v = qkv()
    rng = np.random.default_rng(3)
    dirs, weight = [rng.normal(size=x.shape) for x in (q, k, v)], rng.normal(size=q.shape)

    def loss(*args):
        return jnp.sum(attend(*args, seeing(window=3), scale=0.4, softcap=2.0, kernel=kernel) * weight)

    def exact(step):
        moved = [x + step * d for x, d in zip((q, k, v), dirs, strict=True)]
        return (naive(*moved, lambda b, t, s: visible(t, s, b, window=3), 0.4, 2.0) * weight).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (q, k, v)))
    along = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(grads, dirs, strict=True))
    np.testing.assert_allclose(along, (exact(1e-5) - exact(-1e-5)) / 2e-5, rtol=2e-5)


def test_kernel_choice_says_why_or_refuses():
    name, reason = choose_kernel("auto", "cpu", softcap=0.0)
    assert name in KERNELS and reason
    assert choose_kernel("xla", "tpu", softcap=30.0)[0] == "xla"
    with pytest.raises(ValueError, match="expected one of auto, xla.*got 'flesh'; "):
        choose_kernel("flesh", "cpu", softcap=0.0)


# --- positions


def test_rope_depends_on_distance_alone():
    """<R_m q, R_n k> is a function of m - n, and rotation keeps lengths."""
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
    out = apply_rope(jnp.asarray(x, jnp.float32), rope_rotation(jnp.asarray(positions, jnp.int32), 8, theta))
    pairs = x[..., :4] + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * theta ** (-np.arange(4) * 2 / 8))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=3e-5)


def test_rope_against_transformers():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install lmjax[oracle]")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama",
                                reason="transformers is not installed: pip install lmjax[oracle]")
    x, positions = np.random.default_rng(0).normal(size=(2, 6, 3, 8)).astype(np.float32), np.arange(6)[None] * 7
    angles = positions[..., None] * 10_000.0 ** (-np.arange(4) * 2 / 8)
    both = torch.tensor(np.concatenate([angles, angles], -1), dtype=torch.float32)
    theirs, _ = llama.apply_rotary_pos_emb(torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2),
                                           both.cos(), both.sin())
    ours = apply_rope(x, rope_rotation(jnp.asarray(np.repeat(positions, 2, 0), jnp.int32), 8, 10_000.0))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-5)


# --- the whole model: who can influence whom

VARIANTS = {
    "rope": dict(positions="rope", num_kv_heads=1),
    "learned": dict(positions="learned", norm="layernorm", use_bias=True, mlp="gelu"),
    "none": dict(positions="none", qk_norm=True),
    "softcap": dict(attention_softcap=5.0, logit_softcap=10.0),
}


def influence(**keys):
    """|d hidden_t / d (input embedding of s)| [B, T, T], through the model's own code.

    Every input position is given a token of its own (t of row b: token b * T + t), so that the gradient
    of a hidden state by the embedding table tells positions apart.
    """
    config = dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_positions=T, init_std=0.3)
    model = build_model(DecoderConfig(**(config | keys)), vocab_size=B * T, platform="cpu", dtype=jnp.float32)
    params = model.init(jax.random.key(0))
    batch = {"tokens": jnp.arange(B * T, dtype=jnp.int32).reshape(B, T), "positions": jnp.asarray(POSITIONS),
             "segment_ids": jnp.asarray(SEGMENTS)}
    weight = jax.random.normal(jax.random.key(1), (model.config.embed_dim,))  # the sum of a norm's outputs is flat

    def outputs(table):
        hidden, _ = model.hidden(params | {"embedding": {"table": table}}, batch)
        return hidden @ weight

    grads = jax.jit(jax.jacrev(outputs))(params["embedding"]["table"])  # [B, T, B * T, D]
    size = np.abs(np.asarray(grads)).max(-1).reshape(B, T, B, T)
    assert size[0, :, 1].max() == 0 and size[1, :, 0].max() == 0  # rows know nothing of each other
    return np.stack([size[0, :, 0], size[1, :, 1]])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_influence_from_the_future_other_documents_or_beyond_the_window(name, window):
    found = influence(**VARIANTS[name], sliding_window=window)
    for b, t, s in itertools.product(range(B), range(T), range(T)):
        if s == t:
            assert found[b, t, s] > 0
        elif visible(t, s, b, window=window):
            assert found[b, t, s] > 1e-8, f"row {b}: {t} does not see {s}"
        else:
            assert found[b, t, s] == 0, f"row {b}: {t} sees {s}"


def test_the_window_widens_by_a_window_a_layer():
    found = influence(num_layers=2, sliding_window=3)
    for t, s in itertools.product(range(9), range(9)):  # the nine tokens of row 1's first document
        assert (found[1, t, s] > 0) == (0 <= t - s <= 4)
