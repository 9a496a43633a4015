"""Which attention kernel runs: the choice of `auto`, refusals, and who reads a cache."""

import re

import jax.numpy as jnp
import pytest

from lmjax.errors import UserError
from lmjax.nn.kernels.choose import KERNELS, Needs, choose_kernel, kernel_for_cache

CHOICES = [
    (dict(platform="cpu", seq_len=256), "xla"),
    (dict(platform="cpu", seq_len=4096), "chunked"),
    (dict(platform="cpu", seq_len=4096, bias=True), "xla"),
    (dict(platform="tpu", head_dim=128, window=5, softcap=3.0), "splash"),
    (dict(platform="tpu", head_dim=128, bias=True), "xla"),
    (dict(platform="tpu", head_dim=12, seq_len=4096), "chunked"),
    (dict(platform="gpu", head_dim=64, seq_len=4096, dtype=jnp.bfloat16), "cudnn"),
    (dict(platform="gpu", head_dim=64, seq_len=4096, dtype=jnp.float32), "chunked"),
    (dict(platform="gpu", head_dim=256, seq_len=128, dtype=jnp.bfloat16), "xla"),
    (dict(platform="gpu", head_dim=64, seq_len=4096, softcap=30.0, dtype=jnp.bfloat16), "chunked"),
    (dict(platform="gpu", head_dim=64, seq_len=4096, context=True, dtype=jnp.bfloat16), "chunked"),
]


@pytest.mark.parametrize("needs, expected", CHOICES)
def test_auto_takes_the_fastest_that_can_and_says_why(needs, expected):
    kernel, reason = choose_kernel("auto", Needs(**needs))
    assert kernel.name == expected and kernel.note in reason
    assert ("where" in reason) == (needs["platform"] != "cpu" and expected in ("xla", "chunked"))


REFUSALS = [
    ("flesh", dict(platform="cpu"),
     "one of auto, xla, chunked, ring, splash, cudnn, got 'flesh'"),
    ("splash", dict(platform="cpu"), "platform cpu (only tpu)"),
    ("splash", dict(platform="tpu", bias=True), "bias"),
    ("splash", dict(platform="tpu", head_dim=36), "head_dim 36"),
    ("cudnn", dict(platform="gpu", head_dim=256), "head_dim 256 (multiples of 8 up to 128)"),
    ("cudnn", dict(platform="gpu", dtype=jnp.float32), "dtype float32 (bfloat16 or float16)"),
    ("cudnn", dict(platform="gpu", softcap=1.0), "softcap"),
    ("cudnn", dict(platform="gpu", window=4, causal=False), "two_sided_window"),
    ("chunked", dict(platform="cpu", bias=True), "bias"),
]


@pytest.mark.parametrize("name, needs, message", REFUSALS)
def test_a_kernel_that_cannot_serve_the_model_is_refused(name, needs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_kernel(name, Needs(**needs))


def test_a_cache_is_read_by_a_kernel_that_can_and_the_reason_says_so():
    cases = {("xla", 9, 10**6): "xla", ("chunked", 9, 8): "chunked", ("splash", 9, 64): "xla",
             ("cudnn", 9, 10**5): "chunked", **{(name, 1, 10**5): "xla" for name in KERNELS}}
    for (name, T, S), expected in cases.items():
        assert kernel_for_cache(KERNELS[name], T, S).name == expected
    _, reason = choose_kernel("splash", Needs("tpu", head_dim=128))
    assert "with a key/value cache xla" in reason
