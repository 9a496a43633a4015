"""8-bit matmuls against a twin in NumPy, in the step, and on a run."""

import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from processes import lines

from lmjax.data.rows import DECODER
from lmjax.nn.ops import matmul
from lmjax.nn.quantized import MATMUL_DTYPES, check_matmul_dtype, matmuls_in
from lmjax.training.loop import train
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe

pytest.importorskip("qwix", reason="not installed: pip install lmjax[qwix]")
RNG = np.random.default_rng(0)
X, W, G = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 5, 16), (16, 7), (2, 5, 7)))
X[0, 0], W[:, 2] = 0, 0  # nothing to scale by
X[1], W[:, 3], G[0] = X[1] * 1e3, W[:, 3] * 1e-3, G[0] * 1e-6


def off(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The largest rounding error of each element of x [..., K], whose rows are scaled one by one.

    It is half a step of int8, or half a unit in the last place of fp8.
    """
    dtype = np.dtype(dtype)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    if dtype == np.int8:
        return np.broadcast_to(largest / 127.5 / 2, x.shape)
    info = ml_dtypes.finfo(dtype)
    smallest = largest / float(info.max) * float(info.smallest_subnormal)
    return np.abs(x) * float(info.eps) / 2 + smallest / 2


def check(got: np.ndarray, a: np.ndarray, b: np.ndarray,
          dtypes: tuple[np.dtype, np.dtype]) -> None:
    """Checks that got is a [..., K] by b [N, K], up to their rounding errors but not exactly."""
    off_a, off_b = off(a, dtypes[0]), off(b, dtypes[1])
    bound = off_a @ np.abs(b).T + np.abs(a) @ off_b.T + off_a @ off_b.T
    error = np.abs(got - a @ b.T)
    assert (error <= bound * 1.001 + 1e-6 * np.abs(a) @ np.abs(b).T).all()
    assert error.sum() > 0.03 * bound.sum()  # the operands were rounded


@pytest.mark.long
@pytest.mark.parametrize("kind", MATMUL_DTYPES)
def test_each_row_and_column_has_its_own_scale(kind):
    with matmuls_in(kind):
        y, gradient = jax.vjp(lambda x, w: matmul(x, w, ("embed", "mlp")), X, W)
        d_x, d_w = gradient(jnp.asarray(G))
    low = MATMUL_DTYPES[kind]
    check(y, X, W.T, (low.values, low.values))
    check(d_x, G, W, (low.gradients, low.values))
    # The weight's gradient is in the compute dtype.
    np.testing.assert_allclose(d_w, np.einsum("btd,btf->df", X, G), rtol=1e-5, atol=1e-5)


def recipe(**train):
    return build_recipe({
        "model": {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2,
                  "mlp_dim": 64, **train.pop("model", {})},
        "data": {"sources": [{"name": "chain", "uri": "synthetic"}],
                 "tokenizer": {"vocab_size": 64}, "seq_len": 32},
        "optimizer": {"name": "adamw", "peak_lr": 1e-2, "warmup_steps": 10},
        "mesh": {"data": 2, "fsdp": 4},
        "train": {"steps": 60, "batch_size": 16, **train}})


EXPERTS = {"moe": {"experts": 4, "per_token": 2}}


@pytest.mark.parametrize("model, layers", [
    ({}, 7), pytest.param(EXPERTS, 4, marks=pytest.mark.long)], ids=["dense", "experts"])
def test_which_matmuls_of_a_step_are_in_8_bits(model, layers):
    """Two per matrix of the scanned layer: forward, and the gradient of the input.

    The gradients of weights, the router and the logits are not.
    """
    def eight(kind: str) -> int:
        program = make_program(recipe(matmul_dtype=kind, model=model), jax.devices(),
                               vocab_size=64, fields=dict.fromkeys(DECODER, 32))
        return program.traced.lower().as_text().count("xi8>) -> tensor<")

    assert (eight("int8"), eight("auto")) == (2 * layers, 0)


@pytest.mark.slow
def test_a_run_learns_as_well_as_without_8_bits(tmp_path):
    def losses(kind: str) -> list[float]:
        workdir = tmp_path / kind
        train(recipe(matmul_dtype=kind), workdir, log=lambda line: None)
        return [line["loss"] for line in lines(workdir) if "loss" in line]

    exact = losses("auto")
    assert exact[0] - exact[-1] > 1  # nats
    for kind in MATMUL_DTYPES:
        low = losses(kind)
        assert low != exact
        assert abs(low[-1] - exact[-1]) < 0.02 * (exact[0] - exact[-1])


def test_dtypes_that_are_not_available_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected auto or int8 on TPU.* got fp8; set int8"):
        check_matmul_dtype("fp8", "tpu")
    with pytest.raises(ValueError, match="matmul_dtype: expected one of .*'int4'"):
        recipe(matmul_dtype="int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected the package qwix, got none; pip install"):
        check_matmul_dtype("int8", "cpu")
    check_matmul_dtype("auto", "cpu")
