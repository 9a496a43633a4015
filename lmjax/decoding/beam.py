"""Beam search with a length penalty, as `transformers` defines it (its early_stopping=False).

Shape suffixes: B batch, N beams, S answer slots, V vocab_size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least
from lmjax.decoding.generate import Generator, bucket, jit_on, known, padded, prefill
from lmjax.models.cache import Cache
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout

NEVER = -1e9  # a score that no real sequence has


class _Beams(NamedTuple):
    step: jax.Array
    logits_BNV: jax.Array  # behind each running beam
    cache: Cache  # of B * N rows
    running_BNS: jax.Array
    scores_BN: jax.Array  # log-likelihoods of the running beams
    done_BNS: jax.Array
    done_scores_BN: jax.Array  # log-likelihood / length^penalty of the finished ones
    open_B: jax.Array  # whether a running beam may still beat a finished one


def beam_search(generator: Generator, params: Params, prompts: Sequence[Sequence[int]], *, max_tokens: int,
                num_beams: int, length_penalty: float = 1.0) -> list[list[int]]:
    """The answer of each prompt with the best log-likelihood / length^length_penalty that the beams meet.

    Ended answers count their end-of-text token, which is left out of what is returned.

    Raises:
      ValueError: see `Generator.check`.
    """
    at_least(1, num_beams=num_beams)
    generator.check(prompts, max_tokens)
    batch = padded(prompts)
    slots = bucket(batch.tokens.shape[1] + max_tokens, 32)
    search = _compiled(generator.model, generator.layout, generator.eos_id, generator.vocab_size,
                       generator.start_id, slots, num_beams)
    best = np.asarray(search(params, *batch, np.int32(max_tokens), np.float32(length_penalty)))
    return [[int(t) for t in row[: _length(row, generator.eos_id)]] for row in best[: len(prompts)]]


def _length(row: np.ndarray, eos_id: int) -> int:
    ends = np.flatnonzero((row < 0) | (row == eos_id))
    return int(ends[0]) if len(ends) else len(row)


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, layout: Layout | None, eos_id: int, vocab_size: int, start_id: int, slots: int,
              N: int) -> Callable[..., jax.Array]:
    """(params, prompts, max_tokens, length penalty) -> the best answers int32 [B, slots], -1 behind their ends."""

    def search(params: Params, tokens: jax.Array, lengths: jax.Array, unused: jax.Array, max_tokens: jax.Array,
               penalty: jax.Array) -> jax.Array:
        params, B = model.for_decoding(params), tokens.shape[0]
        rows = jnp.repeat(jnp.arange(B), N)
        logits, cache, _ = prefill(model, params, tokens, lengths, slots, start_id)
        empty = jnp.full((B, N, slots), -1, jnp.int32)
        start = _Beams(
            jnp.int32(0), logits[rows].reshape(B, N, -1), _reorder(cache, rows), empty,
            # All beams begin equal, so only the first may be extended.
            jnp.where(jnp.arange(N).reshape(1, N) > 0, NEVER, jnp.zeros((B, N))), empty,
            jnp.full((B, N), NEVER), ~unused)

        def more(s: _Beams) -> jax.Array:
            return (s.step < max_tokens) & jnp.any(s.open_B)

        def body(s: _Beams) -> _Beams:
            chosen = _extend(s, vocab_size, eos_id, max_tokens, penalty)
            flat = (jnp.arange(B)[:, None] * N + chosen.origin_BN).reshape(-1)
            last = jax.lax.dynamic_index_in_dim(chosen.running_BNS, s.step, 2, keepdims=False)
            logits, cache = model.step(params, last.reshape(-1, 1), _reorder(s.cache, flat))
            length = (s.step + 1).astype(jnp.float32)
            # A running beam is worth its score at the present length; finished ones fall out once all N are better.
            worst = jnp.where(jnp.min(chosen.done_scores_BN, axis=1) > NEVER / 2,
                              jnp.min(chosen.done_scores_BN, axis=1), NEVER)
            still = s.open_B & (chosen.scores_BN[:, 0] / length**penalty > worst)
            return _Beams(s.step + 1, logits.reshape(B, N, -1), cache, chosen.running_BNS, chosen.scores_BN,
                          chosen.done_BNS, chosen.done_scores_BN, still)

        s = jax.lax.while_loop(more, body, start)
        return s.done_BNS[:, 0]

    return jit_on(layout, search, out_shardings=None if layout is None else layout.replicated)


class _Chosen(NamedTuple):
    running_BNS: jax.Array
    scores_BN: jax.Array
    origin_BN: jax.Array  # which beam each was before
    done_BNS: jax.Array
    done_scores_BN: jax.Array


def _extend(s: _Beams, vocab_size: int, eos_id: int, max_tokens: jax.Array, penalty: jax.Array) -> _Chosen:
    """The 2N best continuations: those that end now join the finished ones, the best N others run on."""
    B, N, V = s.logits_BNV.shape
    log_p = jax.nn.log_softmax(known(s.logits_BNV.reshape(-1, V), vocab_size), axis=-1).reshape(B, N, V)
    scores, index = jax.lax.top_k((log_p + s.scores_BN[:, :, None]).reshape(B, -1), 2 * N)
    origin, token = index // V, (index % V).astype(jnp.int32)
    sequences = jnp.take_along_axis(s.running_BNS, origin[:, :, None], axis=1).at[:, :, s.step].set(token)
    ends = (token == eos_id) | (s.step + 1 >= max_tokens)
    run_scores, run = jax.lax.top_k(jnp.where(ends, scores + NEVER, scores), N)
    # Only an end among the N best counts: others would not have been beams.
    counts = ends & (jnp.arange(2 * N).reshape(1, -1) < N) & s.open_B[:, None]
    finished = jnp.where(counts, scores / (s.step + 1).astype(jnp.float32)**penalty, NEVER)
    done_scores, done = jax.lax.top_k(jnp.concatenate([s.done_scores_BN, finished], axis=1), N)
    merged = jnp.concatenate([s.done_BNS, sequences], axis=1)
    return _Chosen(jnp.take_along_axis(sequences, run[:, :, None], axis=1), run_scores,
                   jnp.take_along_axis(origin, run, axis=1),
                   jnp.take_along_axis(merged, done[:, :, None], axis=1), done_scores)


def _reorder(cache: Cache, rows: jax.Array) -> Cache:
    take = functools.partial(jax.tree.map, lambda x: jnp.take(x, rows, axis=-4))  # of [B, G, S, K], stacked or apart
    source = cache.source
    if source is not None:
        source = source._replace(segments=source.segments[rows], cache=take(source.cache))
    return Cache(take(cache.layers), cache.slot[rows], source)
