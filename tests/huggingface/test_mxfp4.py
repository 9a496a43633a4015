"""MXFP4 weights against their formula, and against what transformers makes of the same bytes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_values import BASES

from lmjax import huggingface
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.mxfp4 import E2M1, E8M0, unpacked
from lmjax.huggingface.settings import read_settings
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.weights import tensor_shapes
from lmjax.models.model import build_model

RNG = np.random.default_rng(0)
E, D, F = 2, 64, 32
SETTINGS = BASES["gpt_oss"] | dict(
    model_type="gpt_oss", hidden_size=D, intermediate_size=F, num_local_experts=E,
    num_hidden_layers=1, layer_types=["full_attention"],
    quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"]))


def test_all_codes_and_scales_are_those_of_the_formula():
    """E2M1: a sign, two bits of exponent with bias 1 and one of fraction; E8M0: 2^(code - 127)."""
    for code in range(16):
        exponent, fraction = code >> 1 & 3, code & 1
        size = (1 + fraction / 2) * 2 ** (exponent - 1) if exponent else fraction / 2
        assert E2M1[code] == (-size if code & 8 else size)
        assert np.signbit(E2M1[code]) == bool(code & 8)
    np.testing.assert_array_equal(E8M0[:255], 2.0 ** (np.arange(255) - 127))
    assert np.isnan(E8M0[255])
    # Every code with every scale: byte b holds the codes b & 15 and b >> 4, in this order.
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (16, 253, 16))
    scales = np.broadcast_to(np.arange(253, dtype=np.uint8), (16, 253))
    codes = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1).reshape(16, 1, 32)
    expected = E2M1[codes].astype(np.float64) * 2.0 ** (scales.astype(int) - 127)[..., None]
    np.testing.assert_array_equal(unpacked(blocks, scales), expected.reshape(16, -1))


def stored(highest=254):
    """The tensors of a directory: random floats, and bytes in place of the experts' matrices."""
    config = read_settings(
        {key: value for key, value in SETTINGS.items() if key != "quantization_config"}, "")
    shapes = tensor_shapes(
        build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32).shapes,
        rows_for(MODEL_TYPES["gpt_oss"], config))
    tensors = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        _, inputs, outputs = tensors.pop(name).shape
        shape = E, outputs, inputs // 32
        tensors[f"{name}_blocks"] = RNG.integers(0, 256, (*shape, 16)).astype(np.uint8)
        tensors[f"{name}_scales"] = RNG.integers(0, highest, shape).astype(np.uint8)
    return tensors


def write(folder: Path, tensors):
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps(SETTINGS))
    save_file(tensors, folder / "model.safetensors")
    return huggingface.read_directory(folder)


def read(found):
    model = build_model(found.config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return huggingface.read_params(found, model, jax.tree.map(lambda x: one, model.shapes))


def test_experts_are_the_floats_that_transformers_makes_of_the_bytes(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install lmjax[oracle]")
    pytest.importorskip("transformers", reason="pip install lmjax[oracle]")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = stored()
    found = write(tmp_path, tensors)
    assert not found.quantization.weights and found.source["dtype"] == "float32"
    mlp = read(found)["layers"]["block"]["mlp"]
    theirs = {name: convert_moe_packed_tensors(*(
        torch.tensor(tensors[f"model.layers.0.mlp.experts.{name}_{part}"])
        for part in ("blocks", "scales")), dtype=torch.float32).numpy()
        for name in ("gate_up_proj", "down_proj")}
    np.testing.assert_array_equal(mlp["gate"]["kernel"][0], theirs["gate_up_proj"][..., ::2])
    np.testing.assert_array_equal(mlp["up"]["kernel"][0], theirs["gate_up_proj"][..., 1::2])
    np.testing.assert_array_equal(mlp["down"]["kernel"][0], theirs["down_proj"])


@pytest.mark.parametrize("change, said", [
    (lambda t, name: t.pop(f"{name}_blocks"), "down_proj_blocks, got none"),
    (lambda t, name: t.update({f"{name}_scales": t[f"{name}_scales"][:, :1]}), "expected bytes"),
    (lambda t, name: t[f"{name}_scales"].__setitem__((0, 0, 0), 255), "which all weights are")])
def test_damaged_bytes_are_refused(change, said, tmp_path):
    tensors = stored(highest=200)
    change(tensors, "model.layers.0.mlp.experts.down_proj")
    with pytest.raises(UserError, match=said):
        read(write(tmp_path, tensors))
