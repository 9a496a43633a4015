"""The compiled programs of the engine: they read a part of a prompt, and they step all rows.

Every request is data: its prompt, its settings and its seed never compile anything. A row's arrays
depend on no other row, and each program always runs in the same shapes, so an answer does not
depend on what else is in the batch.

Shape suffixes: B rows, S cache slots per row, C tokens of a chunk, K proposals of a draft,
T = K + 1 tokens that a row gains per step at most, V vocab_size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.decoding.generate import TokenIds, jit_on
from lmjax.decoding.sampling import adjust
from lmjax.decoding.speculative import verify
from lmjax.models.cache import Cache
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.serving.requests import Request
from lmjax.serving.row_sampling import (
    Array,
    Drawn,
    Settings,
    Told,
    biased,
    draw,
    ends,
    keys_at,
    scored,
    settings_of,
    told,
)
from lmjax.sharding import Layout

# The caches of the model and of its draft, if there is one. Their arrays are [..., B, G, S, K].
Caches = tuple[Cache, ...]


class Shapes(NamedTuple):
    """The sizes that an engine's programs are compiled for."""

    rows: int  # requests that are answered at the same time
    slots: int  # cache slots of each
    block: int  # tokens of a block of the prefix cache
    blocks: int  # blocks of the prefix cache
    propose: int  # tokens that the draft proposes per step; 0: there is no draft


class State(NamedTuple):
    """The rows of the running batch."""

    settings: Settings
    last: jax.Array  # int32 [B]: the next token of each row, drawn but not yet fed
    answered: jax.Array  # int32 [B]: tokens drawn so far
    running: jax.Array  # bool [B]: whether a step draws more tokens
    seen: jax.Array  # bool [B, V]: the tokens of the prompt and of the answer
    caches: Caches


class Programs(NamedTuple):
    """The compiled functions of one engine. What is passed as `donated` must not be used again.

    `page` is the caches of a single row, into which prompts are read.
    """

    lay_out: Callable[[Sequence[Params]], tuple[Params, ...]]  # the `params` of the others
    # () -> (state without a running row, page, pool of blocks)
    empty: Callable[[], tuple[State, Caches, Caches]]
    # (params, donated page, tokens [1, C], position of the first, index of the last real one)
    # -> (logits [1, V] after that one, page)
    read: Callable[..., tuple[jax.Array, Caches]]
    # the same, with the tokens [C] that follow and whether alternatives are wanted
    # -> (logits, page, the three arrays of `scored`)
    read_scored: Callable[..., tuple[jax.Array, Caches, tuple[jax.Array, ...]]]
    load: Callable[..., Caches]  # (donated page, pool, blocks [N], how many of them) -> page
    store: Callable[..., Caches]  # (donated pool, page, block, position in the page) -> pool
    # (donated state, page, logits, row, prompt [S], its length, settings) -> (state, Told [1, 1]):
    # the row begins its answer
    join: Callable[..., tuple[State, Told]]
    step: Callable[..., tuple[State, Told]]  # (params, donated state) -> (state, Told [B, T])
    stop: Callable[..., State]  # (donated state, row): the row draws nothing more


@functools.lru_cache(maxsize=8)
def compiled(models: tuple[Model, ...], layout: Layout, ids: TokenIds, shapes: Shapes) -> Programs:
    """The programs for a model, or for a model and its draft."""
    def read(params: Sequence[Params], page: Caches, tokens_1C: jax.Array, first: Array,
             at: Array) -> tuple[jax.Array, Caches]:
        found = [model.step(p, tokens_1C, _moved(cache, first), jnp.full(1, at, jnp.int32))
                 for model, p, cache in zip(models, params, page, strict=True)]
        return found[0][0], tuple(cache for _, cache in found)

    def read_scored(params: Sequence[Params], page: Caches, tokens_1C: jax.Array, first: Array,
                    at: Array, next_C: jax.Array, alternatives: jax.Array) -> tuple[Any, ...]:
        logits, cache = models[0].extend(params[0], tokens_1C, _moved(page[0], first))
        _, rest = read(params, page, tokens_1C, first, at)
        scores = scored(logits[0], next_C, ids, alternatives)
        return jax.lax.dynamic_slice_in_dim(logits[0], at, 1), (cache, *rest[1:]), scores

    def lay_out(params: Sequence[Params]) -> tuple[Params, ...]:
        return tuple(model.for_decoding(p) for model, p in zip(models, params, strict=True))

    def stop(state: State, row: Array) -> State:
        return state._replace(running=state.running.at[row].set(False))

    # Named placements: otherwise each program would compile again for what another one returned.
    whole = layout.replicated
    caches = tuple(_placement(model, layout, shapes) for model in models)
    state: Any = State(whole, whole, whole, whole, whole, caches)  # type: ignore[arg-type]

    def jit(fn: Callable[..., Any], places: Any, donated: int) -> Callable[..., Any]:
        return jit_on(layout, fn, out_shardings=places, donate_argnums=donated)

    return Programs(
        lay_out=jit_on(layout, lay_out),
        empty=jit_on(layout, functools.partial(empty, models, shapes),
                     out_shardings=(state, caches, caches)),
        read=jit(read, (whole, caches), 1),
        read_scored=jit(read_scored, (whole, caches, whole), 1),
        load=jit(functools.partial(_load, block=shapes.block), caches, 0),
        store=jit(functools.partial(_store, block=shapes.block), caches, 0),
        join=jit(functools.partial(_join, ids=ids), (state, whole), 0),
        step=jit(_step(models, ids, shapes.propose), (state, whole), 1),
        stop=jit(stop, state, 0))


