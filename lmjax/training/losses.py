"""Cross-entropy over the vocabulary, in float32, without ever holding all logits when asked.

Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size, C chunk of the sequence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.nn.moe import MoEConfig, Routing
from lmjax.nn.ops import barrier, dot, dot_rows
from lmjax.sharding import constrain, num_devices

Sums = tuple[jax.Array, jax.Array]  # total and nats
Part = tuple[jax.Array, jax.Array, jax.Array]  # hidden, targets, mask


class Loss(NamedTuple):
    """Sums over the tokens that count; divide by `weight` for means. float32 scalars.

    total: what is minimised; only it has a gradient. nats: cross-entropy alone. weight: the loss mask's sum. extra:
    scalars to report beside them, likewise to be divided, and arrays, which are sums as they are.
    """

    total: jax.Array
    nats: jax.Array
    weight: jax.Array
    extra: dict[str, jax.Array] = {}


def cross_entropy(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, *,
                  bias_V: jax.Array | None = None, softcap: float = 0.0, chunk: int = 0, z_loss: float = 0.0) -> Loss:
    """Sums of -log softmax(hidden @ table.T + bias)[target] where the mask counts, plus z_loss * log(Z)^2 (PaLM,
    arXiv:2204.02311).

    The gradient is made beside the loss, while the logits are there, so they are neither kept for the
    backward pass nor computed again in it. chunk: at most this many positions' logits [B, C, V] exist at a
    time; 0: all at once.

    Raises:
      ValueError: `chunk` does not divide the sequence.
    """
    chunk = _checked(chunk, targets_BT.shape[1])
    mask = mask_BT.astype(jnp.float32)
    total, nats = _summed(hidden_BTD, table_VD, targets_BT, mask, bias_V, softcap, z_loss, chunk)
    return Loss(total, nats, jnp.sum(mask))


def log_likelihoods(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *,
                    bias_V: jax.Array | None = None, softcap: float = 0.0,
                    chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ table.T + bias)[target], float32 [B, T], and whether the target is the likeliest, bool
    [B, T]; at most `chunk` positions' logits exist at a time.

    Raises:
      ValueError: `chunk` does not divide the sequence.
    """

    def one(nothing: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        log_p = _softmax(*part, table_VD, bias_V, softcap)
        return nothing, (log_p.target - log_p.log_z, jnp.argmax(log_p.logits, axis=-1) == part[1])

    return _over_chunks(one, None, (hidden_BTD, targets_BT), _checked(chunk, targets_BT.shape[1]))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _summed(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array,
            bias_V: jax.Array | None, softcap: float, z_loss: float, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(total, nats), without gradients."""

    def one(sums: Sums, part: Part) -> tuple[Sums, None]:
        total, nats, _ = _one_chunk(*part, table_VD, bias_V, softcap, z_loss, with_gradient=False)
        return (sums[0] + total, sums[1] + nats), None

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return _over_chunks(one, zero, (hidden_BTD, targets_BT, mask_BT), chunk)[0]


def _forward(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array,
             bias_V: jax.Array | None, softcap: float, z_loss: float,
             chunk: int) -> tuple[Sums, tuple[jax.Array, jax.Array, jax.Array | None]]:
    def one(carry: tuple[Sums, jax.Array, Any], part: Part) -> tuple[tuple[Sums, jax.Array, Any], jax.Array]:
        sums, d_table, d_bias = carry
        total, nats, d_logits = _one_chunk(*part, table_VD, bias_V, softcap, z_loss, with_gradient=True)
        d_table += dot_rows(d_logits, part[0], dtype=jnp.float32)
        if d_bias is not None:
            d_bias += jnp.sum(d_logits.astype(jnp.float32), axis=(0, 1))
        return ((sums[0] + total, sums[1] + nats), d_table, d_bias), dot(d_logits, table_VD, (((2,), (0,)), ((), ())))

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    start = (zero, jnp.zeros(table_VD.shape, jnp.float32), bias_V if bias_V is None else jnp.zeros_like(bias_V))
    (sums, d_table, d_bias), d_hidden = _over_chunks(one, start, (hidden_BTD, targets_BT, mask_BT), chunk)
    return sums, (d_hidden, d_table.astype(table_VD.dtype), d_bias)


def _backward(softcap: float, z_loss: float, chunk: int, saved: tuple[jax.Array, ...],
              g: Sums) -> tuple[jax.Array, jax.Array, None, None, jax.Array | None]:
    d_hidden, d_table, d_bias = saved
    return (d_hidden * g[0].astype(d_hidden.dtype), d_table * g[0].astype(d_table.dtype), None, None,
            None if d_bias is None else d_bias * g[0])


_summed.defvjp(_forward, _backward)


class _Softmax(NamedTuple):
    """Of C positions: logits and exp(logits - their maximum) [B, C, V], sum_exp [B, C, 1], log_z and the target's
    logit [B, C], and where the target is, bool [B, C, V]; float32."""

    logits: jax.Array
    exp: jax.Array
    sum_exp: jax.Array
    log_z: jax.Array
    target: jax.Array
    hit: jax.Array


def _softmax(hidden_BCD: jax.Array, targets_BC: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None,
             softcap: float) -> _Softmax:
    raw = lax.dot_general(hidden_BCD, table_VD, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    raw = raw if bias_V is None else raw + bias_V.reshape(1, 1, -1)
    raw = barrier(constrain(raw, "batch", "seq", "act_vocab"))
    logits = softcap * jnp.tanh(raw / softcap) if softcap else raw
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = barrier(jnp.exp(logits - top))
    sum_exp = jnp.sum(exp, axis=-1, keepdims=True)
    log_z = (top + jnp.log(sum_exp))[..., 0]
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets_BC[..., None]
    if num_devices() == 1:
        target = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1, mode="clip")[..., 0]
    else:  # with the vocabulary sharded, a gather would collect the logits first
        target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return _Softmax(logits, exp, sum_exp, log_z, target, hit)


def _one_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array, table_VD: jax.Array,
               bias_V: jax.Array | None, softcap: float, z_loss: float,
               with_gradient: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(total, nats, d total / d logits [B, C, V] in the dtype of hidden)."""
    logits, exp, sum_exp, log_z, target, hit = _softmax(hidden_BCD, targets_BC, table_VD, bias_V, softcap)
    nats = jnp.sum((log_z - target) * mask_BC)
    total = nats + z_loss * jnp.sum(jnp.square(log_z) * mask_BC) if z_loss else nats
    if not with_gradient:
        return total, nats, None
    of_p = (mask_BC * (1 + 2 * z_loss * log_z))[..., None]  # d log_z / d logits is the probability
    d_logits = exp * (of_p / sum_exp) - jnp.where(hit, mask_BC[..., None], 0.0)
    if softcap:
        d_logits *= 1 - jnp.square(logits / softcap)
    return total, nats, barrier(d_logits.astype(hidden_BCD.dtype))


def with_experts(loss: Loss, routing: Routing, config: MoEConfig) -> Loss:
    """`loss` and the routers' losses, means over layers and tokens that weigh as much as `loss` itself.

    Reported: both of them, the largest and the smallest load of an expert in any layer (1: an even share), the
    share of choices that were dropped, and each expert's choices [layers, E].
    """
    counts_LE = routing.counts
    load = counts_LE * counts_LE.shape[-1] / jnp.maximum(jnp.sum(counts_LE, axis=-1, keepdims=True), 1.0)
    balance, z = jnp.mean(routing.balance), jnp.mean(routing.z)
    means = {"experts_balance": balance, "experts_z": z, "experts_dropped": jnp.mean(routing.dropped),
             "experts_most": jnp.max(load), "experts_least": jnp.min(load)}
    total = loss.total + loss.weight * (config.balance_loss * balance + config.z_loss * z)
    extra = {name: lax.stop_gradient(loss.weight * mean) for name, mean in means.items()}
    return loss._replace(total=total, extra={**extra, "expert_counts": counts_LE})


def _checked(chunk: int, length: int) -> int:
    """Positions a chunk: `chunk`, or all."""
    chunk = min(chunk or length, length)
    if length % chunk:
        raise ValueError(f"config.train.loss_chunk: expected a divisor of the sequence length {length}, got {chunk}; "
                         "change it or set 0")
    return chunk


def _over_chunks(body: Callable[..., Any], start: Any, parts: tuple[jax.Array, ...],
                 chunk: int) -> tuple[Any, Any]:
    """Scans `body` over pieces of the sequence of `parts`, [B, T, ...] each; its outputs are joined along it again."""
    B, T = parts[1].shape
    if chunk == T:
        return body(start, parts)
    split = [jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0) for x in parts]
    carry, out = lax.scan(body, start, tuple(split))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), out)
