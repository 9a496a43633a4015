"""Weights in blocks of FP8, as DeepSeek-V3 and Kimi-K2 were published, to floats.

`NAME.weight` holds E4M3 numbers, and `NAME.weight_scale_inv` a float32 per block of
`weight_block_size` outputs and inputs, by which they are multiplied (arXiv:2412.19437, section
3.3.2). The last blocks of a side may be smaller.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lmjax.errors import UserError
from lmjax.huggingface.tensors import Entry, read_tensor

WEIGHT, SCALE = ".weight", ".weight_scale_inv"
E4M3 = "F8_E4M3"  # safetensors' code
FIX = "fetch it again, or use weights in bfloat16"


def as_floats(entries: Mapping[str, Entry], told: Mapping[str, Any],
              where: str) -> dict[str, Entry]:
    """Replaces each matrix [out, in] of E4M3 numbers and its scales by a tensor of floats.

    Args:
      told: quantization_config.

    Returns:
      The tensors; those that were E4M3 numbers are float32 and computed when they are read.

    Raises:
      UserError: there is no size of a block, one of a pair is missing, or they do not fit.
    """
    block = told.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2
            and all(isinstance(size, int) and size > 0 for size in block)):
        raise UserError("weight_block_size with two sizes", repr(block),
                        "use weights in bfloat16", where=f"{where} quantization_config")
    out = dict(entries)
    for name in [name for name in entries if name.endswith(SCALE)]:
        stem, scales = name.removesuffix(SCALE), out.pop(name)
        numbers = out.get(stem + WEIGHT)
        if numbers is None or numbers.dtype != E4M3 or len(numbers.shape) != 2:
            raise UserError(f"a matrix {stem}{WEIGHT} in {E4M3}",
                            f"{numbers.dtype} {list(numbers.shape)}" if numbers else "none", FIX,
                            where=where)
        blocks = tuple(-(-n // size) for n, size in zip(numbers.shape, block, strict=True))
        if scales.shape != blocks or scales.dtype != "F32":
            raise UserError(f"F32 {list(blocks)}", f"{scales.dtype} {list(scales.shape)}", FIX,
                            where=f"{where} {name}")
        read = functools.partial(_floats, numbers, scales, block)
        out[stem + WEIGHT] = Entry(numbers.file, stem + WEIGHT, numbers.shape, "F32", read)
    return out


def _floats(numbers: Entry, scales: Entry, block: Sequence[int]) -> np.ndarray:
    """The weights, float32 [out, in]."""
    each = read_tensor(scales)
    for axis, size in enumerate(block):
        each = np.repeat(each, size, axis=axis)
    rows, columns = numbers.shape
    return _read_e4m3(numbers).astype(np.float32) * each[:rows, :columns]


def _read_e4m3(entry: Entry) -> np.ndarray:
    """A tensor of E4M3 numbers, which safetensors does not read into NumPy."""
    with entry.file.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(size))[entry.name]["data_offsets"]
        file.seek(8 + size + start)
        raw = file.read(end - start)
    return np.frombuffer(raw, ml_dtypes.float8_e4m3fn).reshape(entry.shape)
