"""Generation with a key/value cache: one compiled loop per bucket of shapes.

Shape suffixes: B batch, P prompt bucket, S cache slots, V vocab_size.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least
from lmjax.decoding.inputs import check_ids, check_positions
from lmjax.decoding.sampling import PLAIN, Sampling, penalise, sample
from lmjax.errors import UserError
from lmjax.models.cache import Cache
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout, use_layout

# Gets the answers so far and says, for each row, whether it is to end.
StopCheck = Callable[[list[list[int]]], Sequence[bool]]
CHUNK = 16  # tokens between two calls of a `StopCheck`


class State(NamedTuple):
    """A batch in the middle of generation."""

    step: jax.Array  # int32: tokens of the answers so far
    last: jax.Array  # int32 [B]: the next token of each row, drawn but not yet fed
    answers: jax.Array  # int32 [B, S]
    ends: jax.Array  # int32 [B]: tokens of each answer before its end
    ended: jax.Array  # bool [B]
    seen: jax.Array  # bool [B, V]: the tokens of the prompt and of the answer
    cache: Cache


class Prompts(NamedTuple):
    """Prompts as arrays of a bucket's shape."""

    tokens: np.ndarray | jax.Array  # int32 [B, P], padded on the right
    lengths: np.ndarray | jax.Array  # int32 [B]
    unused: np.ndarray | jax.Array  # bool [B]: rows without a prompt


class TokenIds(NamedTuple):
    """The ids that generation treats in a way of their own; part of a compiled program's key."""

    vocab_size: int  # of the tokenizer; the model's table may have more rows, which are never drawn
    end: tuple[int, ...] = ()  # each of them ends an answer
    start: int = 0  # with which an encoder-decoder's answer begins, whose encoder reads the prompt
    banned: tuple[int, ...] = ()  # never drawn


class Generator:
    """Continues prompts with a model.

    It compiles one program per bucket: the rows, the prompts' tokens and the slots of the cache,
    each rounded up by `size`.
    """

    def __init__(self, model: Model, layout: Layout | None = None, *,
                 end_ids: Sequence[int] = (), banned_ids: Sequence[int] = (),
                 vocab_size: int = 0, start_id: int = 0):
        """
        Args:
          end_ids: the tokens that end an answer.
          banned_ids: tokens that are never drawn.
          vocab_size: of the tokenizer; the model's table may have more rows, whose ids are never
            drawn. 0: the model's.
          start_id: with which an encoder-decoder's answer begins, whose encoder reads the prompt.
        """
        self.model = model
        self.ids = TokenIds(vocab_size or model.config.vocab_size, tuple(end_ids), start_id,
                            tuple(banned_ids))
        # The mesh may not divide so few rows, so only the weights are split.
        self.layout = layout and dataclasses.replace(
            layout, rules={**layout.rules, "batch": (), "seq": (), "stream_seq": ()})

    def with_kv_cache(self, kv_cache: str) -> "Generator":
        """The same generator, which keeps keys and values so: see `Model.with_kv_cache`."""
        other = copy.copy(self)
        other.model = self.model.with_kv_cache(kv_cache)
        return other

    def __call__(self, params: Params, prompts: Sequence[Sequence[int]], *, max_tokens: int,
                 sampling: Sampling = PLAIN, seed: int = 0,
                 watch: StopCheck | None = None) -> list[list[int]]:
        """Generates up to `max_tokens` tokens after each prompt.

        A row's random numbers depend on (seed, row, position in the answer) and on no other row.

        Args:
          watch: called with all answers after every `CHUNK` tokens.
        Returns:
          The answers, each without its end-of-text token.
        Raises:
          UserError: see `check`.
        """
        self.check(prompts, max_tokens, sampling)
        batch = padded(prompts)
        lay_out, start, advance = _compiled(
            self.model, self.layout, self.ids, size(batch.tokens.shape[1] + max_tokens, 32))
        params = lay_out(params)
        settings = np.int32(seed % 2**31), jax.tree.map(np.asarray, sampling)
        state, done = start(params, batch, *settings), 0
        while True:
            done = min(done + CHUNK, max_tokens) if watch else max_tokens
            state = advance(params, state, np.int32(done), *settings)
            answers, ends, ended = map(np.asarray, (state.answers, state.ends, state.ended))
            found = [answers[row, : ends[row]].tolist() for row in range(len(prompts))]
            if watch:
                ended = ended | batch.unused
                ended[: len(found)] |= np.asarray(watch(found), bool)
                state = state._replace(ended=jax.device_put(ended, state.ended.sharding))
            if done >= max_tokens or ended.all():
                return found

    def check(self, prompts: Sequence[Sequence[int]], max_tokens: int,
              sampling: Sampling = PLAIN) -> int:
        """Checks the arguments and returns the length of the longest prompt.

        Raises:
          UserError: there is no prompt, `max_tokens` is below 1, the model has fewer learned
            positions than prompt and answer have tokens, a sampling setting is out of its range,
            or see `check_ids`.
        """
        sampling.check()
        at_least(1, max_tokens=max_tokens)
        config = self.model.config
        longest = max(map(len, check_ids(prompts, config, "prompts")), default=0)
        if not longest:
            raise UserError("one or more", "none", "pass a prompt", where="prompts")
        check_positions(config, longest, "max_tokens", answer=max_tokens)
        return longest


