"""Generation with a key/value cache; one compiled loop a bucket of shapes.

Shape suffixes: B batch, P prompt bucket, S cache slots, V vocab_size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least
from lmjax.decoding.sampling import PLAIN, Sampling, penalise, sample
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout, use_layout

Watch = Callable[[list[list[int]]], Sequence[bool]]
CHUNK = 16  # tokens between two looks at what has been generated


class State(NamedTuple):
    """A batch in mid-generation: `last` [B] has been drawn and is not yet fed, `step` tokens of `answers` [B, S] are
    there, `ends` [B] of them before the row ended; seen: bool [B, V], the tokens of prompt and answer."""

    step: jax.Array
    last: jax.Array
    answers: jax.Array
    ends: jax.Array
    ended: jax.Array
    seen: jax.Array
    cache: Any


class Prompts(NamedTuple):
    """Prompts as arrays of a bucket's size: tokens int32 [B, P], lengths int32 [B], unused rows bool [B]."""

    tokens: np.ndarray
    lengths: np.ndarray
    unused: np.ndarray


class Generator:
    """Continues prompts. Compiles once for every (batch, prompt, total) bucket: powers of two."""

    def __init__(self, model: Model, layout: Layout | None = None, *, eos_id: int = -1, vocab_size: int = 0,
                 start_id: int = 0):
        # An encoder-decoder reads the prompts with its encoder, and answers behind start_id.
        self.start_id = start_id
        # A model's table may be padded beyond the tokenizer's vocab_size; such ids are never drawn.
        self.model, self.eos_id, self.vocab_size = model, eos_id, vocab_size or model.config.vocab_size
        # A handful of rows, one token at a time, need not divide the mesh: only the weights are split.
        self.layout = layout and dataclasses.replace(
            layout, rules={**layout.rules, "batch": (), "seq": (), "stream_seq": ()})

    def __call__(self, params: Params, prompts: Sequence[Sequence[int]], *, max_tokens: int,
                 sampling: Sampling = PLAIN, seed: int = 0, watch: Watch | None = None) -> list[list[int]]:
        """The tokens that follow each prompt, up to `max_tokens` and without the end-of-text token.

        A row's randomness is keyed by (seed, row, position in the answer): it does not depend on the other rows.

        Args:
          watch: called with the answers so far every `CHUNK` tokens; says which rows are to end.
        Raises:
          ValueError: see `check`.
        """
        self.check(prompts, max_tokens, sampling)
        batch = padded(prompts)
        lay_out, start, advance = _compiled(self.model, self.layout, self.eos_id, self.vocab_size, self.start_id,
                                            bucket(batch.tokens.shape[1] + max_tokens, 32))
        params = lay_out(params)
        settings = np.int32(seed % 2**31), Sampling(*(np.asarray(v) for v in sampling))
        state, done = start(params, *batch, *settings), 0
        while True:
            done = min(done + CHUNK, max_tokens) if watch else max_tokens
            state = advance(params, state, np.int32(done), *settings)
            answers, ends, ended = (np.asarray(x) for x in (state.answers, state.ends, state.ended))
            found = [answers[row, : ends[row]].tolist() for row in range(len(prompts))]
            if watch:
                ended = ended | batch.unused
                ended[: len(found)] |= np.asarray(watch(found), bool)
                state = state._replace(ended=jax.device_put(ended, state.ended.sharding))
            if done >= max_tokens or ended.all():
                return found

    def check(self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling = PLAIN) -> int:
        """The length of the longest prompt.

        Raises:
          ValueError: no or an empty prompt, less than one token to add, more positions than a learned table has, or
            sampling settings out of range.
        """
        sampling.check()
        at_least(1, max_tokens=max_tokens)
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("prompts: expected one or more, each of at least one token, got an empty one; begin it "
                             "with bos_id")
        longest = max(map(len, prompts))
        limit = self.model.config.max_positions if self.model.config.positions == "learned" else None
        if limit and longest + max_tokens > limit:
            raise ValueError(f"max_tokens: expected prompt and answer within max_positions={limit}, got {longest} "
                             f"+ {max_tokens}; shorten one of them")
        return longest


