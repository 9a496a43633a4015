"""Arrays inside the layers, for callers that ask for them: states, queries, keys and values.

A layer returns what it has recorded as one of its outputs: within a scan, or under a remat policy,
nothing else may leave it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax

Recorded = dict[str, jax.Array]
NAMES = ("entry", "state", "query", "key", "value", "attention", "mlp", "logit")
_WANTED: ContextVar[frozenset[str]] = ContextVar("wanted", default=frozenset())
_STACKS: ContextVar[list[Recorded] | None] = ContextVar("stacks", default=None)
_KEEP: ContextVar[Callable[[jax.Array], jax.Array]] = ContextVar("keep", default=lambda x: x)
_LAYER: ContextVar[Recorded | None] = ContextVar("layer", default=None)


@contextlib.contextmanager
def recording(*names: str, keep: Callable[[jax.Array], jax.Array] = lambda x: x,
              ) -> Iterator[list[Recorded]]:
    """Records these arrays of every layer of the models that are traced inside.

    Args:
      names: of `NAMES`: entry and state, the residual stream before and after a layer, [B, T, D];
        query, key and value, as self-attention uses them, [B, T, heads, head_dim]; attention and
        mlp, what these branches give, [B, T, D]; logit, the largest attention score, [], of
        kernels that hold the scores.
      keep: what is recorded of an array.

    Yields:
      a list that gets an entry per stack of layers: arrays [layers, B, T, ...] by name.
    """
    stacks: list[Recorded] = []
    wanted, kept = _WANTED.set(frozenset(names)), _STACKS.set(stacks)
    how = _KEEP.set(keep)
    try:
        yield stacks
    finally:
        _WANTED.reset(wanted)
        _STACKS.reset(kept)
        _KEEP.reset(how)


@contextlib.contextmanager
def in_layer() -> Iterator[Recorded]:
    """Yields the dict that gets what is recorded inside, while one layer is traced."""
    made: Recorded = {}
    token = _LAYER.set(made)
    try:
        yield made
    finally:
        _LAYER.reset(token)


def is_in_layer() -> bool:
    """Whether a layer of a stack is being traced."""
    return _LAYER.get() is not None


def is_wanted(name: str) -> bool:
    """Whether an array of a layer that is being traced is recorded."""
    return _LAYER.get() is not None and name in _WANTED.get()


def record(**arrays: jax.Array) -> None:
    """Records those of the arrays that are wanted, if a layer is being traced.

    The first of a name counts: a layer's self-attention comes before what attends to an encoder.
    """
    made = _LAYER.get()
    if made is not None:
        made |= {name: _KEEP.get()(x) for name, x in arrays.items()
                 if name in _WANTED.get() and name not in made}


def add_stack(recorded: Recorded) -> None:
    """Hands what all layers of a stack have recorded to `recording`."""
    stacks = _STACKS.get()
    if stacks is not None:
        stacks.append(recorded)
