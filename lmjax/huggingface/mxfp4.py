"""Weights in MXFP4, as gpt-oss stores its experts, to floats.

32 neighbouring inputs of an output share a scale: `NAME_blocks` holds two E2M1 numbers per byte,
the first one in the low bits, and `NAME_scales` an E8M0 power of two per block (OCP Microscaling
Formats 1.0). Both are exact in bfloat16.
"""

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lmjax.errors import UserError
from lmjax.huggingface.tensors import Entry, read_tensor

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32  # numbers that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# By code: the highest of four bits is the sign.
E2M1 = np.array((*MAGNITUDES, *(-x for x in MAGNITUDES)), np.float32)
# By code: powers of two from 2^-127; the last one is no number.
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
FIX = "fetch it again, or use weights in floats"


def as_floats(entries: Mapping[str, Entry], told: Mapping[str, Any],
              where: str) -> dict[str, Entry]:
    """Replaces each pair of blocks [E, out, G, 16] and scales [E, out, G] by a tensor of floats.

    Args:
      told: quantization_config, of which nothing is needed.

    Returns:
      The tensors; those of a pair are bfloat16 [E, in, out] and computed when they are read.

    Raises:
      UserError: one of a pair is missing, or they do not fit each other.
    """
    out = dict(entries)
    for name in [name for name in entries if name.endswith(SCALES)]:
        stem, scales = name.removesuffix(SCALES), out.pop(name)
        blocks = out.pop(stem + BLOCKS, None)
        if blocks is None:
            raise UserError(stem + BLOCKS, "none", FIX, where=where)
        if (blocks.shape != (*scales.shape, BLOCK // 2) or len(scales.shape) != 3
                or {blocks.dtype, scales.dtype} != {"U8"}):
            raise UserError(f"bytes [E, out, G, {BLOCK // 2}] and scales [E, out, G]",
                            f"{blocks.dtype} {list(blocks.shape)}, {scales.dtype} "
                            f"{list(scales.shape)}", FIX, where=f"{where} {stem}")
        E, rows, groups = scales.shape
        read = functools.partial(_floats, blocks, scales, f"{where} {stem}")
        out[stem] = Entry(blocks.file, stem, (E, groups * BLOCK, rows), "BF16", read)
    return out


def _floats(blocks: Entry, scales: Entry, where: str) -> np.ndarray:
    """The weights, bfloat16 [E, in, out]."""
    codes, powers = read_tensor(blocks), read_tensor(scales)
    E, rows, groups = powers.shape
    out = np.empty((E, groups * BLOCK, rows), ml_dtypes.bfloat16)
    for e in range(E):  # one expert at a time is held in float32
        out[e] = unpacked(codes[e], powers[e]).T
    if powers.max(initial=0) >= 254 and not np.isfinite(out.astype(np.float32)).all():
        raise UserError("scales with which all weights are float32", "one of 2^127 or none", FIX,
                        where=where)
    return out


def unpacked(codes: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """float32 [..., 32 * G] of bytes [..., G, 16] and scales uint8 [..., G]."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    with np.errstate(over="ignore"):
        values = E2M1[pairs] * E8M0[powers][..., None, None]
    return values.reshape(*powers.shape[:-1], -1)