def padded(prompts: Sequence[Sequence[int]]) -> Prompts:
    """The prompts in the smallest bucket that holds them."""
    B, P = bucket(len(prompts), 1), bucket(max(map(len, prompts)), 16)
    tokens, lengths = np.zeros((B, P), np.int32), np.ones(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return Prompts(tokens, lengths, np.arange(B) >= len(prompts))


def prefill(model: Model, params: Params, tokens: jax.Array, lengths: jax.Array, slots: int, start_id: int,
            rings: bool = True) -> tuple[jax.Array, Any, jax.Array]:
    """Logits [B, V] behind the prompts, the cache with the prompts in it, and which tokens were there, bool [B, V]."""
    B, P = tokens.shape
    real = jnp.arange(P).reshape(1, P) < lengths[:, None]
    if model.config.family == "encdec":
        positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32).reshape(1, P), (B, P))
        cache = model.init_cache(B, slots, rings=rings, params=params, batch={
            "encoder_tokens": tokens, "encoder_positions": positions, "encoder_segment_ids": real.astype(jnp.int32)})
        tokens, lengths = jnp.full((B, 1), start_id, jnp.int32), jnp.ones_like(lengths)
        real = jnp.ones((B, 1), jnp.bool_)
    else:
        cache = model.init_cache(B, slots, rings=rings)
    logits, cache = model.step(params, tokens, cache, lengths - 1)
    seen = jax.vmap(lambda s, t, r: s.at[t].max(r))(jnp.zeros(logits.shape, jnp.bool_), tokens, real)
    return logits, cache, seen


def bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << max(n - 1, least - 1).bit_length()


def row_keys(seed: jax.Array, rows: int, step: jax.Array) -> jax.Array:
    """A key a row, [B], of (seed, row, step)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(rows))


def known(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """-inf for the ids that only fill up a model's table."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]).reshape(1, -1) < vocab_size, logits_BV, -jnp.inf)


def jit_on(layout: Layout | None, fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` of a function that is traced for `layout`."""
    def traced(*args: Any) -> Any:
        with use_layout(layout):
            return fn(*args)

    return jax.jit(traced, **options)


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, layout: Layout | None, eos_id: int, vocab_size: int, start_id: int,
              slots: int) -> tuple[Callable[[Params], Params], Callable[..., State], Callable[..., State]]:
    """(lay_out, start, advance): parameters for the others, the state behind the prompts, that state some tokens on."""

    def draw(logits: jax.Array, seen: jax.Array, step: jax.Array, seed: jax.Array, sampling: Sampling) -> jax.Array:
        logits = penalise(known(logits, vocab_size), seen, sampling.repetition_penalty)
        return sample(logits, row_keys(seed, logits.shape[0], step), sampling)

    def start(params: Params, tokens: jax.Array, lengths: jax.Array, unused: jax.Array, seed: jax.Array,
              sampling: Sampling) -> State:
        B = tokens.shape[0]
        logits, cache, seen = prefill(model, params, tokens, lengths, slots, start_id)
        last = draw(logits, seen, jnp.int32(0), seed, sampling)
        return State(jnp.int32(0), last, jnp.zeros((B, slots), jnp.int32), jnp.zeros(B, jnp.int32), unused, seen, cache)

    def advance(params: Params, state: State, until: jax.Array, seed: jax.Array, sampling: Sampling) -> State:
        def more(s: State) -> jax.Array:
            return (s.step < until) & ~jnp.all(s.ended)

        def body(s: State) -> State:
            ended = s.ended | (s.last == eos_id)
            answers = s.answers.at[:, s.step].set(jnp.where(ended, 0, s.last))
            seen = jax.vmap(lambda row, token: row.at[token].set(True))(s.seen, s.last)
            logits, cache = model.step(params, s.last[:, None], s.cache)
            last = draw(logits, seen, s.step + 1, seed, sampling)
            return State(s.step + 1, last, answers, s.ends + ~ended, ended, seen, cache)

        return jax.lax.while_loop(more, body, state)

    return jit_on(layout, model.for_decoding), jit_on(layout, start), jit_on(layout, advance, donate_argnums=1)
