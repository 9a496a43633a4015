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
from lmjax.nn.quantized import MATMUL_DTYPES, matmuls_in
from lmjax.training.loop import train
from lmjax.training.program import make_program
from lmjax.training.recipe import build_recipe

pytest.importorskip("qwix", reason="not installed: pip install lmjax[qwix]")
RNG = np.random.default_rng(0)
X, W, G = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 5, 16), (16, 7), (2, 5, 7)))
X[0, 0], W[:, 2] = 0, 0  # nothing to scale by
X[1], W[:, 3], G[0] = X[1] * 1e3, W[:, 3] * 1e-3, G[0] * 1e-6


def off(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """How far the nearest of the values that 8 bits have may be from each of x [..., K], whose rows have steps of their
    own: half a step of int8, half a unit in the last place of fp8."""
    dtype = np.dtype(dtype)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    if dtype == np.int8:
        return np.broadcast_to(largest / 127.5 / 2, x.shape)
    info = ml_dtypes.finfo(dtype)
    return np.abs(x) * float(info.eps) / 2 + largest / float(info.max) * float(info.smallest_subnormal) / 2


def check(got: np.ndarray, a: np.ndarray, b: np.ndarray, dtypes: tuple[np.dtype, np.dtype]) -> None:
    """got is a [..., K] by b [N, K] as near as the roundings of both allow, and no nearer than they make likely."""
    off_a, off_b = off(a, dtypes[0]), off(b, dtypes[1])
    bound = off_a @ np.abs(b).T + np.abs(a) @ off_b.T + off_a @ off_b.T
    error = np.abs(got - a @ b.T)
    assert (error <= bound * 1.001 + 1e-6 * np.abs(a) @ np.abs(b).T).all()
    assert error.sum() > 0.03 * bound.sum()  # it did something


@pytest.mark.parametrize("kind", MATMUL_DTYPES)
def test_each_row_and_column_has_its_own_step(kind):
    with matmuls_in(kind):
        y, gradient = jax.vjp(lambda x, w: matmul(x, w, ("embed", "mlp")), X, W)
        d_x, d_w = gradient(jnp.asarray(G))
    low = MATMUL_DTYPES[kind]
    check(y, X, W.T, (low.values, low.values))
    check(d_x, G, W, (low.gradients, low.values))
    np.testing.assert_allclose(d_w, np.einsum("btd,btf->df", X, G), rtol=1e-5, atol=1e-5)  # in the compute dtype


def recipe(**train):
    return build_recipe({
        "model": {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 64, **train.pop(
            "model", {})},
        "data": {"sources": [{"name": "chain", "uri": "synthetic"}], "tokenizer": {"vocab_size": 64}, "seq_len": 32},
        "optimizer": {"name": "adamw", "peak_lr": 1e-2, "warmup_steps": 10}, "mesh": {"data": 2, "fsdp": 4},
        "train": {"steps": 60, "batch_size": 16, **train}})


EXPERTS = {"moe": {"experts": 4, "per_token": 2}}


@pytest.mark.parametrize("model, layers", [({}, 7), (EXPERTS, 4)], ids=["dense", "experts"])
def test_what_a_step_multiplies_in_8_bits(model, layers):
    """Forward and back through each matrix of the scanned layer; no gradient of a weight, no router, no logits."""
    def eight(kind: str) -> int:
        program = make_program(recipe(matmul_dtype=kind, model=model), jax.devices(), vocab_size=64,
                               fields=dict.fromkeys(DECODER, 32))
        return program.traced.lower().as_text().count("xi8>) -> tensor<")

    assert (eight("int8"), eight("auto")) == (2 * layers, 0)


@pytest.mark.long
def test_a_run_learns_as_it_does_without(tmp_path):
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


def test_what_cannot_be_is_refused(monkeypatch):
    from lmjax.nn.quantized import check_matmul_dtype

    with pytest.raises(ValueError, match="expected auto or int8 on TPU.* got fp8; set int8"):
        check_matmul_dtype("fp8", "tpu")
    with pytest.raises(ValueError, match="matmul_dtype: expected one of .*'int4'"):
        recipe(matmul_dtype="int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected the package qwix, got none; pip install"):
        check_matmul_dtype("int8", "cpu")
    check_matmul_dtype("auto", "cpu")
