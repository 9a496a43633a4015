"""The attention weights of a model for a text.

Shape suffixes: B batch, T query sequence, S key sequence, H heads, G kv heads, K head_dim.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import scalar
from lmjax.data.reading import Reader
from lmjax.decoding.inputs import check_ids, check_positions
from lmjax.decoding.reading import rows_of
from lmjax.decoding.token_texts import labels
from lmjax.errors import UserError
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
      float32 [layers, B, H, T, S]; each token's weights sum to 1, less what a sink takes. The
      layers of an encoder-decoder are its encoder's.
    """
    model, params = model.dense(params)
    maps: list[np.ndarray] = []
    kernel = dataclasses.replace(KERNELS["xla"], name="recording",
                                 run=functools.partial(_record, maps))
    recording = build_model(model.config, vocab_size=0, platform="cpu", dtype=jnp.float32,
                            kernel=kernel).with_adapters(model.adapter)
    with jax.disable_jit():  # scans become Python loops, in which the weights are plain arrays
        recording.encode(params, batch)
    return np.stack(maps)


def maps_of_text(model: Model, params: Params, reader: Reader, text: str,
                 picture: str | os.PathLike, layer: int) -> tuple[np.ndarray, list[str]]:
    """The attention weights of a text: see `LM.attention_maps`."""
    layers = model.config.num_layers
    if not -layers <= scalar(int, layer, "layer") < layers:
        raise UserError(f"{-layers} to {layers - 1}", layer, "count from 0, or back from -1",
                        "layer")
    [ids] = check_ids([reader.ids(text)], model.config, "text")
    check_positions(model.config, len(ids), "text")
    rows = rows_of(model, [[*ids, 0]], 1, len(ids), [len(ids)])
    batch = {name: jnp.asarray(x[:, : len(ids)]) for name, x in rows.items()}
    maps = attention_maps(model, jax.device_put(params, jax.devices()[0]), batch)[:, 0]
    tokens = labels(reader.names, ids)
    if picture:
        from lmjax.reporting.token_pictures import draw_attention  # matplotlib takes half a second

        draw_attention(maps, tokens, picture, layer=layer)
    return maps, tokens