def padded(prompts: Sequence[Sequence[int]]) -> Prompts:
    """The prompts in the smallest bucket that holds them."""
    B, P = size(len(prompts), 1), size(max(map(len, prompts)), 16)
    tokens, lengths = np.zeros((B, P), np.int32), np.ones(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return Prompts(tokens, lengths, np.arange(B) >= len(prompts))


def prefill(model: Model, params: Params, prompts: Prompts, slots: int, start_id: int,
            rings: bool = True) -> tuple[jax.Array, Cache, jax.Array]:
    """Feeds the prompts.

    Returns:
      (logits [B, V] of the first token of each answer, the cache, bool [B, V]: the tokens of the
      prompt). An encoder-decoder's prompt is `start_id`; its encoder reads the given one.
    """
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    B, P = tokens.shape
    real = jnp.arange(P).reshape(1, P) < lengths[:, None]
    if model.config.family == "encdec":
        positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32).reshape(1, P), (B, P))
        cache = model.init_cache(B, slots, rings=rings, params=params, batch={
            "encoder_tokens": tokens, "encoder_positions": positions,
            "encoder_segment_ids": real.astype(jnp.int32)})
        tokens, lengths = jnp.full((B, 1), start_id, jnp.int32), jnp.ones_like(lengths)
        real = jnp.ones((B, 1), jnp.bool_)
    else:
        cache = model.init_cache(B, slots, rings=rings)
    logits, cache = model.step(params, tokens, cache, lengths - 1)
    none = jnp.zeros(logits.shape, jnp.bool_)
    seen = jax.vmap(lambda row, ids, real: row.at[ids].max(real))(none, tokens, real)
    return logits, cache, seen


def bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << max(n - 1, least - 1).bit_length()


def size(n: int, least: int, parts: int = 8) -> int:
    """`n` rounded up to a multiple of `least` and of the next power of two divided by `parts`.

    Long rows get few sizes to compile for. With 8 parts, at most a quarter is padding.
    """
    step = max(least, bucket(n, 1) // parts)
    return max(-(-n // step), 1) * step


def row_keys(seed: jax.Array, rows: int, step: jax.Array) -> jax.Array:
    """One random key per row, [B], made from (seed, row, step)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(
        jnp.arange(rows))


def drawable(logits_BV: jax.Array, ids: TokenIds) -> jax.Array:
    """The logits, with -inf for ids that are banned or that the tokenizer does not have."""
    id_1V = jnp.arange(logits_BV.shape[-1]).reshape(1, -1)
    never = (id_1V >= ids.vocab_size) | is_one_of(id_1V, ids.banned)
    return jnp.where(never, -jnp.inf, logits_BV)


def is_one_of(tokens: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Whether each token is one of `ids`, bool of the tokens' shape."""
    return jnp.isin(tokens, jnp.asarray(ids, jnp.int32))


def jit_on(layout: Layout | None, fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(fn, **options)`, traced for `layout`."""
    def traced(*args: Any) -> Any:
        with use_layout(layout):
            return fn(*args)

    return jax.jit(traced, **options)


@functools.lru_cache(maxsize=32)
def _compiled(model: Model, layout: Layout | None, ids: TokenIds, slots: int) -> tuple[
        Callable[[Params], Params], Callable[..., State], Callable[..., State]]:
    """The compiled functions (lay_out, start, advance).

    lay_out(params): the parameters that the other two take. start(params, prompts, seed,
    sampling): the state after the prompts. advance(params, state, until, seed, sampling): the state
    after `until` tokens.
    """

    def draw(logits: jax.Array, seen: jax.Array, step: jax.Array, seed: jax.Array,
             sampling: Sampling) -> jax.Array:
        logits = penalise(drawable(logits, ids), seen, sampling.repetition_penalty)
        return sample(logits, row_keys(seed, logits.shape[0], step), sampling)

    def start(params: Params, prompts: Prompts, seed: jax.Array, sampling: Sampling) -> State:
        B = prompts.tokens.shape[0]
        logits, cache, seen = prefill(model, params, prompts, slots, ids.start)
        last = draw(logits, seen, jnp.int32(0), seed, sampling)
        return State(jnp.int32(0), last, jnp.zeros((B, slots), jnp.int32),
                     jnp.zeros(B, jnp.int32), jnp.asarray(prompts.unused), seen, cache)

    def advance(params: Params, state: State, until: jax.Array, seed: jax.Array,
                sampling: Sampling) -> State:
        def more(s: State) -> jax.Array:
            return (s.step < until) & ~jnp.all(s.ended)

        def body(s: State) -> State:
            ended = s.ended | is_one_of(s.last, ids.end)
            answers = s.answers.at[:, s.step].set(jnp.where(ended, 0, s.last))
            seen = jax.vmap(lambda row, token: row.at[token].set(True))(s.seen, s.last)
            logits, cache = model.step(params, s.last[:, None], s.cache)
            last = draw(logits, seen, s.step + 1, seed, sampling)
            return State(s.step + 1, last, answers, s.ends + ~ended, ended, seen, cache)

        return jax.lax.while_loop(more, body, state)

    return (jit_on(layout, model.for_decoding), jit_on(layout, start),
            jit_on(layout, advance, donate_argnums=1))
