"""Directories of compressed-tensors, ours and those of its own package, beside `transformers`."""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_lm import tiny_lm

import lmjax
from lmjax.compression.compressed_tensors import export_packed, packed_int32
from lmjax.compression.quantize import quantize
from lmjax.errors import UserError
from lmjax.huggingface.packed_directories import quantization_of, unpacked_int32
from lmjax.nn.packed import Quantization
from lmjax.tree import named_leaves

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 60, (2, 24)).astype(np.int32)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_unpacked_as_they_were_packed(bits: int) -> None:
    ints = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 32)).astype(np.int8)
    np.testing.assert_array_equal(unpacked_int32(packed_int32(ints, bits), bits, 30), ints[:, :30])


@pytest.mark.parametrize("weights", [
    pytest.param("int8", marks=pytest.mark.slow), pytest.param("int4", marks=pytest.mark.long),
    pytest.param("int8_dynamic", marks=pytest.mark.slow)])
def test_an_export_comes_back_with_the_same_integers(weights: str, tmp_path: Path) -> None:
    lm = quantize(tiny_lm(embed_dim=64, mlp_dim=96), Quantization(weights, 32))
    export_packed(lm, tmp_path / "hf", log=lambda line: None)
    again = lmjax.load(tmp_path / "hf")
    assert again.model.quantization == Quantization(weights, again.model.quantization.group,
                                                    tables="")
    theirs = dict(named_leaves(again.params))
    for name, leaf in named_leaves(lm.params):
        if name.endswith(("int4", "int8", "int8_dynamic")) and "table" not in name:
            np.testing.assert_array_equal(theirs[name], leaf, err_msg=name)
    np.testing.assert_allclose(again.logits(TOKENS), lm.logits(TOKENS), atol=2e-4)
    again.save(tmp_path / "saved")
    np.testing.assert_array_equal(lmjax.load(tmp_path / "saved").logits(TOKENS),
                                  again.logits(TOKENS))
    again.export(tmp_path / "dense", log=lambda line: None)
    np.testing.assert_allclose(lmjax.load(tmp_path / "dense").logits(TOKENS),
                               again.dense().logits(TOKENS), atol=2e-4)


def their_directory(folder: Path, form: str, **weights: object) -> np.ndarray:
    """A Llama whose linear layers compressed-tensors rounds and writes, and its logits.

    They are those of the model that transformers reads from there.
    """
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    activations = weights.pop("activations", None)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=False))
    scheme = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights},
              "input_activations": activations}
    apply_quantization_config(model, QuantizationConfig.model_validate({
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "format": form}))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            args, w = module.quantization_scheme.weights, module.weight.data
            groups = w.reshape(len(w), -1, args.group_size or w.shape[1])
            groups = groups if args.strategy != "tensor" else w.reshape(1, 1, -1)
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape)
    compressor = ModelCompressor.from_pretrained_model(model, form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if activations:  # in steps of a 127th of the largest, as vLLM does; theirs are of a 127.5th
        for module in read.modules():
            if hasattr(module, "quantization_scheme"):
                module.forward = types.MethodType(torch.nn.Linear.forward, module)
                module.register_forward_pre_hook(rounded)
    with torch.no_grad():
        return read(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def rounded(module: Any, inputs: tuple[Any]) -> tuple[Any]:
    """The input of a linear layer with each token's values rounded to 255 steps."""
    step = inputs[0].abs().amax(-1, keepdim=True) / 127
    return ((inputs[0] / step).round() * step,)


@pytest.mark.slow
@pytest.mark.parametrize("form, weights, expected", [
    ("pack-quantized", dict(num_bits=4, strategy="group", group_size=32), "int4"),
    ("pack-quantized", dict(num_bits=4, strategy="channel"), "int4"),
    ("pack-quantized", dict(num_bits=8, strategy="channel"), "int8"),
    ("int-quantized", dict(num_bits=8, strategy="channel", activations=dict(
        num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")), "int8_dynamic"),
    ("naive-quantized", dict(num_bits=8, strategy="tensor"), "int8"),
], ids=["int4 groups", "int4", "int8", "dynamic", "naive"])
def test_their_directories_give_their_logits(form, weights, expected, tmp_path) -> None:
    wanted = their_directory(tmp_path / "hf", form, **weights)
    lm = lmjax.load(tmp_path / "hf")
    assert lm.model.quantization.weights == expected
    np.testing.assert_allclose(lm.logits(TOKENS), wanted, atol=1e-4 * np.abs(wanted).max())
    floats = lm.dense()
    if "activations" not in weights:
        np.testing.assert_allclose(floats.logits(TOKENS), wanted, atol=1e-4 * np.abs(wanted).max())


def described(**changes: object) -> dict:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": 64}
    group = {"targets": ["Linear"], "weights": weights | changes.pop("weights", {}),
             "input_activations": changes.pop("input_activations", None)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "format":
            "pack-quantized", "config_groups": {"group_0": group}} | changes}


@pytest.mark.parametrize("changes, message", [
    (dict(quant_method="gptq"), "expected compressed-tensors"),
    (dict(format="marlin-24"), "expected a format of pack-quantized, .* got 'marlin-24'"),
    (dict(weights=dict(symmetric=False)), "symmetric int4 by group .* symmetric=False"),
    (dict(weights=dict(num_bits=8)), "got 8 bits, int, symmetric=True, by group"),
    (dict(weights=dict(type="float")), "got 4 bits, float"),
    (dict(weights=dict(actorder="group")), "actorder=group"),
    (dict(weights=dict(group_size=8)), "groups of 16 or more"),
    (dict(input_activations=dict(num_bits=8, dynamic=True)), "expected activations as they are"),
    (dict(kv_cache_scheme={"num_bits": 8}), "no kv_cache_scheme"),
    (dict(transform_config={"config_groups": {"R1": {}}}), "no transform_config"),
    (dict(sparsity_config={"format": "sparse-24-bitmask"}), "dense storage of zeros"),
])
def test_what_is_computed_otherwise_is_refused(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        quantization_of(described(**changes), "config.json")
    assert quantization_of(described(), "config.json") == Quantization("int4", 64, tables="")


@pytest.mark.long
def test_a_layer_that_is_not_packed_is_named(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    lm = quantize(tiny_lm(embed_dim=64, mlp_dim=96), Quantization("int8"))
    export_packed(lm, tmp_path / "hf", log=lambda line: None)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.load_file(file)
    stem = "model.layers.1.mlp.up_proj.weight"
    for part in ("packed", "scale", "shape"):
        del tensors[f"{stem}_{part}"]
    safetensors.save_file(tensors | {stem: np.zeros((96, 64), np.float32)}, file)
    with pytest.raises(UserError, match=f"linear layers that are all packed, got {stem}"):
        lmjax.load(tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["quantization_config"]["format"] == "pack-quantized"
