"""The order of the rows of queries, keys and values in tensors that have another one than ours.

Ours is [heads, head_dim], in which RoPE rotates dimension i with i + rotary_dim / 2.
"""

from collections.abc import Mapping

import numpy as np

from lmjax.huggingface.schema import ModelType
from lmjax.huggingface.weights import Stored
from lmjax.models.model import ModelConfig

PARTS = ("query", "key", "value")


def in_order(rows: Mapping[str, Stored], model_type: ModelType,
             config: ModelConfig) -> dict[str, Stored]:
    """`rows` with the order of queries, keys and values in this model type's tensors."""
    out = dict(rows)
    if not (model_type.interleaved or model_type.grouped):
        return out
    heads = (config.dims.num_heads, config.dims.num_kv_heads, config.dims.num_kv_heads)
    for part, num_heads in zip(PARTS, heads, strict=True):
        if part == "value" and not model_type.grouped:
            continue
        dims = np.arange(config.dims.head_dim)
        if model_type.interleaved and part != "value":
            dims = paired(config.dims.head_dim, config.rotary_dim)
        starts = np.arange(num_heads) * config.dims.head_dim
        if model_type.grouped:
            starts = _group_starts(part, config)
        whole = tuple((starts[:, None] + dims).reshape(-1).tolist())
        for path, row in rows.items():
            if path.endswith((f"/{part}/kernel", f"/{part}/bias")):
                out[path] = row._replace(order=whole)
            elif f"/{part}_norm/" in path:
                out[path] = row._replace(order=tuple(dims.tolist()))
    return out


def paired(head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where each dimension of a head lies among those of a class that rotates neighbours."""
    half = rotary_dim // 2
    return np.concatenate([2 * np.arange(half), 2 * np.arange(half) + 1,
                           np.arange(rotary_dim, head_dim)])


def _group_starts(part: str, config: ModelConfig) -> np.ndarray:
    """Where each head's rows begin in a tensor with all rows of one key head after another."""
    each = config.dims.num_heads // config.dims.num_kv_heads
    group = (each + 2) * config.dims.head_dim * np.arange(config.dims.num_kv_heads)
    if part == "query":
        inside = np.arange(each)
    else:
        inside = np.array([each + PARTS.index(part) - 1])
    return (group[:, None] + inside * config.dims.head_dim).reshape(-1)