def _placement(model: Model, layout: Layout, shapes: Shapes) -> Any:
    """Where the arrays of a cache lie, as a tree like `Cache`: `tensor` splits the heads.

    The heads of latent attention share what it keeps.
    """
    heads = None if model.config.latent.kv_rank else "act_kv_heads"
    cache = jax.eval_shape(lambda: _empty_cache(model, 1, shapes.slots))
    axes = (*(None,) * (jax.tree.leaves(cache.layers)[0].ndim - 3), heads, None, None)
    return Cache(layout.sharding(axes), layout.replicated)  # type: ignore[arg-type]


def empty(models: Sequence[Model], shapes: Shapes) -> tuple[State, Caches, Caches]:
    """A state in which no row runs, a page, and a pool."""
    B, V = shapes.rows, models[0].config.vocab_size
    blank = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])),
                         settings_of(Request((0,), 1)))
    zeros = jnp.zeros(B, jnp.int32)
    rows, page, pool = (tuple(_empty_cache(model, *size) for model in models)
                        for size in ((B, shapes.slots), (1, shapes.slots),
                                     (max(shapes.blocks, 1), shapes.block)))
    return (State(blank, zeros, zeros, jnp.zeros(B, bool), jnp.zeros((B, V), bool), rows), page,
            pool)


def _empty_cache(model: Model, rows: int, slots: int) -> Cache:
    """A cache in the form that a step returns, which on a CPU is one array per layer."""
    def step(params: Params) -> Cache:
        cache = model.init_cache(rows, slots, rings=False)
        return model.step(params, jnp.zeros((rows, 1), jnp.int32), cache)[1]

    shapes = jax.eval_shape(lambda params: step(model.for_decoding(params)), model.shapes)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _load(page: Caches, pool: Caches, blocks_N: jax.Array, count: Array, *, block: int) -> Caches:
    """Copies blocks of the pool to the beginning of the page."""
    def body(i: jax.Array, layers: Any) -> Any:
        return _map(lambda old, part: jax.lax.dynamic_update_slice_in_dim(
            old, jax.lax.dynamic_slice_in_dim(part, blocks_N[i], 1, part.ndim - 4), i * block,
            old.ndim - 2), layers, pool)

    return jax.lax.fori_loop(0, count, body, page)


def _store(pool: Caches, page: Caches, to: Array, at: Array, *, block: int) -> Caches:
    """Copies one block of the page, which begins at position `at`, into the pool."""
    return _map(lambda old, row: jax.lax.dynamic_update_slice_in_dim(
        old, jax.lax.dynamic_slice_in_dim(row, at, block, row.ndim - 2), to, old.ndim - 4),
        pool, page)


def _join(state: State, page: Caches, logits_1V: jax.Array, row: Array, prompt_S: jax.Array,
          length: Array, settings: Settings, *, ids: TokenIds) -> tuple[State, Told]:
    seen = jnp.zeros(state.seen[:1].shape, bool).at[0, prompt_S].max(
        jnp.arange(prompt_S.shape[0]) < length)
    drawn = draw(logits_1V, seen, settings, jnp.zeros(1, jnp.int32), ids, jnp.ones(1, bool))
    rows = _map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, row, old.ndim - 4),
                state.caches, page)
    rows = tuple(cache._replace(slot=cache.slot.at[row].set(length)) for cache in rows)
    more = ~drawn.is_end[0] & (settings.limit[0] > 1)
    return State(jax.tree.map(lambda all, one: all.at[row].set(one[0]), state.settings, settings),
                 state.last.at[row].set(drawn.token[0]), state.answered.at[row].set(1),
                 state.running.at[row].set(more), state.seen.at[row].set(seen[0]),
                 rows), told(jax.tree.map(lambda x: x[:, None], drawn))


