"""How the engine draws tokens: every row by its own settings.

Shape suffixes: B rows, V vocab_size, A alternatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.decoding.generate import TokenIds, drawable, is_one_of
from lmjax.decoding.sampling import PLAIN, Sampling, penalise, sample
from lmjax.serving.requests import MAX_ALTERNATIVES, MAX_BIAS, MAX_STOPS, Request

Array = jax.Array | np.ndarray


class Settings(NamedTuple):
    """How the rows are answered: arrays with one entry per row."""

    sampling: Sampling  # of arrays [B, 1]
    seed: Array  # int32 [B]
    limit: Array  # int32 [B]: tokens of an answer
    stops: Array  # int32 [B, MAX_STOPS]: further tokens that end it; -1: none
    bias_ids: Array  # int32 [B, MAX_BIAS]; unused entries add 0 to the token 0
    bias: Array  # float32 [B, MAX_BIAS]
    alternatives: Array  # bool [B]: whether the likeliest tokens are wanted

    def repeat(self, times: int) -> "Settings":
        """The same settings for rows that are repeated, each `times` times in a row."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


class Drawn(NamedTuple):
    """The tokens that a program drew, and what the model thought of them."""

    real: jax.Array  # bool [B]; the other entries mean nothing where this is False
    token: jax.Array  # int32 [B]
    is_end: jax.Array  # bool [B]: the token ends the answer and is no part of it
    logprob: jax.Array  # float32 [B]
    likeliest: jax.Array  # int32 [B, A]
    their_logprobs: jax.Array  # float32 [B, A]


class Told(NamedTuple):
    """`Drawn` for the host, which reads one array per program: each costs as much as the next."""

    packed: Any  # int32 [B, T, 3]: 0 or REAL or REAL + END, the token, the bits of its logprob
    likeliest: Any  # int32 [B, T, A]: read only if a row wants it
    their_logprobs: Any  # float32 [B, T, A]


REAL, END = 1, 2


def told(drawn: Drawn) -> Told:
    """Packs what was drawn, [B, T]."""
    flags = REAL * drawn.real + END * (drawn.real & drawn.is_end)
    bits = jax.lax.bitcast_convert_type(drawn.logprob, jnp.int32)
    return Told(jnp.stack([flags.astype(jnp.int32), drawn.token, bits], axis=-1), drawn.likeliest,
                drawn.their_logprobs)


def settings_of(request: Request) -> Settings:
    """The settings of one row."""
    sampling: Any = jax.tree.map(
        lambda value, plain: np.full((1, 1), value, np.int32 if type(plain) is int else np.float32),
        request.sampling, PLAIN)
    ids, bias = np.zeros((1, MAX_BIAS), np.int32), np.zeros((1, MAX_BIAS), np.float32)
    if request.bias:
        ids[0, : len(request.bias)], bias[0, : len(request.bias)] = zip(*request.bias, strict=True)
    stops = np.full((1, MAX_STOPS), -1, np.int32)
    stops[0, : len(request.stop_ids)] = request.stop_ids
    return Settings(sampling, np.array([request.seed % 2**31], np.int32),
                    np.array([request.max_tokens], np.int32), stops, ids, bias,
                    np.array([request.alternatives > 0]))


def keys_at(settings: Settings, position_B: jax.Array) -> jax.Array:
    """One random key per row, [B], made of its seed and of the position in its answer alone.

    They are those of `Generator` for a single prompt.
    """
    return jax.vmap(lambda seed, position: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), 0), position))(settings.seed, position_B)


def biased(logits_BV: jax.Array, settings: Settings, ids: TokenIds,
           then: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
    """then(the logits with the rows' biases, and -inf for ids that are never drawn)."""
    # One array of logits per branch: on a CPU each further one costs as much as drawing from it.
    return jax.lax.cond(
        jnp.any(settings.bias != 0),
        lambda: then(jax.vmap(lambda row, at, bias: row.at[at].add(bias))(
            drawable(logits_BV, ids), settings.bias_ids, settings.bias)),
        lambda: then(drawable(logits_BV, ids)))


def draw(logits_BV: jax.Array, seen_BV: jax.Array, settings: Settings, position_B: jax.Array,
         ids: TokenIds, real_B: jax.Array) -> Drawn:
    """Draws one token per row.

    Args:
      seen_BV: bool, the tokens that occurred before.
      position_B: int32, of the token in its answer.
      real_B: bool, the rows that need a token.
    """
    wanted = biased(logits_BV, settings, ids, lambda logits: penalise(
        logits, seen_BV, settings.sampling.repetition_penalty))
    token = sample(wanted, keys_at(settings, position_B), settings.sampling)
    return Drawn(real_B, token, ends(token, settings, ids),
                 *scored(logits_BV, token, ids, jnp.any(settings.alternatives)))


def ends(token_B: jax.Array, settings: Settings, ids: TokenIds) -> jax.Array:
    """Whether the tokens end the answers of their rows, bool [B]."""
    return is_one_of(token_B, ids.end) | jnp.any(token_B[:, None] == settings.stops, axis=1)


def scored(logits_BV: jax.Array, token_B: jax.Array, ids: TokenIds,
           alternatives: jax.Array | bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The log-probabilities of tokens, the likeliest tokens, and their log-probabilities.

    Args:
      alternatives: whether the likeliest tokens are wanted.

    Returns:
      float32 [B], int32 [B, A] and float32 [B, A], by the model at temperature 1.
    """
    log_sum = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    of = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1) - log_sum
    shape = len(token_B), min(MAX_ALTERNATIVES, logits_BV.shape[-1])
    best, likeliest = jax.lax.cond(
        alternatives,
        lambda: tuple(jax.lax.top_k(drawable(logits_BV - log_sum, ids), shape[1])),
        lambda: (jnp.zeros(shape), jnp.zeros(shape, jnp.int32)))
    return of[:, 0], likeliest, best
