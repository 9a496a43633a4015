"""Weights in blocks of FP8 against a loop over their numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from config_values import BASES

from lmjax import huggingface
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.settings import read_settings
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.weights import tensor_shapes
from lmjax.models.model import build_model

BLOCK = (12, 20)  # divides few sizes
FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
           weight_block_size=list(BLOCK))
CODES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3"}
DOWN = "model.layers.0.self_attn.o_proj.weight"


def write(folder: Path, tensors, model_type="deepseek_v3", **settings):
    """A directory; safetensors does not write these numbers from NumPy."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(
        BASES[model_type] | {"model_type": model_type, **settings}))
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": CODES[x.dtype], "shape": x.shape,
                        "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(b"".join([
        len(text).to_bytes(8, "little"), text,
        *(np.ascontiguousarray(x).tobytes() for x in tensors.values())]))
    return folder


def stored(model_type="deepseek_v3"):
    """(tensors of which the projections are in blocks, the same in floats)."""
    rng = np.random.default_rng(0)
    config = read_settings(BASES[model_type] | {"model_type": model_type}, "")
    shapes = tensor_shapes(
        build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32).shapes,
        rows_for(MODEL_TYPES[model_type], config))
    floats = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    blocks = dict(floats)
    for name in [name for name in floats if name.endswith(("_proj.weight", "_mqa.weight"))]:
        numbers = blocks[name] = floats[name].astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.5, 2, [-(-n // size) for n, size in zip(
            numbers.shape, BLOCK, strict=True)]).astype(np.float32)
        blocks[f"{name}_scale_inv"] = scales
        floats[name] = np.array([[
            np.float32(x) * scales[i // BLOCK[0], j // BLOCK[1]] for j, x in enumerate(row)]
            for i, row in enumerate(numbers)], np.float32)
    return blocks, floats


def params_of(folder):
    found = huggingface.read_directory(folder)
    model = build_model(found.config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return huggingface.read_params(found, model, jax.tree.map(lambda x: one, model.shapes))


@pytest.mark.parametrize("model_type", [
    "deepseek_v3", pytest.param("qwen3", marks=pytest.mark.long)])
def test_blocks_are_the_floats_that_they_stand_for(model_type, tmp_path):
    blocks, floats = stored(model_type)
    found = params_of(write(tmp_path / "blocks", blocks, model_type, quantization_config=FP8))
    expected = params_of(write(tmp_path / "floats", floats, model_type))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("change, config, said", [
    (lambda t: t.pop(DOWN), FP8, "o_proj.weight in F8_E4M3, got none"),
    (lambda t: t.update({DOWN: t[DOWN].astype(np.float32)}), FP8, "in F8_E4M3, got F32"),
    (lambda t: t.pop(f"{DOWN}_scale_inv"), FP8, "use weights that are not quantised"),
    (lambda t: t.update({f"{DOWN}_scale_inv": np.ones((1, 1), np.float32)}), FP8,
     "weight_scale_inv: expected F32"),
    (lambda t: None, FP8 | dict(weight_block_size=None), "weight_block_size with two sizes")])
def test_damaged_blocks_are_refused(change, config, said, tmp_path):
    blocks, _ = stored()
    change(blocks)
    with pytest.raises(UserError, match=said):
        params_of(write(tmp_path / "hf", blocks, quantization_config=config))
