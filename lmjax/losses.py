"""Cross-entropy over the vocabulary, in float32, without ever holding all logits when asked.

Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size, C chunk of the sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.sharding import constrain


class LossSums(NamedTuple):
    """Sums over the tokens that count; divide by `weight` for means. All float32 scalars.

    nats: cross-entropy. z: squared log-partition (the z-loss before its coefficient). weight: loss mask.
    """

    nats: jax.Array
    z: jax.Array
    weight: jax.Array


def cross_entropy(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, *,
                  softcap: float = 0.0, chunk: int = 0) -> LossSums:
    """Sums of -log softmax(hidden @ table.T)[target] and of log-partition^2 where the mask counts.

    chunk: at most this many positions' logits [B, C, V] exist at a time, forward and backward (they are
    computed again in the backward pass); 0: all at once.

    Raises:
      ValueError: `chunk` does not divide the sequence.
    """
    T = targets_BT.shape[1]
    if not chunk or chunk >= T:
        return _sums(hidden_BTD, table_VD, targets_BT, mask_BT, softcap)
    if T % chunk:
        raise ValueError(f"config.train.loss_chunk: expected a divisor of the sequence length {T}, got {chunk}; "
                         "change it or set 0")

    @jax.checkpoint
    def body(sums: LossSums, part: tuple[jax.Array, ...]) -> tuple[LossSums, None]:
        hidden, targets, mask = part
        return jax.tree.map(jnp.add, sums, _sums(hidden, table_VD, targets, mask, softcap)), None

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], T // chunk, chunk, *x.shape[2:]), 1, 0)

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
    return jax.lax.scan(body, zero, (split(hidden_BTD), split(targets_BT), split(mask_BT)))[0]


def _sums(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array,
          softcap: float) -> LossSums:
    logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    logits = constrain(logits, "batch", "seq", "act_vocab")
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: with the vocabulary sharded a gather would collect the logits first.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    target = jnp.sum(jnp.where(ids == targets_BT[..., None], logits, 0.0), axis=-1)
    mask = mask_BT.astype(jnp.float32)
    return LossSums(jnp.sum((log_z - target) * mask), jnp.sum(jnp.square(log_z) * mask), jnp.sum(mask))
