"""Tests for an NVIDIA GPU, which `launch/gpu_check` runs on one.

On a CPU the chunked kernel takes cuDNN's place, so that the tests themselves are tested.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.pipeline import open_splits
from lmjax.nn.kernels.choose import KERNELS, attend, prepare
from lmjax.nn.masking import AttentionMask
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe

pytestmark = pytest.mark.gpu

PLATFORM = jax.devices()[0].platform
KERNEL = "cudnn" if PLATFORM == "gpu" else "chunked"
B, T, H, K = 2, 256, 4, 64
# Differences from the default call: one causal document per row, as many key/value as query heads.
CALLS = {
    "causal": {},
    "both ways": dict(causal=False),
    "grouped": dict(kv_heads=2),
    "window": dict(window=100),
    "documents": dict(documents=3, kv_heads=1),
    "documents in a window": dict(documents=3, window=30),
    "odd length": dict(length=T - 3, documents=2),
    "head of 128": dict(head_dim=128),
}
QUICK = {"documents in a window", "odd length"} if PLATFORM == "cpu" else set(CALLS)


def inputs(causal=True, kv_heads=H, window=0, documents=1, length=T, head_dim=K):
    """(q, k, v, weight of the output) in bfloat16, and the mask.

    The last tenth of each row is padding.
    """
    rng = np.random.default_rng(0)
    shapes = [(B, length, heads, head_dim) for heads in (H, kv_heads, kv_heads, H)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    filled = length * 9 // 10
    segments = np.zeros((B, length), np.int32)
    segments[:, :filled] = 1 + np.arange(filled) * documents // filled
    first = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = jnp.asarray(np.arange(length) - first, jnp.int32)
    segments = jnp.asarray(segments)
    return arrays, AttentionMask(positions, positions, segments, segments, causal, window)


def value_and_grads(arrays, mask, kernel, dtype):
    """Output [B, T, H, K] and gradients by q, k and v, in float32; the output of padding is 0."""
    q, k, v, weight = (x.astype(dtype) for x in arrays)
    used = (mask.q_segments > 0)[:, :, None, None]

    @jax.jit
    def f(q, k, v):
        y = attend(q, k, v, prepare(mask, kernel), scale=K**-0.5, kernel=kernel)
        y = jnp.where(used, y, 0)
        return jnp.sum((y * weight).astype(jnp.float32)), y

    (_, y), grads = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return [np.asarray(x, np.float32) for x in (y, *grads)]


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CALLS])
def test_the_fast_kernel_equals_the_reference(name):
    """The fast kernel in bfloat16 against the dense kernel in float32, on the same rounded inputs.

    The relative error is that of bfloat16.
    """
    arrays, mask = inputs(**CALLS[name])
    with jax.default_matmul_precision("highest"):
        exact = value_and_grads(arrays, mask, KERNELS["xla"], jnp.float32)
    fast = value_and_grads(arrays, mask, KERNELS[KERNEL], jnp.bfloat16)
    for array, got, want in zip(("y", "dq", "dk", "dv"), fast, exact, strict=True):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 0.015, (array, error)


def losses(attention, dtype, steps=4):
    recipe = build_recipe({
        "model": dict(num_layers=1, embed_dim=128, num_heads=2, mlp_dim=256, attention=attention),
        "data": {"sources": [{"name": "chain", "uri": "synthetic:64"}],
                 "tokenizer": {"vocab_size": 64}, "seq_len": 128},
        "optimizer": {"name": "adamw", "peak_lr": 1e-2, "warmup_steps": 2},
        "train": {"batch_size": 8, "compute_dtype": dtype, "steps": 100}})
    split, _ = open_splits(recipe.data, "")
    program = make_program(recipe, jax.devices()[:1], vocab_size=split.vocab_size,
                           fields=split.fields)
    step, state, found = program.traced.lower().compile(), program.spec.init(0), []
    for i in range(steps):
        rows = split.rows(np.arange(8 * i, 8 * i + 8))
        batch = jax.device_put(rows, program.layout.sharding(("batch", "seq")))
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return program.model.kernel.name, found


@pytest.mark.long
def test_a_model_learns_with_the_kernel_that_auto_takes():
    """The losses in bfloat16 with the fast kernel are those in float32 with the dense kernel."""
    kernel, fast = losses("auto" if PLATFORM == "gpu" else KERNEL, "bfloat16")
    _, exact = losses("xla", "float32")
    assert kernel == KERNEL and exact[-1] < exact[0] - 0.5
    np.testing.assert_allclose(fast, exact, rtol=0.02)


def test_the_step_on_a_gpu_calls_cudnn():
    arrays, mask = inputs()
    step = jax.jit(functools.partial(attend, mask=mask, scale=1.0, kernel=KERNELS[KERNEL]))
    text = step.lower(*arrays[:3]).compile().as_text()
    assert ('custom_call_target="__cudnn' in text) == (PLATFORM == "gpu")
