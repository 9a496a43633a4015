"""Every attention kernel with every feature that it claims, against a loop in NumPy float64."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.nn.kernels import chunked, splash, xla
from lmjax.nn.kernels.choose import (
    ALL,
    KERNELS,
    attend,
    prepare,
    uses_balanced_rows,
)
from lmjax.nn.kv_cache import Int8Rows, like
from lmjax.nn.masking import AttentionMask
from lmjax.nn.sequence import balance_sequence
from lmjax.sharding import MeshConfig, make_layout, use_layout

B, T = 2, 12
HEAD = 8
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0],
                     [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0],
                      [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]], np.int32)
PACKED = dict(positions=(POSITIONS, POSITIONS), segments=(SEGMENTS, SEGMENTS))
ONE = np.ones((B, T), np.int32)

DEFAULTS = dict(positions=None, segments=(ONE, ONE), causal=True, window=0, in_order=True,
                kv_heads=4, softcap=0.0, bias=0, prefix=None, sinks=False, mesh=None, size=1.0)
# For each feature, a call that needs it and as few others as possible.
CALLS = {
    "segments": PACKED,
    "gqa": dict(kv_heads=1),
    "cross": dict(causal=False, in_order=False, segments=(
        SEGMENTS, np.array([[1] * 5 + [0] * 3, [1] * 4 + [2] * 4], np.int32))),
    "window": dict(window=3),
    "two_sided_window": dict(window=3, causal=False, **PACKED),
    "softcap": dict(softcap=2.0),
    "bias": dict(bias=1),
    "sinks": dict(sinks=True),
    "prefix": dict(prefix=np.array(
        [[1] * 3 + [0] * (T - 3), [0] * 4 + [1] * 2 + [0] * (T - 6)], np.int32)),
    "cache": dict(positions=(POSITIONS[:1, 5:8].repeat(2, 0) + np.array([[4], [1]]),
                             np.arange(T)[None].repeat(2, 0)),
                  segments=(ONE[:, :3], ONE), in_order=False, window=5),
    "context": dict(mesh=dict(data=2, context=2, tensor=2), window=5, **PACKED),
}
BESIDES = {  # the features that a call needs besides its own
    "two_sided_window": {"window", "segments"}, "cache": {"cross", "window"},
    "context": {"window", "segments"}, "cross": {"segments"},
}
# The default run checks the features that any kernel has in one call, and the others here.
TOGETHER = {"segments", "gqa", "window", "softcap", "sinks"}
QUICK = {("xla", "bias"), ("xla", "prefix"), ("xla", "cache"), ("chunked", "cache"),
         ("chunked", "two_sided_window"), ("cudnn", "cross"), ("splash", "cross"),
         ("splash", "two_sided_window"), ("chunked", "context")}


def quick(cases, chosen):
    """All `cases` for the long run, of which those `chosen` are in the default run, too."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)),
                         marks=() if case in chosen else pytest.mark.long) for case in cases]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per row, of which the last is padded.

    JAX's own code for the same arguments takes cuDNN's place.
    """
    monkeypatch.setattr(chunked, "QUERIES", 5)
    monkeypatch.setattr(chunked, "SCORES", 5 * 4)
    monkeypatch.setattr(xla, "MIN_QUERIES", 5)
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        functools.partial(_stand_in, jax.nn.dot_product_attention))


def _stand_in(run, *args, implementation, **kwargs):
    assert implementation == "cudnn"
    return run(*args, implementation="xla", **kwargs)


def sees(b, t, s, mask):
    """The rule: same document, not padding, not later unless in a prefix, within the window."""
    if mask.q_segments[b, t] != mask.kv_segments[b, s] or mask.kv_segments[b, s] == 0:
        return False
    back = int(mask.q_positions[b, t]) - int(mask.kv_positions[b, s])
    early = mask.kv_prefix is not None and mask.kv_prefix[b, s] > 0
    return (not mask.causal or back >= 0 or early) and (not mask.window or abs(back) < mask.window)


def naive(q, k, v, bias, sinks, mask, scale, softcap):
    """out[b, t, h] in float64, one query and head at a time."""
    out = np.zeros(q.shape, np.float64)
    for b, t in itertools.product(*map(range, q.shape[:2])):
        keys = [s for s in range(k.shape[1]) if sees(b, t, s, mask)]
        for h in range(q.shape[2] if keys else 0):
            g = h // (q.shape[2] // k.shape[2])
            scores = k[b, keys, g].astype(np.float64) @ q[b, t, h] * scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            scores += 0 if bias is None else bias[b % len(bias), h, t, keys]
            weights = np.exp(scores - scores.max())
            sink = 0 if sinks is None else np.exp(sinks[h] - scores.max())
            out[b, t, h] = weights / (weights.sum() + sink) @ v[b, keys, g].astype(np.float64)
    return out


def call(**keys):
    """([q, k, v, bias, sinks], mask, softcap, mesh): a row of `CALLS`, defaults for the rest."""
    c = types.SimpleNamespace(**DEFAULTS | keys)
    rows, columns = (s.shape[1] for s in c.segments)
    positions = c.positions or tuple(np.arange(n)[None].repeat(B, 0) for n in (rows, columns))
    rng = np.random.default_rng(0)
    shapes = ((B, rows, 4, HEAD), (B, columns, c.kv_heads, HEAD), (B, columns, c.kv_heads, HEAD))
    arrays = [(c.size * rng.normal(size=s)).astype(np.float32) for s in shapes]
    bias = rng.normal(size=(c.bias, 4, rows, columns)).astype(np.float32) if c.bias else None
    mask = AttentionMask(*(np.asarray(x, np.int32) for x in (*positions, *c.segments)), c.causal,
                         c.window, c.prefix, c.in_order)
    sinks = rng.normal(size=4).astype(np.float32) if c.sinks else None
    return [*arrays, bias, sinks], mask, c.softcap, c.mesh


def run(kernel, arrays, mask, softcap, mesh):
    """(out, pull) of the production code.

    cuDNN takes no float32, so its stand-in is called without that check.
    """
    kernel, mask = KERNELS[kernel], on_device(mask)
    how = dict(scale=0.15, softcap=softcap)

    def f(q, k, v, bias, sinks):
        with use_layout(make_layout(MeshConfig(**mesh)) if mesh else None):
            if kernel.name == "cudnn":
                return kernel.run(q, k, v, mask, bias=bias, **how)
            return attend(q, k, v, prepare(mask, kernel), bias=bias, sinks=sinks, kernel=kernel,
                          **how)

    return jax.vjp(jax.jit(f), *(None if x is None else jnp.asarray(x) for x in arrays))


def on_device(mask):
    arrays = {name: jnp.asarray(getattr(mask, name)) for name in mask._fields[:4]}
    return mask._replace(**arrays)


@pytest.mark.parametrize("kernel, feature", quick(
    [(name, f) for name, kernel in KERNELS.items() for f in sorted(kernel.can)], QUICK))
def test_a_kernel_can_do_what_it_claims(kernel, feature):
    check_against_loop(kernel, CALLS[feature])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_can_do_several_things_at_once(kernel):
    keys = {}
    for feature in sorted(TOGETHER & KERNELS[kernel].can):
        keys |= CALLS[feature]
    check_against_loop(kernel, keys)


def check_against_loop(kernel, keys):
    """Checks values against the loop, and gradients against its differences.

    The gradients by all inputs are checked along one random direction.
    """
    arrays, mask, softcap, mesh = call(**keys)
    out, pull = run(kernel, arrays, mask, softcap, mesh)
    np.testing.assert_allclose(out, naive(*arrays, mask, 0.15, softcap), atol=3e-6, rtol=2e-5)
    rng = np.random.default_rng(3)
    weight = rng.normal(size=out.shape)
    ways = [None if x is None else rng.normal(size=x.shape) for x in arrays]

    def exact(step):
        moved = [x if w is None else x + step * w for x, w in zip(arrays, ways, strict=True)]
        return (naive(*moved, mask, 0.15, softcap) * weight).sum()

    grads = pull(jnp.asarray(weight, out.dtype))
    along = sum((np.asarray(g, np.float64) * w).sum()
                for g, w in zip(grads, ways, strict=True) if w is not None)
    np.testing.assert_allclose(along, (exact(1e-5) - exact(-1e-5)) / 2e-5, rtol=3e-5)


@pytest.mark.parametrize("kernel, feature", [
    (name, f) for name, kernel in KERNELS.items() for f in sorted(ALL - kernel.can)])
def test_a_kernel_refuses_what_it_does_not_claim(kernel, feature):
    (q, k, v, bias, sinks), mask, softcap, mesh = call(**CALLS[feature])
    if not BESIDES.get(feature, set()) <= KERNELS[kernel].can:
        pytest.fail("the call has to fail for one reason alone")
    with use_layout(make_layout(MeshConfig(**mesh)) if mesh else None):
        with pytest.raises(UserError, match=f"expected a kernel for {feature} .*got '{kernel}', "
                                            "which cannot; use "):
            attend(q, k, v, mask, scale=1.0, softcap=softcap, bias=bias, sinks=sinks,
                   kernel=KERNELS[kernel])


def test_every_feature_has_a_call():
    assert set(CALLS) == ALL == set().union(*(kernel.can for kernel in KERNELS.values()))


def test_an_int8_cache_has_sinks():
    (q, k, v, _, sinks), mask, *_ = call(kv_heads=2, sinks=True, **PACKED)
    k, v = (like(jnp.asarray(x), Int8Rows(None, None)) for x in (k, v))
    out, alone = (attend(q, *kv, mask, scale=0.15, sinks=jnp.asarray(sinks), kernel=KERNELS["xla"])
                  for kv in ((k, v), (k.dense(jnp.float32), v.dense(jnp.float32))))
    np.testing.assert_allclose(out, alone, atol=3e-6)


def test_a_bias_per_row():
    arrays, mask, softcap, _ = call(bias=B, softcap=2.0, kv_heads=2)
    out, pull = run("xla", arrays, mask, softcap, None)
    np.testing.assert_allclose(out, naive(*arrays, mask, 0.15, softcap), atol=3e-6, rtol=2e-5)
    assert pull(out)[3].shape == (B, 4, T, T)


@pytest.mark.parametrize("kernel", quick(KERNELS, {"xla", "chunked", "splash"}))
def test_large_scores_do_not_overflow(kernel):
    arrays, mask, *rest = call(size=100.0, **PACKED)
    out, _ = run(kernel, arrays, mask, *rest)
    np.testing.assert_allclose(out, naive(*arrays, mask, 0.15, 0.0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kernel", quick(KERNELS, {"xla", "chunked", "splash", "cudnn"}))
def test_queries_that_see_nothing_give_zero_and_finite_gradients(kernel):
    """Row 0's padding, and in row 1 three queries of a document without keys."""
    arrays, mask, *rest = call(causal=False, in_order=False, segments=(
        SEGMENTS, np.where(SEGMENTS == 2, 7, SEGMENTS)))
    out, pull = run(kernel, arrays, mask, *rest)
    blind = np.array([[b, t] for b in range(B) for t in range(T) if SEGMENTS[b, t] in (0, 2)]).T
    assert blind.shape[1] == 8
    assert (np.asarray(out)[tuple(blind)] == 0).all()
    assert np.count_nonzero(np.abs(out).sum((-1, -2))) == B * T - 8
    grads = [np.asarray(g) for g in pull(jnp.ones_like(out))[:3]]
    assert all(np.isfinite(g).all() for g in grads)
    assert (grads[0][tuple(blind)] == 0).all()
    assert (grads[1][0, -2:] == 0).all() and (grads[2][0, -2:] == 0).all()


