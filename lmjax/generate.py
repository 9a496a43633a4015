"""Sampling from a decoder with a key/value cache; one compiled loop a bucket of shapes.

Shape suffixes: B batch, P prompt bucket, S cache slots, V vocab_size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.models import Model
from lmjax.nn.module import Params
from lmjax.recipe import check_sampling
from lmjax.sharding import Layout, use_layout


class Sampling(NamedTuple):
    """temperature: 0 is greedy. top_k: 0 is all. top_p: the smallest set of tokens with this probability
    (Holtzman et al. 2020, arXiv:1904.09751). Traced, so that changing them compiles nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


PLAIN = Sampling()

def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id a row, int32 [B], from softmax(logits / temperature) cut to top_k and then to top_p."""
    V = logits_BV.shape[-1]
    scaled = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    ranked = -jnp.sort(-scaled, axis=-1)
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kept = jnp.arange(V).reshape(1, V) < top_k
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    # A token stays while those ranked above it have less than top_p together, so one always stays.
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)  # rounded sums may pass 1 before the last token
    kept &= jnp.cumsum(probability, axis=-1) - probability < top_p
    lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.vmap(jax.random.categorical)(keys_B, jnp.where(scaled >= lowest, scaled, -jnp.inf))
    return jnp.where(sampling.temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


class Generator:
    """Continues prompts. Compiles once for every (batch, prompt, total) bucket: powers of two."""

    def __init__(self, model: Model, layout: Layout | None = None, *, eos_id: int = -1, vocab_size: int = 0):
        # A model's table may be padded beyond the tokenizer's vocab_size; such ids are never drawn.
        self.model, self.eos_id, self.vocab_size = model, eos_id, vocab_size or model.config.vocab_size
        # A handful of rows, one token at a time, need not divide the mesh: only the weights are split.
        self.layout = layout and dataclasses.replace(layout, rules={**layout.rules, "batch": (), "seq": ()})

    def __call__(self, params: Params, prompts: Sequence[Sequence[int]], *, max_tokens: int,
                 sampling: Sampling = PLAIN, seed: int = 0) -> list[list[int]]:
        """The tokens that follow each prompt, up to `max_tokens` and without the end-of-text token.

        A row's randomness is keyed by (seed, row, position in the answer): it does not depend on the other rows.

        Raises:
          ValueError: see `check`.
        """
        longest = self.check(prompts, max_tokens, sampling)
        B, P = _bucket(len(prompts), 1), _bucket(longest, 16)
        tokens, lengths = np.zeros((B, P), np.int32), np.ones(B, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        loop = _compiled(self.model, self.layout, self.eos_id, self.vocab_size, _bucket(P + max_tokens, 32))
        padding = np.arange(B) >= len(prompts)
        answers, ends = loop(params, tokens, lengths, padding, np.int32(max_tokens), np.int32(seed % 2**31),
                             Sampling(*(np.asarray(v) for v in sampling)))
        answers, ends = np.asarray(answers), np.asarray(ends)
        return [answers[row, : ends[row]].tolist() for row in range(len(prompts))]

    def check(self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling = PLAIN) -> int:
        """The length of the longest prompt.

        Raises:
          ValueError: no or an empty prompt, more positions than a learned table has, or sampling settings out of range.
        """
        check_sampling(*sampling)
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("prompts: expected one or more, each of at least one token, got an empty one; begin it "
                             "with bos_id")
        longest = max(map(len, prompts))
        limit = self.model.config.max_positions if self.model.config.positions == "learned" else None
        if limit and longest + max_tokens > limit:
            raise ValueError(f"max_tokens: expected prompt and answer within max_positions={limit}, got {longest} "
                             f"+ {max_tokens}; shorten one of them")
        return longest


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, layout: Layout | None, eos_id: int, vocab_size: int,
              slots: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, tokens [B, P], lengths [B], unused rows bool [B], max_tokens, seed, sampling) -> (answers [B, slots],
    their lengths [B])."""

    def run(params: Params, tokens: jax.Array, lengths: jax.Array, unused: jax.Array, max_tokens: jax.Array,
            seed: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
        B = tokens.shape[0]
        row_keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(B))

        def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
            known = jnp.arange(logits.shape[-1]).reshape(1, -1) < vocab_size
            keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(row_keys)
            return sample(jnp.where(known, logits, -jnp.inf), keys, sampling)

        def more(carry: tuple[jax.Array, ...]) -> jax.Array:
            i, _, _, _, ended, _ = carry
            return (i < max_tokens) & ~jnp.all(ended)

        def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            i, last, answers, ends, ended, cache = carry
            ended |= last == eos_id
            answers = answers.at[:, i].set(jnp.where(ended, 0, last))
            ends += ~ended
            logits, cache = model.step(params, last[:, None], cache)
            return i + 1, draw(logits, i + 1), answers, ends, ended, cache

        logits, cache = model.step(params, tokens, model.init_cache(B, slots), lengths - 1)
        start = (jnp.int32(0), draw(logits, jnp.int32(0)), jnp.zeros((B, slots), jnp.int32), jnp.zeros(B, jnp.int32),
                 unused, cache)
        _, _, answers, ends, _, _ = jax.lax.while_loop(more, body, start)
        return answers, ends

    def traced(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        with use_layout(layout):
            return run(*args)

    return jax.jit(traced, out_shardings=None if layout is None else layout.replicated)


def _bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << max(n - 1, least - 1).bit_length()
