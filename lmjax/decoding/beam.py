"""Beam search with a length penalty, as `transformers` defines it for early_stopping=False.

Shape suffixes: B batch, N beams, S answer slots, V vocab_size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least
from lmjax.decoding.generate import (
    Generator,
    Prompts,
    TokenIds,
    drawable,
    is_one_of,
    jit_on,
    padded,
    prefill,
    size,
)
from lmjax.models.cache import Cache
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout

NEVER = -1e9  # a score below that of every real sequence


class _Beams(NamedTuple):
    """The state of the search. Sequences are int32, -1 after their end."""

    step: jax.Array  # int32: tokens of the running beams
    logits_BNV: jax.Array  # of the next token of each running beam
    cache: Cache  # with B * N rows
    running_BNS: jax.Array
    scores_BN: jax.Array  # log-likelihoods of the running beams
    done_BNS: jax.Array  # the best finished beams, best first
    done_scores_BN: jax.Array  # their log-likelihood / length^penalty
    open_B: jax.Array  # bool: a running beam may still become better than a finished one


def beam_search(generator: Generator, params: Params, prompts: Sequence[Sequence[int]], *,
                max_tokens: int, num_beams: int, length_penalty: float = 1.0) -> list[list[int]]:
    """Finds for each prompt the answer with the best log-likelihood / length^length_penalty.

    The length includes the end-of-text token; the returned answers do not.

    Raises:
      UserError: see `Generator.check`.
    """
    at_least(1, num_beams=num_beams)
    generator.check(prompts, max_tokens)
    batch = padded(prompts)
    slots = size(batch.tokens.shape[1] + max_tokens, 32)
    search = _compiled(generator.model, generator.layout, generator.ids, slots, num_beams)
    best = np.asarray(search(params, batch, np.int32(max_tokens), np.float32(length_penalty)))
    return [row[: _length(row, generator.ids.end)].tolist() for row in best[: len(prompts)]]


def _length(row: np.ndarray, end_ids: Sequence[int]) -> int:
    ends = np.flatnonzero((row < 0) | np.isin(row, end_ids))
    return int(ends[0]) if len(ends) else len(row)


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, layout: Layout | None, ids: TokenIds, slots: int,
              N: int) -> Callable[..., jax.Array]:
    """(params, prompts, max_tokens, length penalty) -> the best answers, int32 [B, slots]."""

    def begin(params: Params, prompts: Prompts) -> _Beams:
        B = prompts.tokens.shape[0]
        rows = jnp.repeat(jnp.arange(B), N)
        logits, cache, _ = prefill(model, params, prompts, slots, ids.start)
        empty = jnp.full((B, N, slots), -1, jnp.int32)
        # All beams of a row begin alike, so only the first one may be extended.
        scores = jnp.where(jnp.arange(N).reshape(1, N) > 0, NEVER, jnp.zeros((B, N)))
        return _Beams(jnp.int32(0), logits[rows].reshape(B, N, -1), _rows(cache, rows), empty,
                      scores, empty, jnp.full((B, N), NEVER), ~jnp.asarray(prompts.unused))

    def search(params: Params, prompts: Prompts, max_tokens: jax.Array,
               penalty: jax.Array) -> jax.Array:
        params, B = model.for_decoding(params), prompts.tokens.shape[0]

        def more(s: _Beams) -> jax.Array:
            return (s.step < max_tokens) & jnp.any(s.open_B)

        def body(s: _Beams) -> _Beams:
            chosen = _extend(s, ids, max_tokens, penalty)
            rows = (jnp.arange(B)[:, None] * N + chosen.origin_BN).reshape(-1)
            last = jax.lax.dynamic_index_in_dim(chosen.running_BNS, s.step, 2, keepdims=False)
            logits, cache = model.step(params, last.reshape(-1, 1), _rows(s.cache, rows))
            length = (s.step + 1).astype(jnp.float32)
            # A running beam is compared at its present length; while fewer than N beams have
            # finished, the worst finished score is NEVER.
            worst = jnp.min(chosen.done_scores_BN, axis=1)
            worst = jnp.where(worst > NEVER / 2, worst, NEVER)
            still = s.open_B & (chosen.scores_BN[:, 0] / length**penalty > worst)
            return _Beams(s.step + 1, logits.reshape(B, N, -1), cache, chosen.running_BNS,
                          chosen.scores_BN, chosen.done_BNS, chosen.done_scores_BN, still)

        return jax.lax.while_loop(more, body, begin(params, prompts)).done_BNS[:, 0]

    return jit_on(layout, search, out_shardings=None if layout is None else layout.replicated)


class _Chosen(NamedTuple):
    running_BNS: jax.Array
    scores_BN: jax.Array
    origin_BN: jax.Array  # the beam that each running beam extends
    done_BNS: jax.Array
    done_scores_BN: jax.Array


def _extend(s: _Beams, ids: TokenIds, max_tokens: jax.Array, penalty: jax.Array) -> _Chosen:
    """Sorts the M best continuations into finished beams and the N best that run on.

    M is so large that N of them do not end: each beam may be extended by every end token.
    """
    B, N, V = s.logits_BNV.shape
    # Banned tokens keep their share of the probability, as in transformers.
    known = drawable(s.logits_BNV.reshape(-1, V), ids._replace(banned=()))
    log_p = drawable(jax.nn.log_softmax(known, axis=-1), ids)
    totals = log_p.reshape(B, N, V) + s.scores_BN[:, :, None]
    M = max(2, 1 + len(ids.end)) * N
    scores, index = jax.lax.top_k(totals.reshape(B, -1), M)
    origin, token = index // V, (index % V).astype(jnp.int32)
    sequences = jnp.take_along_axis(s.running_BNS, origin[:, :, None], axis=1)
    sequences = sequences.at[:, :, s.step].set(token)
    ends = is_one_of(token, ids.end) | (s.step + 1 >= max_tokens)
    run_scores, run = jax.lax.top_k(jnp.where(ends, scores + NEVER, scores), N)
    # Only an end among the N best continuations counts: the others would not have been beams.
    counts = ends & (jnp.arange(M).reshape(1, -1) < N) & s.open_B[:, None]
    finished = jnp.where(counts, scores / (s.step + 1).astype(jnp.float32)**penalty, NEVER)
    done_scores, done = jax.lax.top_k(jnp.concatenate([s.done_scores_BN, finished], axis=1), N)
    merged = jnp.concatenate([s.done_BNS, sequences], axis=1)
    return _Chosen(jnp.take_along_axis(sequences, run[:, :, None], axis=1), run_scores,
                   jnp.take_along_axis(origin, run, axis=1),
                   jnp.take_along_axis(merged, done[:, :, None], axis=1), done_scores)


def _rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache with the given rows in the given order."""
    # Counted from the end, the axes are the same for stacked arrays and for one array per layer.
    take = functools.partial(jax.tree.map, lambda x_BGSK: jnp.take(x_BGSK, rows, axis=-4))
    source = cache.source
    if source is not None:
        source = source._replace(segments=source.segments[rows], cache=take(source.cache))
    return Cache(take(cache.layers), cache.slot[rows], source)