@pytest.mark.parametrize("kernel", quick(
    [name for name in KERNELS if "context" in KERNELS[name].can], {"chunked", "splash"}))
def test_heads_split_further_than_keys(kernel):
    """Four query heads on four devices, of which two each share a key/value head."""
    arrays, mask, *_ = call(kv_heads=2, sinks=True, **PACKED)
    mesh = dict(data=2, tensor=4)
    out, pull = run(kernel, arrays, mask, 0.0, mesh)
    alone, pull_alone = run("xla", arrays, mask, 0.0, None)
    np.testing.assert_allclose(out, alone, atol=3e-6)
    for ours, theirs in zip(jax.tree.leaves(pull(out)), jax.tree.leaves(pull_alone(out)),
                            strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mesh", [
    dict(context=4, tensor=2), pytest.param(dict(data=4, context=2), marks=pytest.mark.long)])
def test_a_ring_passes_keys_on_and_never_gathers_them(mesh):
    """Values and gradients equal those of one device; only collective-permutes move the keys."""
    (q, k, v, _, sinks), mask, *_ = call(
        kv_heads=2, sinks=True, segments=[np.repeat(SEGMENTS, 2, 0)] * 2,
        positions=[np.repeat(POSITIONS, 2, 0)] * 2)
    q, k, v = (np.concatenate([x, x[::-1]]) for x in (q, k, v))
    arrays = q, k, v, None, sinks
    out, pull = run("ring", arrays, mask, 3.0, mesh)
    alone, pull_alone = run("xla", arrays, mask, 3.0, None)
    np.testing.assert_allclose(out, alone, atol=3e-6)
    for ours, theirs in zip(jax.tree.leaves(pull(out)), jax.tree.leaves(pull_alone(out)),
                            strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    layout = make_layout(MeshConfig(**mesh))
    sharding = layout.sharding(("batch", "seq", "act_heads", None))

    def loss(*qkv):
        with use_layout(layout):
            return jnp.sum(attend(*qkv, on_device(mask), scale=1.0, kernel=KERNELS["ring"]))

    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in (q, k, v)]
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=sharding)
    text = step.lower(*args).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.long
