"""Speculative decoding: a small draft model proposes tokens, the large model checks them at once.

The answers are distributed exactly as if the large model had drawn every token (Leviathan et al.
2023, arXiv:2211.17192, theorem 1).

Shape suffixes: B batch, K proposed tokens, S answer slots, V vocab_size.
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
    row_keys,
    size,
)
from lmjax.decoding.sampling import PLAIN, Sampling, adjust
from lmjax.errors import UserError
from lmjax.models.cache import Cache
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout


class Draft(NamedTuple):
    """A small model with the same tokenizer."""

    model: Model
    params: Params
    propose: int = 4  # tokens per round


class _State(NamedTuple):
    round: jax.Array  # int32: checks of the large model so far
    last: jax.Array  # int32 [B]: the next token of each row, drawn but not yet fed
    answers: jax.Array  # int32 [B, S]
    ends: jax.Array  # int32 [B]: tokens of each answer
    ended: jax.Array  # bool [B]
    gained: jax.Array  # int32 [B]: tokens this row has gained in all rounds
    cache: Cache
    draft_cache: Cache


def speculate(generator: Generator, params: Params, draft: Draft,
              prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = PLAIN,
              seed: int = 0) -> tuple[list[list[int]], float]:
    """Answers like `Generator`, with fewer steps of the large model.

    Returns:
      (the answers, the tokens that a row gained per step of the large model).
    Raises:
      UserError: the draft has fewer tokens than the tokenizer, there is a repetition penalty (its
        distribution would change between proposal and check), or see `Generator.check`.
    """
    at_least(1, propose=draft.propose)
    for model in (generator.model, draft.model):
        if model.config.vocab_size < generator.ids.vocab_size:
            raise UserError(f"a model of {generator.ids.vocab_size} tokens",
                            f"one of {model.config.vocab_size}",
                            "use one trained with the same tokenizer", where="draft")
    if sampling.repetition_penalty != 1:
        raise UserError("1 with a draft model", sampling.repetition_penalty,
                        "leave one of them out", where="repetition_penalty")
    longest = generator.check(prompts, max_tokens + draft.propose, sampling)
    Generator(draft.model).check(prompts, max_tokens + draft.propose)
    batch = padded(prompts)
    slots = size(max(longest, batch.tokens.shape[1]) + max_tokens + draft.propose + 1, 32)
    run = _compiled(generator.model, draft.model, generator.layout, generator.ids, slots,
                    draft.propose)
    answers, ends, gained = map(np.asarray, run(
        (params, draft.params), batch, np.int32(max_tokens), np.int32(seed % 2**31),
        jax.tree.map(np.asarray, sampling)))
    ends = np.minimum(ends, max_tokens)
    return [answers[row, : ends[row]].tolist() for row in range(len(prompts))], float(gained)


def verify(p_BKV: jax.Array, q_BKV: jax.Array, proposed_BK: jax.Array,
           keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decides how many proposals each row keeps, and draws the token after them.

    Args:
      p_BKV: [B, K + 1, V], the large model's probabilities.
      q_BKV: [B, K, V], the draft's probabilities, from which the proposals were drawn.
    Returns:
      (number of kept proposals, next token), both int32 [B].
    """
    K = proposed_BK.shape[1]
    u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (K,)))(keys_B)
    of = proposed_BK[:, :, None]
    p_of = jnp.take_along_axis(p_BKV[:, :K], of, axis=2)[:, :, 0]
    q_of = jnp.take_along_axis(q_BKV, of, axis=2)[:, :, 0]
    keeps = jnp.cumprod((u * q_of < p_of).astype(jnp.int32), axis=1)
    count = jnp.sum(keeps, axis=1)
    # After a refusal the next token comes from max(p - q, 0); after the last proposal, from p.
    q = jnp.concatenate([q_BKV, jnp.zeros_like(q_BKV[:, :1])], axis=1)
    rest = jnp.maximum(p_BKV - q, 0.0)
    rest = jnp.take_along_axis(rest, count[:, None, None], axis=1)[:, 0]
    token = jax.vmap(lambda key, r: jax.random.categorical(
        jax.random.fold_in(key, 1), jnp.log(r)))(keys_B, rest)
    return count, token.astype(jnp.int32)


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, draft: Model, layout: Layout | None, ids: TokenIds, slots: int,
              K: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """((params, the draft's), prompts, max_tokens, seed, sampling) -> (answers, lengths, gain)."""

    def draw(logits_BV: jax.Array, step: jax.Array, seed: jax.Array,
             sampling: Sampling) -> tuple[jax.Array, jax.Array]:
        """The next token of each row, and the probabilities that it was drawn from."""
        wanted = adjust(drawable(logits_BV, ids), sampling)
        keys = row_keys(seed, len(wanted), step)
        token = jax.vmap(jax.random.categorical)(keys, wanted)
        return token.astype(jnp.int32), jax.nn.softmax(wanted, axis=-1)

    def run(params: tuple[Params, Params], prompts: Prompts, max_tokens: jax.Array,
            seed: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
        B = prompts.tokens.shape[0]
        large, small = model.for_decoding(params[0]), draft.for_decoding(params[1])

        def body(s: _State) -> _State:
            step = s.round * (K + 2) + 1
            proposed_BK, q_BKV, draft_cache = _propose(
                draft, small, s, K, lambda logits, k: draw(logits, step + k, seed, sampling))
            fed = jnp.concatenate([s.last[:, None], proposed_BK], axis=1)
            logits, cache = model.extend(large, fed, s.cache)
            flat = drawable(logits.reshape(-1, logits.shape[-1]), ids)
            p_BKV = jax.nn.softmax(adjust(flat, sampling), axis=-1).reshape(logits.shape)
            count, after = verify(p_BKV, q_BKV, proposed_BK, row_keys(seed, B, step + K))
            # The answer grows by `last` and the kept proposals; `after` is the next `last`.
            block = jnp.where(jnp.arange(K + 1).reshape(1, -1) <= count[:, None], fed, -1)
            ends, ended = _until_end(block, s, ids.end)
            answers = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
                s.answers, block, s.ends)
            slot = s.cache.slot + count + 1
            return _State(s.round + 1, after, answers, ends, ended | (ends >= max_tokens),
                          s.gained + jnp.where(s.ended, 0, count + 1),
                          cache._replace(slot=slot), draft_cache._replace(slot=slot))

        # Refused tokens are taken back, which a ring of a window's tokens does not allow.
        logits, cache, _ = prefill(model, large, prompts, slots, ids.start, rings=False)
        _, draft_cache, _ = prefill(draft, small, prompts, slots, ids.start, rings=False)
        last, _ = draw(logits, jnp.int32(0), seed, sampling)
        zeros = jnp.zeros(B, jnp.int32)
        s = _State(jnp.int32(0), last, jnp.zeros((B, slots), jnp.int32), zeros,
                   jnp.asarray(prompts.unused), zeros, cache, draft_cache)
        s = jax.lax.while_loop(lambda s: ~jnp.all(s.ended), body, s)
        return s.answers, s.ends, jnp.max(s.gained) / jnp.maximum(s.round, 1)

    return jit_on(layout, run, out_shardings=None if layout is None else layout.replicated)


def _propose(draft: Model, params: Params, s: _State, K: int,
             draw: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
             ) -> tuple[jax.Array, jax.Array, Cache]:
    """K proposals [B, K], the probabilities [B, K, V] that they were drawn from, and the cache."""
    token, cache, proposed, q = s.last, s.draft_cache, [], []
    for k in range(K):
        logits, cache = draft.step(params, token[:, None], cache)
        token, probability = draw(logits, k)
        proposed.append(token)
        q.append(probability)
    # Where a row keeps all proposals, its cache needs the last one, too.
    _, cache = draft.step(params, token[:, None], cache)
    return jnp.stack(proposed, axis=1), jnp.stack(q, axis=1), cache


def _until_end(block: jax.Array, s: _State,
               end_ids: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """(the new lengths of the answers, which rows have ended) after `block`, -1 after its end."""
    is_end = is_one_of(block, end_ids) & (block >= 0)
    real = (jnp.cumsum(is_end, axis=1) == 0) & (block >= 0)
    return s.ends + jnp.where(s.ended, 0, jnp.sum(real, axis=1)), s.ended | jnp.any(is_end, axis=1)
