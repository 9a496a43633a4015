"""Directories with packed weights, read by `transformers` with the package compressed-tensors."""

from pathlib import Path

import numpy as np
import pytest
from tiny_lm import tiny_lm

from lmjax.compression.compressed_tensors import export_packed, packed_int32
from lmjax.compression.quantize import quantize
from lmjax.errors import UserError
from lmjax.nn.packed import Quantization

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_lie_from_the_low_bits_up(bits: int) -> None:
    half = 2 ** (bits - 1)
    ints = RNG.integers(-half, half, (3, 32)).astype(np.int8)
    stored = packed_int32(ints, bits).view(np.uint32)
    for row in range(3):
        for i in range(32):
            word, place = divmod(i, 32 // bits)
            got = int(stored[row, word]) >> (bits * place) & (2**bits - 1)
            assert got - half == ints[row, i]


@pytest.mark.parametrize("weights", [
    pytest.param("int8", marks=pytest.mark.slow), pytest.param("int4", marks=pytest.mark.long),
    pytest.param("int8_dynamic", marks=pytest.mark.slow)])
def test_transformers_computes_the_same(weights: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    lm = quantize(tiny_lm(embed_dim=64, mlp_dim=96, init_std=0.1), Quantization(weights, 64))
    export_packed(lm, tmp_path / "hf", log=lambda line: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32).eval()
    tokens = RNG.integers(3, 290, (2, 24)).astype(np.int32)
    with torch.no_grad():
        got = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    want = np.asarray(lm.logits(tokens))
    atol = 2e-2 if weights == "int8_dynamic" else 1e-4  # activations are rounded by both
    np.testing.assert_allclose(got, want, atol=atol * np.abs(want).max())
    stored = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert stored < 0.6 * 4 * sum(p.numel() for p in model.parameters())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a model with packed weights, got float32"):
        export_packed(tiny_lm(), tmp_path / "hf")
