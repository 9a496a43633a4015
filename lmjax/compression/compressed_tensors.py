"""Writes packed weights as a Hugging Face directory that transformers and vLLM read packed.

The format is that of the package compressed-tensors: a matrix of int4 or int8 lies in int32, from
the low bits up, with an offset that leaves no sign; or in int8, where activations are rounded too.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.compression.integer_steps import integer_steps
from lmjax.errors import UserError
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.tensors import SINGLE, read_json, write_json
from lmjax.huggingface.weights import tensor_getter, tensor_shapes
from lmjax.lm import LM
from lmjax.nn.packed import FORMATS
from lmjax.runtime.files import new_directory

VLLM_GROUPS = (32, 64, 128)  # inputs per scale of int4 that its kernels (Marlin) take


def export_packed(lm: LM, out: Path, *, log: Callable[[str], None] = print,
                  **options: Any) -> None:
    """Writes a model with packed weights as a Hugging Face directory.

    The tables of tokens, which transformers keeps as floats, are written unpacked.

    Args:
      lm: the model.
      out: the directory, which must not exist yet.
      log: prints a line for the user.
      options: fields of `lmjax.huggingface.ExportOptions`.

    Raises:
      UserError: its weights are not packed, `out` exists, or its layers are no linear layers in
        transformers.
    """
    form = lm.model.quantization.weights
    if not form:
        raise UserError("a model with packed weights", "float32", "pack them first: lmjax compress",
                        where="--packed")
    config = lm.model.config
    if config.moe.experts or config.positions == "learned":
        raise UserError("a model whose layers are linear layers in transformers",
                        "experts" if config.moe.experts else "a GPT-2", "leave --packed out",
                        where="--packed")
    dense = lm.dense()
    with new_directory(out) as part:
        whole = part / "whole"
        dense.export(whole, log=lambda line: None, **options)
        settings = read_json(whole / "config.json")
        table = rows_for(MODEL_TYPES[settings["model_type"]], config)
        get, step = (tensor_getter(params, table)
                     for params in (dense.params, integer_steps(lm)))
        tensors, size = _tensors(lm, [*tensor_shapes(dense.model.shapes, table)], get, step,
                                 np.dtype(settings.get("torch_dtype", "float32").replace(
                                     "bfloat16", "float32")))
        if size and size not in VLLM_GROUPS:
            log(f"groups of {size}: transformers reads them; vLLM's fast kernels take groups of "
                f"{', '.join(map(str, VLLM_GROUPS))} (lmjax compress --group)")
        for path in sorted(whole.iterdir()):
            if "safetensors" not in path.name:
                shutil.move(path, part / path.name)
        shutil.rmtree(whole)
        _save(tensors, part / SINGLE)
        packed = {name.removesuffix(".weight_scale") for name in tensors
                  if name.endswith(".weight_scale")}
        linear = {name.removesuffix(".weight") for name in tensors
                  if name.endswith(".weight") and tensors[name].ndim == 2}
        write_json(part / "config.json", {**settings, "quantization_config": _described(
            form, size, sorted(linear - packed))})
    log(f"{out}: {form} in the format of compressed-tensors, for transformers and vLLM")


def packed_int32(ints: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers [F, I] as int32 [F, I * bits / 32], each from the low bits up."""
    each = 32 // bits
    low = (ints.astype(np.int64) + 2 ** (bits - 1)).reshape(len(ints), -1, each)
    shifted = low << (bits * np.arange(each))
    return shifted.sum(2).astype(np.uint32).view(np.int32)


def _tensors(lm: LM, names: list[str], get: Callable[[str], np.ndarray],
             step: Callable[[str], np.ndarray],
             dtype: np.dtype) -> tuple[dict[str, np.ndarray], int]:
    """The tensors of the file, and the inputs per scale (0: a scale per output)."""
    form = lm.model.quantization.weights
    bits = FORMATS[form].bits
    steps = {name: of_name for name in names if _is_linear(name)
             and (of_name := step(name)).any()}
    size = 0
    if bits == 4:
        size = int(np.gcd.reduce([_run_length(x) for x in steps.values()]))
    tensors = {}
    for name in names:
        w = get(name)
        if name not in steps:
            tensors[name] = w.astype(dtype)
            continue
        of_w = steps[name]
        if any(count % (32 // bits) for count in w.shape[-1:]):
            raise UserError(f"a multiple of {32 // bits} inputs in {name}", w.shape[-1],
                            "leave --packed out", where="--packed")
        ints = np.rint(w / np.where(of_w > 0, of_w, 1)).astype(np.int8)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.weight_scale"] = of_w[:, :: size or w.shape[-1]].astype(np.float32)
        if FORMATS[form].dynamic:
            tensors[name] = ints
        else:
            tensors[f"{stem}.weight_packed"] = packed_int32(ints, bits)
            tensors[f"{stem}.weight_shape"] = np.array(w.shape, np.int64)
    return tensors, size


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and not name.endswith(("embed_tokens.weight",
                                                           "lm_head.weight"))


def _run_length(steps: np.ndarray) -> int:
    """The greatest size of groups that have one step each."""
    changes = np.flatnonzero((steps[:, 1:] != steps[:, :-1]).any(0)) + 1
    return int(np.gcd.reduce([*changes, steps.shape[1]]))


def _described(form: str, size: int, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    weights = {"num_bits": FORMATS[form].bits, "type": "int", "symmetric": True, "dynamic": False,
               "strategy": "group" if size else "channel", "group_size": size or None}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True,
              "strategy": "token"} if FORMATS[form].dynamic else None
    name = "int-quantized" if inputs else "pack-quantized"
    return {"quant_method": "compressed-tensors", "format": name,
            "quantization_status": "compressed", "ignore": sorted({*ignored, "lm_head"}),
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                          "input_activations": inputs,
                                          "output_activations": None, "format": name}}}


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file,
              metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)
