"""Speculative decoding: a small model proposes, the large one checks several tokens at once.

What comes out is distributed exactly as if the large model had drawn every token (Leviathan et al. 2023,
arXiv:2211.17192, theorem 1). Shape suffixes: B batch, K proposed tokens, S answer slots, V vocab_size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least
from lmjax.decoding.generate import Generator, bucket, jit_on, known, padded, prefill, row_keys
from lmjax.decoding.sampling import PLAIN, Sampling, adjust
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout


class Draft(NamedTuple):
    """A small model with the same tokenizer, and how many tokens it proposes at a time."""

    model: Model
    params: Params
    propose: int = 4


class _State(NamedTuple):
    round: jax.Array
    last: jax.Array
    answers: jax.Array
    ends: jax.Array
    ended: jax.Array
    accepted: jax.Array  # of all proposals, by row
    cache: Any
    draft_cache: Any


def speculate(generator: Generator, params: Params, draft: Draft, prompts: Sequence[Sequence[int]], *, max_tokens: int,
              sampling: Sampling = PLAIN, seed: int = 0) -> tuple[list[list[int]], float]:
    """(answers like those of `Generator`, tokens a row gained with each look of the large model at the text).

    Raises:
      ValueError: another vocabulary, a repetition penalty (it would change between proposal and check), or what
        `Generator.check` refuses.
    """
    at_least(1, propose=draft.propose)
    for model in (generator.model, draft.model):
        if model.config.vocab_size < generator.vocab_size:
            raise ValueError(f"draft: expected a model of {generator.vocab_size} tokens, got one of "
                             f"{model.config.vocab_size}; use one trained with the same tokenizer")
    if sampling.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty: expected 1 with a draft model, got {sampling.repetition_penalty}; leave "
                         "one of them out")
    longest = generator.check(prompts, max_tokens + draft.propose, sampling)
    Generator(draft.model, eos_id=-1).check(prompts, max_tokens + draft.propose)
    batch = padded(prompts)
    slots = bucket(max(longest, batch.tokens.shape[1]) + max_tokens + draft.propose + 1, 32)
    run = _compiled(generator.model, draft.model, generator.layout, generator.eos_id, generator.vocab_size,
                    generator.start_id, slots, draft.propose)
    answers, ends, gained = run(params, draft.params, *batch, np.int32(max_tokens), np.int32(seed % 2**31),
                                Sampling(*(np.asarray(v) for v in sampling)))
    answers, ends = np.asarray(answers), np.minimum(np.asarray(ends), max_tokens)
    return [answers[row, : ends[row]].tolist() for row in range(len(prompts))], float(gained)


def verify(p_BKV: jax.Array, q_BKV: jax.Array, proposed_BK: jax.Array,
           keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many proposals each row keeps, int32 [B], and the token behind them, int32 [B].

    p: the large model's probabilities, [B, K + 1, V]. q: those that the proposals were drawn from, [B, K, V].
    """
    K = proposed_BK.shape[1]
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (K,)))(keys_B)
    of = proposed_BK[:, :, None]
    p_of = jnp.take_along_axis(p_BKV[:, :K], of, axis=2)[:, :, 0]
    q_of = jnp.take_along_axis(q_BKV, of, axis=2)[:, :, 0]
    keeps = jnp.cumprod((u * q_of < p_of).astype(jnp.int32), axis=1)
    count = jnp.sum(keeps, axis=1)
    # Behind the first refusal what q covers too often is left out; behind the last proposal there is no q.
    q = jnp.concatenate([q_BKV, jnp.zeros_like(q_BKV[:, :1])], axis=1)
    rest = jnp.take_along_axis(jnp.maximum(p_BKV - q, 0.0), count[:, None, None], axis=1)[:, 0]
    token = jax.vmap(lambda key, r: jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(r)))(keys_B, rest)
    return count, token.astype(jnp.int32)


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, draft: Model, layout: Layout | None, eos_id: int, vocab_size: int, start_id: int,
              slots: int, K: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(params, draft's, prompts, max_tokens, seed, sampling) -> (answers [B, slots], their lengths, tokens a look)."""

    def run(params: Params, draft_params: Params, tokens: jax.Array, lengths: jax.Array, unused: jax.Array,
            max_tokens: jax.Array, seed: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
        B = tokens.shape[0]
        params, draft_params = model.for_decoding(params), draft.for_decoding(draft_params)

        def draw(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
            wanted = adjust(known(logits, vocab_size), sampling)
            token = jax.vmap(jax.random.categorical)(row_keys(seed, B, step), wanted)
            return token.astype(jnp.int32), jax.nn.softmax(wanted, axis=-1)

        def body(s: _State) -> _State:
            step, token, cache = s.round * (K + 2) + 1, s.last, s.draft_cache
            proposed, q = [], []
            for k in range(K):
                logits, cache = draft.step(draft_params, token[:, None], cache)
                token, probability = draw(logits, step + k)
                proposed.append(token)
                q.append(probability)
            _, cache = draft.step(draft_params, token[:, None], cache)  # for the rows that keep them all
            proposed_BK = jnp.stack(proposed, axis=1)
            fed = jnp.concatenate([s.last[:, None], proposed_BK], axis=1)
            logits, checked = model.extend(params, fed, s.cache)
            V = logits.shape[-1]
            p = jax.nn.softmax(adjust(known(logits.reshape(-1, V), vocab_size), sampling), axis=-1).reshape(B, K + 1, V)
            count, after = verify(p, jnp.stack(q, axis=1), proposed_BK, row_keys(seed, B, step + K))
            # What was drawn stays: the proposals that were kept and the token behind them; last was there before.
            block = jnp.where(jnp.arange(K + 1).reshape(1, -1) <= count[:, None], fed, -1)
            ends, ended = _until_eos(block, s, eos_id)
            answers = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
                s.answers, block, s.ends)
            kept = s.cache.slot + count + 1
            return _State(s.round + 1, after, answers, ends, ended | (ends >= max_tokens),
                          s.accepted + jnp.where(s.ended, 0, count + 1),
                          checked._replace(slot=kept), cache._replace(slot=kept))

        # What is refused is taken back, which a ring that holds a window's tokens only cannot.
        logits, cache, _ = prefill(model, params, tokens, lengths, slots, start_id, rings=False)
        _, draft_cache, _ = prefill(draft, draft_params, tokens, lengths, slots, start_id, rings=False)
        last, _ = draw(logits, jnp.int32(0))
        zeros = jnp.zeros(B, jnp.int32)
        s = _State(jnp.int32(0), last, jnp.zeros((B, slots), jnp.int32), zeros, unused, zeros, cache, draft_cache)
        s = jax.lax.while_loop(lambda s: ~jnp.all(s.ended), body, s)
        return s.answers, s.ends, jnp.max(s.accepted) / jnp.maximum(s.round, 1)

    return jit_on(layout, run, out_shardings=None if layout is None else layout.replicated)


def _until_eos(block: jax.Array, s: _State, eos_id: int) -> tuple[jax.Array, jax.Array]:
    """The rows' new lengths and which have ended, when `block` (-1 behind its end) follows."""
    is_eos = (block == eos_id) & (block >= 0)
    real = (jnp.cumsum(is_eos, axis=1) == 0) & (block >= 0)
    return s.ends + jnp.where(s.ended, 0, jnp.sum(real, axis=1)), s.ended | jnp.any(is_eos, axis=1)
