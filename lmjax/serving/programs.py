"""The compiled programs of the engine: they feed a part of a prompt, and they step all rows.

Every request is data: its prompt, its settings and its seed never compile anything. A row's arrays
depend on no other row, and a program always runs in one shape, so an answer does not depend on what
else is in the batch.

Shape suffixes: B rows, S cache slots per row, C tokens of a chunk, V vocab_size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.decoding.generate import TokenIds, drawable, is_one_of, jit_on
from lmjax.decoding.sampling import PLAIN, Sampling, penalise, sample
from lmjax.models.cache import Cache
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.serving.requests import MAX_ALTERNATIVES, MAX_BIAS, MAX_STOPS, Request
from lmjax.sharding import Layout

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


class State(NamedTuple):
    """The rows of the running batch."""

    settings: Settings
    last: jax.Array  # int32 [B]: the next token of each row, drawn but not yet fed
    answered: jax.Array  # int32 [B]: tokens drawn so far
    running: jax.Array  # bool [B]: whether a step draws another token
    seen: jax.Array  # bool [B, V]: the tokens of the prompt and of the answer
    cache: Cache


class Drawn(NamedTuple):
    """What a program drew; entries of rows that were not `real` mean nothing."""

    real: jax.Array  # bool [B]
    token: jax.Array  # int32 [B]
    is_end: jax.Array  # bool [B]: the token ends the answer and is no part of it
    logprob: jax.Array  # float32 [B]
    likeliest: jax.Array  # int32 [B, MAX_ALTERNATIVES]
    their_logprobs: jax.Array  # float32 [B, MAX_ALTERNATIVES]


class Programs(NamedTuple):
    """The compiled functions of one engine; `state` is donated to each."""

    lay_out: Callable[[Params], Params]  # the parameters that the others take
    empty: Callable[[], State]
    begin: Callable[..., State]  # (state, row, prompt [S], its length, its settings): a new row
    # (params, state, row, tokens [1, C], first position, index of the last real token, whether the
    # prompt ends with it) -> (state, Drawn of one row)
    feed: Callable[..., tuple[State, Drawn]]
    step: Callable[..., tuple[State, Drawn]]  # (params, state): one token for every running row
    stop: Callable[..., State]  # (state, row): the row draws nothing more


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


@functools.lru_cache(maxsize=8)
def compiled(model: Model, layout: Layout | None, ids: TokenIds, rows: int,
             slots: int) -> Programs:
    """The programs of a batch of `rows` rows with `slots` cache slots each."""
    V = model.config.vocab_size

    def empty() -> State:
        blank = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])),
                             settings_of(Request((0,), 1)))
        zeros = jnp.zeros(rows, jnp.int32)
        return State(blank, zeros, zeros, jnp.zeros(rows, bool), jnp.zeros((rows, V), bool),
                     _empty_cache(model, rows, slots))

    def begin(state: State, row: Array, prompt_S: Array, length: Array,
              settings: Settings) -> State:
        seen = jnp.zeros(V, bool).at[prompt_S].max(jnp.arange(slots) < length)
        return state._replace(
            settings=jax.tree.map(lambda all, one: all.at[row].set(one[0]), state.settings,
                                  settings),
            answered=state.answered.at[row].set(0), running=state.running.at[row].set(False),
            seen=state.seen.at[row].set(seen),
            cache=state.cache._replace(slot=state.cache.slot.at[row].set(0)))

    def feed(params: Params, state: State, row: Array, tokens_1C: Array, first: Array, at: Array,
             is_last: Array) -> tuple[State, Drawn]:
        old = _row_of(state.cache, row)._replace(slot=jnp.full(1, first, jnp.int32))
        logits, new = model.step(params, jnp.asarray(tokens_1C), old, jnp.full(1, at, jnp.int32))
        cache = _put_row(state.cache, new, row)
        settings = jax.tree.map(lambda x: _at(x, row), state.settings)
        drawn = draw(logits, _at(state.seen, row), settings, jnp.zeros(1, jnp.int32), ids,
                     jnp.full(1, is_last, bool))
        return _advanced(state._replace(cache=cache), drawn, jnp.full(1, row, jnp.int32)), drawn

    def step(params: Params, state: State) -> tuple[State, Drawn]:
        logits, cache = model.step(params, state.last[:, None], state.cache)
        # A row that does not run keeps its length: what is fed to it next overwrites this token.
        slot = jnp.where(state.running, cache.slot, state.cache.slot)
        seen = jax.vmap(lambda row, token, real: row.at[token].max(real))(
            state.seen, state.last, state.running)
        drawn = draw(logits, seen, state.settings, state.answered, ids, state.running)
        state = state._replace(cache=cache._replace(slot=slot), seen=seen)
        return _advanced(state, drawn, jnp.arange(rows)), drawn

    def stop(state: State, row: Array) -> State:
        return state._replace(running=state.running.at[row].set(False))

    return Programs(jit_on(layout, model.for_decoding), jit_on(layout, empty),
                    jit_on(layout, begin, donate_argnums=0),
                    jit_on(layout, feed, donate_argnums=1),
                    jit_on(layout, step, donate_argnums=1),
                    jit_on(layout, stop, donate_argnums=0))


def draw(logits_BV: jax.Array, seen_BV: jax.Array, settings: Settings, position_B: jax.Array,
         ids: TokenIds, real_B: jax.Array) -> Drawn:
    """Draws one token per row.

    The random key is made of the row's seed and of the position in its answer, as it is for the
    first row of `Generator`, and of nothing else.
    """
    logprobs = jax.nn.log_softmax(logits_BV, axis=-1)
    allowed = drawable(logits_BV, ids)
    wanted = penalise(allowed, seen_BV, settings.sampling.repetition_penalty)
    wanted = jax.lax.cond(jnp.any(settings.bias != 0), lambda: jax.vmap(
        lambda row, at, bias: row.at[at].add(bias))(wanted, settings.bias_ids, settings.bias),
        lambda: wanted)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), 0), position))(settings.seed, position_B)
    token = sample(wanted, keys, settings.sampling)
    count = min(MAX_ALTERNATIVES, logits_BV.shape[-1])
    best, their_ids = jax.lax.cond(
        jnp.any(settings.alternatives),
        lambda: tuple(jax.lax.top_k(jnp.where(jnp.isfinite(allowed), logprobs, -jnp.inf), count)),
        lambda: (jnp.zeros((len(token), count)), jnp.zeros((len(token), count), jnp.int32)))
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    is_end = is_one_of(token, ids.end) | jnp.any(token[:, None] == settings.stops, axis=1)
    return Drawn(real_B, token, is_end, logprob, their_ids, best)


def _advanced(state: State, drawn: Drawn, rows: jax.Array) -> State:
    """The state in which the rows have one more token, where it is real."""
    count = state.answered[rows] + drawn.real
    more = drawn.real & ~drawn.is_end & (count < state.settings.limit[rows])
    last = jnp.where(drawn.real, drawn.token, state.last[rows])
    return state._replace(last=state.last.at[rows].set(last),
                          answered=state.answered.at[rows].set(count),
                          running=state.running.at[rows].set(more))


def _empty_cache(model: Model, rows: int, slots: int) -> Cache:
    """A cache in the form that a step returns, which on a CPU is one array per layer."""
    def step(params: Params) -> Cache:
        cache = model.init_cache(rows, slots, rings=False)
        return model.step(params, jnp.zeros((rows, 1), jnp.int32), cache)[1]

    shapes = jax.eval_shape(lambda params: step(model.for_decoding(params)), model.shapes)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _at(x: jax.Array, row: Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)


def _row_of(cache: Cache, row: Array) -> Cache:
    """The cache of one row; the rows are the fourth dimension from the end."""
    layers = jax.tree.map(lambda x: _at(x, row, x.ndim - 4), cache.layers)
    return cache._replace(layers=layers, slot=_at(cache.slot, row))


def _put_row(cache: Cache, new: Cache, row: Array) -> Cache:
    layers: Any = jax.tree.map(lambda x, one: jax.lax.dynamic_update_slice_in_dim(
        x, one, row, x.ndim - 4), cache.layers, new.layers)
    return cache._replace(layers=layers, slot=jax.lax.dynamic_update_slice_in_dim(
        cache.slot, new.slot, row, 0))
