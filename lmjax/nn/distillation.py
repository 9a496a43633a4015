"""Cross-entropy mixed with the divergence from a teacher's distribution (Hinton et al. 2015).

With the student's probabilities q and the teacher's p, both of logits divided by a temperature t,
the loss of a position is

    hard * (-log softmax(logits)[target]) + (1 - hard) * t^2 * KL(p || q) + z_loss * log(Z)^2

(arXiv:1503.02531). The factor t^2 keeps the size of the second gradient whatever t is.

Of a stored teacher only K tokens of a position are known: the likeliest ones, and as many that were
drawn from the others. A drawn token stands for an equal share of the others' probability, so that
the gradient is right on average (importance sampling: Anshumann et al. 2025, arXiv:2503.16870). The
likeliest tokens alone would teach the student that all others are impossible.

Shape suffixes: B batch, T sequence, C chunk of the sequence, D embed_dim, V vocab_size, K stored
tokens of a position.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.nn.losses import Loss, Softmax, checked_chunk, over_chunks, softmax_of
from lmjax.nn.ops import barrier, dot, dot_rows
from lmjax.sharding import current_layout, num_devices

LEAST = -60.0  # of a stored log-probability, which must be finite


class Scorer(NamedTuple):
    """What logits are computed from."""

    x_BTD: jax.Array  # hidden states in the compute dtype
    table_VD: jax.Array  # in the compute dtype
    bias_V: jax.Array | None  # float32
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: no cap


class Known(NamedTuple):
    """Some tokens of a teacher's distribution: the likeliest, then those drawn from the others."""

    ids_BTK: jax.Array  # int32; a token may be drawn more than once
    log_p_BTK: jax.Array  # float32, of the whole distribution at the temperature of the loss

    @property
    def num_drawn(self) -> int:
        """How many of the K tokens were drawn."""
        return self.ids_BTK.shape[-1] // 2


class Mix(NamedTuple):
    """How the two losses are mixed."""

    hard: float = 0.5  # weight of the loss of the targets; that of the teacher is 1 - hard
    temperature: float = 1.0
    z_loss: float = 0.0


class _Options(NamedTuple):
    """What is known when the loss is traced."""

    mix: Mix
    softcap: float
    teacher_softcap: float
    chunk: int


def distilled_cross_entropy(student: Scorer, targets_BT: jax.Array, mask_BT: jax.Array,
                            teacher: Scorer | Known, mix: Mix, *, chunk: int = 0) -> Loss:
    """Sums the loss of this module where the mask counts; only the student has a gradient.

    As in `losses.cross_entropy`, the forward pass also makes the gradient, and no more logits exist
    than those of a chunk, of the student and of the teacher.

    Args:
      student: in the compute dtype.
      targets_BT: token ids.
      mask_BT: 1 where a token counts, else 0.
      teacher: what computes its logits, whose ids are those of the student, or what is known of
        them. Ids that only one of the two has get no probability of the teacher.
      mix: weights and temperature.
      chunk: positions whose logits exist at a time; 0: all.

    Returns:
      The loss. Its `nats` are those of the targets; `extra` has `teacher_kl`, the divergence.

    Raises:
      UserError: `chunk` does not divide the sequence.
    """
    softcap = teacher.softcap if isinstance(teacher, Scorer) else 0.0
    options = _Options(mix, student.softcap, softcap, checked_chunk(chunk, targets_BT.shape[1]))
    mask = mask_BT.astype(jnp.float32)
    if isinstance(teacher, Scorer):
        rows = student.table_VD.shape[0]
        bias = teacher.bias_V
        of_teacher: Any = (teacher.x_BTD,)
        fixed: Any = (teacher.table_VD[:rows], None if bias is None else bias[:rows])
    else:
        of_teacher, fixed = tuple(teacher), None
    total, nats, kl = _summed(student[:3], (targets_BT, mask, *of_teacher), fixed, options)
    return Loss(total, nats, jnp.sum(mask), {"teacher_kl": lax.stop_gradient(kl)})