@pytest.mark.parametrize("kernel, T, window", quick(
    [("ring", 24, 0), ("ring", 24, 5), ("splash", 512, 0), ("splash", 512, 200)],
    {("ring", 24, 5), ("splash", 512, 0)}))
def test_balanced_rows_equal_rows_in_reading_order(kernel, T, window):
    """Each device holds an early and a late piece; values and gradients are those of one device."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, T, heads, HEAD)), jnp.float32)
               for heads in (4, 2, 2))
    second = np.arange(T)[None] >= rng.integers(T // 4, T, (4, 1))
    segments = jnp.asarray(1 + second, jnp.int32).at[0, -T // 8:].set(0)
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (4, T))
    layout = make_layout(MeshConfig(data=2, context=2, tensor=2))
    how = dict(scale=0.3, softcap=3.0)

    def apart(q, k, v):
        with use_layout(layout):
            assert uses_balanced_rows(KERNELS[kernel], T, causal=True)
            assert not uses_balanced_rows(KERNELS[kernel], T - 2, causal=True)
            q, k, v, rows, index = map(balance_sequence, (q, k, v, segments, at))
            mask = AttentionMask(index, index, rows, rows, window=window, in_order=True,
                                 reading_index=index)
            return balance_sequence(attend(q, k, v, mask, kernel=KERNELS[kernel], **how), back=True)

    def together(q, k, v):
        mask = AttentionMask(at, at, segments, segments, window=window, in_order=True)
        return attend(q, k, v, mask, kernel=KERNELS["xla"], **how)

    out, pull = jax.vjp(jax.jit(apart), q, k, v)
    alone, pull_alone = jax.vjp(jax.jit(together), q, k, v)
    np.testing.assert_allclose(out, alone, atol=3e-6)
    for ours, theirs in zip(pull(alone), pull_alone(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window, softcap", quick([(0, 0.0), (200, 3.0)], {(200, 3.0)}))
def test_splash_over_many_tiles(monkeypatch, window, softcap):
    """Values and gradients with more tiles of keys than the fused backward kernel takes.

    A block holds two tiles. The rows hold documents, so that some tiles see nothing.
    """
    sizes = splash.DEFAULT_TILES._replace(
        queries=128, keys=256, compute=128, dq_queries=128, dq_keys=128, dkv_queries=128,
        dkv_keys=128, dkv_compute=128)
    monkeypatch.setattr(splash, "DEFAULT_TILES", sizes)
    T, rng = 768, np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, HEAD)), jnp.float32)
               for heads in (4, 2, 2))
    segments = 1 + np.searchsorted([300, 560], np.arange(T), "right")[None].repeat(2, 0)
    segments = jnp.asarray(segments, jnp.int32).at[1, 700:].set(0)
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    mask = AttentionMask(at, at, segments, segments, window=window, in_order=True)

    def f(q, k, v, kernel):
        return attend(q, k, v, mask, scale=0.3, softcap=softcap, kernel=KERNELS[kernel])

    (out, pull), (alone, pull_alone) = (
        jax.vjp(jax.jit(functools.partial(f, kernel=name)), q, k, v) for name in ("splash", "xla"))
    assert T // 128 > splash.MAX_FUSED_TILES
    np.testing.assert_allclose(out, alone, atol=3e-6)
    for ours, theirs in zip(pull(alone), pull_alone(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("balanced, tiles", [(True, [9] * 4), (False, [3, 7, 11, 15])])
def test_balanced_rows_give_every_device_as_many_tiles(balanced, tiles):
    sizes = splash.fit(splash.DEFAULT_TILES, 128, 1024)
    sizes = sizes._replace(**{name: 128 for name in sizes._fields})
    mask = splash.IndexMask(1024, 1024, True, 0, 4, balanced)
    kernel = splash.make_kernel(mask, 1, 0.0, sizes, True)
    visited = np.asarray(kernel.fwd_mask_info.block_mask)[0] > 0
    assert [int(rows.sum()) for rows in np.split(visited, 4)] == tiles


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_bfloat16_gradients_against_float32(kernel):
    """If all keys have the same value, the gradients of queries and keys are 0.

    The two terms that the backward pass subtracts then have to agree to more than the eight bits of
    bfloat16.
    """
    rng = np.random.default_rng(0)
    keys, heads, groups, dim = 8, 4, 2, 64  # weights of 1/8, which bfloat16 holds
    q, g = rng.normal(size=(2, 1, keys, heads, dim))
    k, v = np.broadcast_to(rng.normal(size=(2, 1, 1, groups, dim)), (2, 1, keys, groups, dim))
    where, one = np.arange(keys, dtype=np.int32)[None], np.ones((1, keys), np.int32)
    mask = AttentionMask(where, where, one, one, causal=False)

    def gradients(dtype):
        # The same numbers in both dtypes.
        exact = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (q, k, v, g)]
        _, pull = jax.vjp(
            lambda *qkv: attend(*qkv, mask, scale=0.125, kernel=KERNELS[kernel]), *exact[:3])
        return [np.asarray(x, np.float32) for x in pull(exact[3])]

    (dq, dk, dv), (dq32, dk32, dv32) = gradients(jnp.bfloat16), gradients(jnp.float32)
    np.testing.assert_allclose(dv, dv32, rtol=2**-8)
    np.testing.assert_allclose(dq, dq32, atol=1e-5)
    np.testing.assert_allclose(dk, dk32, atol=1e-5)
