"""Cross-entropy over the vocabulary in float32, on request without ever holding all logits.

Shape suffixes: B batch, T sequence, C chunk of the sequence, D embed_dim, V vocab_size, L layers,
E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.errors import UserError
from lmjax.nn.ops import barrier, dot, dot_rows
from lmjax.nn.routing import MoEConfig, Routing
from lmjax.sharding import constrain, current_layout, num_devices

Sums = tuple[jax.Array, jax.Array]  # total and nats, as in `Loss`
Part = tuple[jax.Array, jax.Array, jax.Array]  # hidden, targets and mask of a chunk


class Loss(NamedTuple):
    """Sums over the tokens that count, float32. Divide by `weight` for means."""

    total: jax.Array  # what is minimised; only `total` has a gradient
    nats: jax.Array  # cross-entropy alone
    weight: jax.Array  # sum of the loss mask
    # Reported as well: scalars are divided by `weight` too, arrays are reported as they are.
    extra: dict[str, jax.Array] = {}


def cross_entropy(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array,
                  mask_BT: jax.Array, *, bias_V: jax.Array | None = None, softcap: float = 0.0,
                  chunk: int = 0, z_loss: float = 0.0) -> Loss:
    """Sums -log softmax(hidden @ table.T + bias)[target] + z_loss * log(Z)^2 where the mask counts.

    The forward pass also makes the gradient, while it holds the logits: they are neither kept for
    the backward pass nor computed again. z_loss is that of PaLM (arXiv:2204.02311).

    Args:
      hidden_BTD, table_VD: in the compute dtype.
      targets_BT: token ids.
      mask_BT: 1 where a token counts, else 0.
      bias_V: of the logits.
      softcap: logits become softcap * tanh(logits / softcap); 0: no cap.
      chunk: positions whose logits [B, C, V] exist at a time; 0: all.
      z_loss: coefficient of log(Z)^2.

    Raises:
      UserError: `chunk` does not divide the sequence.
    """
    chunk = checked_chunk(chunk, targets_BT.shape[1])
    mask = mask_BT.astype(jnp.float32)
    total, nats = _summed(hidden_BTD, table_VD, targets_BT, mask, bias_V, softcap, z_loss, chunk)
    return Loss(total, nats, jnp.sum(mask))


def row_log_likelihoods(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array,
                        mask_BT: jax.Array, *, bias_V: jax.Array | None = None,
                        softcap: float = 0.0, chunk: int = 0) -> jax.Array:
    """Sums log softmax(hidden @ table.T + bias)[target] over each row, where the mask counts.

    The backward pass computes the logits of each chunk again.

    Args:
      hidden_BTD, table_VD, targets_BT, mask_BT, bias_V, softcap, chunk: as for `cross_entropy`.

    Returns:
      float32 [B], nats.
    """

    @jax.checkpoint
    def one(sums_B: jax.Array, part: Part) -> tuple[jax.Array, None]:
        log_p = softmax_of(part[0], part[1], table_VD, bias_V, softcap)
        return sums_B + jnp.sum((log_p.target - log_p.log_z) * part[2], axis=1), None

    chunk = checked_chunk(chunk, targets_BT.shape[1])
    zeros_B = jnp.zeros(targets_BT.shape[0], jnp.float32)
    mask = mask_BT.astype(jnp.float32)
    return over_chunks(one, zeros_B, (hidden_BTD, targets_BT, mask), chunk)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _summed(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array,
            bias_V: jax.Array | None, softcap: float, z_loss: float, chunk: int) -> Sums:
    """The sums, where nobody asks for gradients."""

    def one(sums: Sums, part: Part) -> tuple[Sums, None]:
        log_p = softmax_of(part[0], part[1], table_VD, bias_V, softcap)
        total, nats = _sums(log_p, part[2], z_loss)
        return (sums[0] + total, sums[1] + nats), None

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return over_chunks(one, zero, (hidden_BTD, targets_BT, mask_BT), chunk)[0]


def _forward(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array,
             bias_V: jax.Array | None, softcap: float, z_loss: float,
             chunk: int) -> tuple[Sums, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """The sums and the gradients of the total by hidden, table and bias."""

    def one(carry: tuple[Sums, jax.Array, Any],
            part: Part) -> tuple[tuple[Sums, jax.Array, Any], jax.Array]:
        sums, d_table, d_bias = carry
        log_p = softmax_of(part[0], part[1], table_VD, bias_V, softcap)
        total, nats = _sums(log_p, part[2], z_loss)
        d_logits = _d_logits(log_p, part[2], z_loss, softcap, part[0].dtype)
        d_table += dot_rows(d_logits, part[0], dtype=jnp.float32)
        if d_bias is not None:
            d_bias += jnp.sum(d_logits.astype(jnp.float32), axis=(0, 1))
        d_hidden = dot(d_logits, table_VD, (((2,), (0,)), ((), ())))
        return ((sums[0] + total, sums[1] + nats), d_table, d_bias), d_hidden

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    start = (zero, jnp.zeros(table_VD.shape, jnp.float32),
             None if bias_V is None else jnp.zeros_like(bias_V))
    (sums, d_table, d_bias), d_hidden = over_chunks(
        one, start, (hidden_BTD, targets_BT, mask_BT), chunk)
    return sums, (d_hidden, d_table.astype(table_VD.dtype), d_bias)


def _backward(softcap: float, z_loss: float, chunk: int, saved: tuple[jax.Array, ...],
              g: Sums) -> tuple[jax.Array, jax.Array, None, None, jax.Array | None]:
    d_hidden, d_table, d_bias = saved
    return (d_hidden * g[0].astype(d_hidden.dtype), d_table * g[0].astype(d_table.dtype), None,
            None, None if d_bias is None else d_bias * g[0])


_summed.defvjp(_forward, _backward)


class Softmax(NamedTuple):
    """A softmax of C positions, in float32."""

    logits: jax.Array  # [B, C, V]
    exp: jax.Array  # exp(logits - their maximum), [B, C, V]
    sum_exp: jax.Array  # [B, C, 1]
    log_z: jax.Array  # [B, C]
    target: jax.Array  # the logit of the target, [B, C]
    hit: jax.Array  # where the target is, bool [B, C, V]


def softmax_of(hidden_BCD: jax.Array, targets_BC: jax.Array, table_VD: jax.Array,
               bias_V: jax.Array | None, softcap: float) -> Softmax:
    """The softmax of C positions: of their hidden states' logits, with the targets'."""
    raw = lax.dot_general(hidden_BCD, table_VD, (((2,), (1,)), ((), ())),
                          preferred_element_type=jnp.float32)
    raw = raw if bias_V is None else raw + bias_V.reshape(1, 1, -1)
    layout = current_layout()
    # The classes of a task need not divide. A vocabulary does: the table's sharding is checked.
    splits = layout is None or len(table_VD) % layout.ways("act_vocab") == 0
    raw = barrier(constrain(raw, "batch", "seq", "act_vocab" if splits else None))
    logits = softcap * jnp.tanh(raw / softcap) if softcap else raw
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = barrier(jnp.exp(logits - top))
    sum_exp = jnp.sum(exp, axis=-1, keepdims=True)
    log_z = (top + jnp.log(sum_exp))[..., 0]
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets_BC[..., None]
    if num_devices() == 1:
        target = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    else:  # a gather from a sharded vocabulary would collect all logits first
        target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return Softmax(logits, exp, sum_exp, log_z, target, hit)


def _sums(log_p: Softmax, mask_BC: jax.Array, z_loss: float) -> Sums:
    nats = jnp.sum((log_p.log_z - log_p.target) * mask_BC)
    total = nats + z_loss * jnp.sum(jnp.square(log_p.log_z) * mask_BC) if z_loss else nats
    return total, nats


def _d_logits(log_p: Softmax, mask_BC: jax.Array, z_loss: float, softcap: float,
              dtype: Any) -> jax.Array:
    """d total / d raw logits, [B, C, V] in `dtype`."""
    # d log_z / d logits is the probability
    of_p = (mask_BC * (1 + 2 * z_loss * log_p.log_z))[..., None]
    d_logits = log_p.exp * (of_p / log_p.sum_exp) - jnp.where(log_p.hit, mask_BC[..., None], 0.0)
    if softcap:
        d_logits *= 1 - jnp.square(log_p.logits / softcap)
    return barrier(d_logits.astype(dtype))


def with_experts(loss: Loss, routing: Routing, config: MoEConfig) -> Loss:
    """Adds the routers' losses: means over layers and tokens, which weigh as `loss` does.

    Reported as well: both of them; the largest and the smallest load of an expert in any layer (1:
    an even share); the share of choices that were dropped; and every expert's choices, [L, E].
    """
    counts_LE = routing.counts
    total_L1 = jnp.maximum(jnp.sum(counts_LE, axis=-1, keepdims=True), 1.0)
    load_LE = counts_LE * counts_LE.shape[-1] / total_L1
    balance, z = jnp.mean(routing.balance), jnp.mean(routing.z)
    means = {"experts_balance": balance, "experts_z": z,
             "experts_dropped": jnp.mean(routing.dropped),
             "experts_most": jnp.max(load_LE), "experts_least": jnp.min(load_LE)}
    total = loss.total + loss.weight * (config.balance_loss * balance + config.z_loss * z)
    extra = {name: lax.stop_gradient(loss.weight * mean) for name, mean in means.items()}
    return loss._replace(total=total, extra={**loss.extra, **extra, "expert_counts": counts_LE})


def checked_chunk(chunk: int, length: int) -> int:
    """Returns the positions per chunk: `chunk`, or all `length` if it is 0 or larger."""
    chunk = min(chunk or length, length)
    if length % chunk:
        raise UserError(f"a divisor of the sequence length {length}", chunk, "change it or set 0",
                        where="config.train.loss_chunk")
    return chunk


def over_chunks(body: Callable[..., Any], start: Any, parts: tuple[jax.Array, ...],
                 chunk: int) -> tuple[Any, Any]:
    """Scans `body` over chunks of the sequence and joins its outputs along the sequence.

    Args:
      body: (carry, chunk of every part) -> (carry, outputs [B, C, ...]).
      start: the first carry.
      parts: arrays [B, T, ...].
      chunk: C; with C = T the body runs once, without a scan.
    """
    B, T = parts[1].shape
    if chunk == T:
        return body(start, parts)
    split = [jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0) for x in parts]
    carry, out = lax.scan(body, start, tuple(split))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), out)
