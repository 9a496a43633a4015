"""The attention weights of a model for a text, as arrays and as a picture.

Shape suffixes: B batch, T query sequence, S key sequence, H heads, G kv heads, K head_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.models.model import Batch, Model, build_model
from lmjax.nn.kernels.choose import KERNELS
from lmjax.nn.kernels.xla import xla_attention
from lmjax.nn.masking import AttentionMask
from lmjax.nn.module import Params


def _record(maps: list[np.ndarray], q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array,
            mask: AttentionMask, **options: Any) -> jax.Array:
    """Attention that appends its weights, [B, H, T, S], to `maps`."""
    B, S, G, K = k_BSGK.shape
    eye_SS = jnp.pad(jnp.eye(S, dtype=q_BTHK.dtype), ((0, 0), (0, -S % K)))

    def columns(at: int) -> jax.Array:
        """Attention to values that are K columns of the identity: K columns of the weights."""
        values = jnp.broadcast_to(eye_SS[None, :, None, at : at + K], (B, S, G, K))
        return xla_attention(q_BTHK, k_BSGK, values, mask, **options)

    weights_BTHS = jnp.concatenate([columns(at) for at in range(0, S, K)], axis=-1)[..., :S]
    maps.append(np.asarray(weights_BTHS).swapaxes(1, 2))
    return xla_attention(q_BTHK, k_BSGK, v_BSGK, mask, **options)


def attention_maps(model: Model, params: Params, batch: Batch) -> np.ndarray:
    """The attention weights of every layer and head, for a few texts.

    It runs operation by operation, which is slow.

    Args:
      batch: as for `Model.encode`.
    Returns:
      float32 [layers, B, H, T, S]; each token's weights sum to 1. The layers of an encoder-decoder
      are its encoder's.
    """
    maps: list[np.ndarray] = []
    kernel = dataclasses.replace(KERNELS["xla"], name="recording",
                                 run=functools.partial(_record, maps))
    recording = build_model(model.config, vocab_size=0, platform="cpu", dtype=jnp.float32,
                            kernel=kernel).with_adapters(model.adapter)
    with jax.disable_jit():  # scans become Python loops, in which the weights are plain arrays
        recording.encode(params, batch)
    return np.stack(maps)


def draw_attention(maps: np.ndarray, tokens: Sequence[str], out: str | Path, *,
                   layer: int = -1) -> None:
    """Draws one layer of a text's maps, [layers, H, T, S], with one square per head."""
    from matplotlib.figure import Figure

    heads = maps[layer]
    columns = math.ceil(math.sqrt(len(heads)))
    rows = math.ceil(len(heads) / columns)
    size = max(2.2, 0.16 * len(tokens))
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    for head, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).ravel()):
        axes.set_axis_off()
        if head < len(heads):
            axes.set_axis_on()
            axes.imshow(heads[head], cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"head {head}", fontsize=8)
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=5)
            axes.set_yticks(range(len(tokens)), tokens, fontsize=5)
    figure.savefig(out, dpi=150)