def _step(models: Sequence[Model], ids: TokenIds,
          K: int) -> Callable[[Sequence[Params], State], tuple[State, Told]]:
    def one(params: Sequence[Params], state: State) -> tuple[State, Told]:
        logits, cache = models[0].step(params[0], state.last[:, None], state.caches[0])
        seen = jax.vmap(lambda row, token, real: row.at[token].max(real))(
            state.seen, state.last, state.running)
        drawn = draw(logits, seen, state.settings, state.answered, ids, state.running)
        state = state._replace(seen=seen)
        return _advanced(state, (cache,), jax.tree.map(lambda x: x[:, None], drawn))

    def several(params: Sequence[Params], state: State) -> tuple[State, Told]:
        """Speculative decoding: the draft proposes K tokens, and the model checks them at once."""
        keys = keys_at(state.settings, state.answered)
        proposed, q_BKV, draft_cache = _proposals(models[1], params[1], state, K, ids, keys)
        fed = jnp.concatenate([state.last[:, None], proposed], axis=1)
        logits, cache = models[0].extend(params[0], fed, state.caches[0])
        flat, settings = logits.reshape(-1, logits.shape[-1]), state.settings.repeat(K + 1)
        p = jax.nn.softmax(adjust(biased(flat, settings, ids), settings.sampling), axis=-1)
        count, after = verify(p.reshape(logits.shape), q_BKV, proposed, keys)
        at = jnp.arange(K + 1).reshape(1, -1)
        token = jnp.where(at < count[:, None], jnp.pad(proposed, ((0, 0), (0, 1))), after[:, None])
        is_end = ends(token.reshape(-1), settings, ids).reshape(token.shape)
        ended = jnp.cumsum(is_end, axis=1) - is_end > 0  # before this token
        left = (state.settings.limit - state.answered)[:, None]
        real = state.running[:, None] & (at <= count[:, None]) & ~ended & (at < left)
        scores = scored(flat, token.reshape(-1), ids, jnp.any(settings.alternatives))
        return _advanced(state, (cache, draft_cache), Drawn(real, token, is_end, *(
            x.reshape(*token.shape, *x.shape[1:]) for x in scores)))

    return several if K else one


def _proposals(draft: Model, params: Params, state: State, K: int, ids: TokenIds,
               keys_B: jax.Array) -> tuple[jax.Array, jax.Array, Cache]:
    """K proposals [B, K], the probabilities [B, K, V] they were drawn from, and the cache."""
    token, cache, proposed, q = state.last, state.caches[1], [], []
    V = state.seen.shape[1]
    for k in range(K):
        logits, cache = draft.step(params, token[:, None], cache)
        # The tables of the two models may have different numbers of rows without a token.
        logits = jnp.pad(logits[:, :V], ((0, 0), (0, max(V - logits.shape[1], 0))))
        wanted = adjust(biased(logits, state.settings, ids), state.settings.sampling)
        # `verify` uses the numbers 0 and 1.
        token = jax.vmap(lambda key, row: jax.random.categorical(
            jax.random.fold_in(key, 2 + k), row))(keys_B, wanted).astype(jnp.int32)  # noqa: B023
        proposed.append(token)
        q.append(jax.nn.softmax(wanted, axis=-1))
    # Where a row keeps all proposals, its cache needs the last one, too.
    _, cache = draft.step(params, token[:, None], cache)
    return jnp.stack(proposed, axis=1), jnp.stack(q, axis=1), cache


def _advanced(state: State, caches: Caches, drawn: Drawn) -> tuple[State, Told]:
    """The state after the tokens of `drawn`, [B, T]."""
    gained = jnp.sum(drawn.real, axis=1)
    last = jnp.take_along_axis(drawn.token, jnp.maximum(gained - 1, 0)[:, None], axis=1)[:, 0]
    answered = state.answered + gained
    ended = jnp.any(drawn.real & drawn.is_end, axis=1)
    # A row that does not run keeps its length: what is written next overwrites what it was fed.
    rows = tuple(new._replace(slot=old.slot + gained)
                 for old, new in zip(state.caches, caches, strict=True))
    running = state.running & ~ended & (answered < state.settings.limit)
    return state._replace(last=jnp.where(state.running, last, state.last), answered=answered,
                          running=running, caches=rows), told(drawn)


def _moved(cache: Cache, first: Array) -> Cache:
    return cache._replace(slot=jnp.full(1, first, jnp.int32))


def _map(fn: Callable[..., jax.Array], caches: Caches, others: Caches) -> Caches:
    """fn(array, other array) for the keys and values of every layer."""
    return tuple(cache._replace(layers=jax.tree.map(fn, cache.layers, other.layers))
                 for cache, other in zip(caches, others, strict=True))