def known_of(teacher: Scorer, count: int, temperature: float, key_B: jax.Array, *,
             vocab_size: int, chunk: int = 0) -> Known:
    """What is to be stored of a teacher: `count` tokens of every position.

    Args:
      teacher: computes its logits; ids from `vocab_size` on do not count.
      count: K, at least 2 and at most half of the vocabulary.
      temperature: of the loss.
      key_B: of the draws, a key per row.
      vocab_size: of the student.
      chunk: as for `distilled_cross_entropy`.
    """
    table_VD, bias_V = teacher.table_VD[:vocab_size], teacher.bias_V
    bias_V = None if bias_V is None else bias_V[:vocab_size]
    x_BTD, num_drawn = teacher.x_BTD, count // 2
    at_BT = jax.vmap(lambda key: jax.random.uniform(key, x_BTD.shape[1:2]))(key_B)

    def one(_: None, part: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits = _logits(part[0], table_VD, bias_V, teacher.softcap)
        log_p = jnp.maximum(jax.nn.log_softmax(logits / temperature), LEAST)
        return None, _local(choose)(log_p, part[1])

    def choose(log_p: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        top = lax.top_k(log_p, count - num_drawn)[1]
        others = jax.vmap(jax.vmap(lambda p, ids: p.at[ids].set(0.0)))(jnp.exp(log_p), top)
        # Evenly spaced points of the others' cumulated probability, with one random shift.
        sums = jnp.cumsum(others, axis=-1)
        points = (jnp.arange(num_drawn).reshape(1, 1, -1) + at[..., None]) / num_drawn
        drawn = jax.vmap(jax.vmap(jnp.searchsorted))(sums, points * sums[..., -1:])
        ids = jnp.concatenate([top, jnp.minimum(drawn, log_p.shape[-1] - 1)], axis=-1)
        return ids.astype(jnp.int32), jnp.take_along_axis(log_p, ids, axis=-1)

    parts = (x_BTD, at_BT)
    return Known(*over_chunks(one, None, parts, checked_chunk(chunk, x_BTD.shape[1]))[1])


def _local(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, of arrays whose first dimension is the batch, on the rows of each device alone.

    The compiler does not split `top_k` and would gather the logits of the whole batch.
    """
    layout = current_layout()
    if layout is None or num_devices() == 1:
        return fn
    rows = layout.spec(("batch",))
    return jax.shard_map(fn, mesh=layout.mesh, in_specs=rows, out_specs=rows, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(student: Any, parts: Any, fixed: Any, options: _Options) -> tuple[jax.Array, ...]:
    """The sums (total, nats, divergence) where nobody asks for gradients."""
    return _forward(student, parts, fixed, options)[0]


def _forward(student: Any, parts: Any, fixed: Any,
             options: _Options) -> tuple[tuple[jax.Array, ...], Any]:
    """The sums, and the gradients of the total by the student's hidden states, table and bias."""
    x_BTD, table_VD, bias_V = student

    def one(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        sums, d_table, d_bias = carry
        hidden, targets, mask, *of_teacher = part
        found = softmax_of(hidden, targets, table_VD, bias_V, options.softcap)
        more, d_logits = _of_logits(found, mask, of_teacher, fixed, options)
        d_logits = barrier(d_logits.astype(hidden.dtype))
        d_table += dot_rows(d_logits, hidden, dtype=jnp.float32)
        if d_bias is not None:
            d_bias += jnp.sum(d_logits.astype(jnp.float32), axis=(0, 1))
        d_hidden = dot(d_logits, table_VD, (((2,), (0,)), ((), ())))
        return (jax.tree.map(jnp.add, sums, more), d_table, d_bias), d_hidden

    zero = jnp.zeros((), jnp.float32)
    start = ((zero,) * 3, jnp.zeros(table_VD.shape, jnp.float32),
             None if bias_V is None else jnp.zeros_like(bias_V))
    (sums, d_table, d_bias), d_hidden = over_chunks(one, start, (x_BTD, *parts), options.chunk)
    return sums, (d_hidden, d_table.astype(table_VD.dtype), d_bias)


def _backward(options: _Options, saved: Any, g: tuple[jax.Array, ...]) -> tuple[Any, None, None]:
    d_hidden, d_table, d_bias = saved
    return (d_hidden * g[0].astype(d_hidden.dtype), d_table * g[0].astype(d_table.dtype),
            None if d_bias is None else d_bias * g[0]), None, None


_summed.defvjp(_forward, _backward)


def _of_logits(found: Softmax, mask_BC: jax.Array, of_teacher: Any, fixed: Any,
               options: _Options) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The sums (total, nats, divergence) of a chunk, and d total / d raw logits [B, C, V]."""
    hard, temperature, z_loss = options.mix
    log_q = jax.nn.log_softmax(found.logits / temperature)
    if fixed is None:
        p, kl_BC = _from_known(Known(*of_teacher), log_q)
    else:
        table_VD, bias_V = fixed
        log_p = _log_p(of_teacher[0], table_VD, bias_V, options, log_q.shape[-1])
        p = jnp.exp(log_p)
        kl_BC = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)
    nats = jnp.sum((found.log_z - found.target) * mask_BC)
    kl = jnp.sum(kl_BC * mask_BC)
    total = (hard * nats + (1 - hard) * temperature**2 * kl
             + z_loss * jnp.sum(jnp.square(found.log_z) * mask_BC))
    of_q = (hard + 2 * z_loss * found.log_z)[..., None] / found.sum_exp
    d_logits = (of_q * found.exp - jnp.where(found.hit, hard, 0.0)
                + (1 - hard) * temperature * (jnp.exp(log_q) - p)) * mask_BC[..., None]
    if options.softcap:
        d_logits *= 1 - jnp.square(found.logits / options.softcap)
    return (total, nats, kl), d_logits


def _log_p(x_BCD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, options: _Options,
           vocab_size: int) -> jax.Array:
    """The teacher's log-probabilities [B, C, V]; -inf for ids that it does not have."""
    logits = _logits(x_BCD, table_VD, bias_V, options.teacher_softcap)
    log_p = jax.nn.log_softmax(logits / options.mix.temperature)
    missing = vocab_size - log_p.shape[-1]
    return jnp.pad(log_p, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def _logits(x_BCD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None,
            softcap: float) -> jax.Array:
    raw = lax.dot_general(x_BCD, table_VD, (((2,), (1,)), ((), ())),
                          preferred_element_type=jnp.float32)
    raw = raw if bias_V is None else raw + bias_V.reshape(1, 1, -1)
    return softcap * jnp.tanh(raw / softcap) if softcap else raw


def _from_known(known: Known, log_q_BCV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An estimate of the teacher's probabilities [B, C, V] and of the divergence [B, C]."""
    V, n = log_q_BCV.shape[-1], known.num_drawn
    p_BCK = jnp.exp(known.log_p_BTK)
    top = p_BCK[..., : p_BCK.shape[-1] - n]
    rest = jnp.maximum(1.0 - jnp.sum(top, axis=-1, keepdims=True), 0.0)
    share = jnp.broadcast_to(rest / max(n, 1), (*rest.shape[:-1], n))
    weight_BCK = jnp.concatenate([top, share], axis=-1)
    add = jax.vmap(jax.vmap(lambda ids, weight: jnp.zeros(V).at[ids].add(weight)))
    log_q_BCK = jnp.take_along_axis(log_q_BCV, known.ids_BTK, axis=-1)
    kl = jnp.sum(weight_BCK * (known.log_p_BTK - log_q_BCK), axis=-1)
    return add(known.ids_BTK, weight_BCK), kl
