"""Watch points at the outputs of all modules of a model: what is not finite, and where first.

A watched model computes what the model computes. Its layers are unrolled, and nothing of them is
computed twice: so every output is a value of the traced function itself. The gradient of an output
is seen by giving a function an argument that it does not use, whose "gradient" is what was seen.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.nn.module import Functional, functional
from lmjax.nn.stack import Stack


class Seen(NamedTuple):
    """What is seen at one output, or at its gradient; float32."""

    bad: jax.Array  # elements that are not finite
    rms: jax.Array  # of the elements
    bad_rows: jax.Array  # [B]: 1 for the rows that hold them; [0] if it has no rows


@dataclasses.dataclass
class Watch:
    """What the modules that are traced inside `watching` have given.

    Attributes:
      outputs: what was seen at each output, in the order of the computation.
    """

    rows: int  # of the batch
    probes: Mapping[str, Seen] | None  # by the names of `outputs`; None: gradients are not seen
    outputs: dict[str, Seen] = dataclasses.field(default_factory=dict)
    layers: dict[str, int] = dataclasses.field(default_factory=dict)  # calls of each block so far
    within: tuple[str, str] = ("", "")  # the path of a block, and the layer that it is now

    def name(self, path: str) -> str:
        """A path with the number of the layer in it, and of the call if it is called again."""
        block, layer = self.within
        if block and path.startswith(block):
            path = layer + path[len(block):]
        count = sum(name.partition("#")[0] == path for name in self.outputs)
        return f"{path}#{count + 1}" if count else path


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextlib.contextmanager
def watching(rows: int, probes: Mapping[str, Seen] | None = None) -> Iterator[Watch]:
    """Watches the modules of the `watched` models that are traced inside.

    Args:
      rows: of the batch.
      probes: zeros by name, as `outputs` of an earlier trace; the function's gradients by them are
        what is seen at the outputs' gradients.
    """
    watch = Watch(rows, probes)
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)


def watched(model: Functional) -> Functional:
    """The same module, with its layers unrolled and the output of every module watched."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        module = model.build(rngs)
        for path, part in [(p, m) for p, m in nnx.iter_modules(module) if p]:
            if isinstance(part, Stack):
                part.remat = "none"
                continue
            name = "/".join(map(str, path))
            part.__class__ = _watched_class(type(part))
            setattr(part, "watched_as", name)  # noqa: B010 - of the new class
        return module

    return functional(build)


@functools.cache
def _watched_class(kind: type) -> type:
    """A class of modules like `kind`, whose outputs are watched."""

    def call(self: Any, *args: Any, **more: Any) -> Any:
        watch = _WATCH.get()
        if watch is None:
            return kind.__call__(self, *args, **more)
        before = watch.within
        if self.watched_as.endswith("layers/block"):
            number = watch.layers.get(self.watched_as, 0)
            watch.layers[self.watched_as] = number + 1
            layer = f"{self.watched_as.removesuffix('/block')}[{number}]"
            watch.within = (self.watched_as, layer)
        out = kind.__call__(self, *args, **more)
        name = watch.name(self.watched_as)
        watch.within = before
        if isinstance(out, tuple) and not hasattr(out, "_fields"):
            return (_point(watch, name, out[0]), *out[1:])
        return _point(watch, name, out) if isinstance(out, jax.Array) else out

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _point(watch: Watch, name: str, x: jax.Array) -> jax.Array:
    watch.outputs[name] = jax.lax.stop_gradient(_seen(x, watch.rows))
    if watch.probes is None:
        return x
    return _probed(watch.rows, x, watch.probes[name])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probed(rows: int, x: jax.Array, probe: Seen) -> jax.Array:
    return x


_probed.defvjp(lambda rows, x, probe: (x, None), lambda rows, _, g: (g, _seen(g, rows)))


def _seen(x: jax.Array, rows: int) -> Seen:
    x = x.astype(jnp.float32)
    bad = ~jnp.isfinite(x)
    has_rows = x.ndim > 1 and x.shape[0] == rows
    bad_rows = jnp.any(bad.reshape(rows, -1), axis=1) if has_rows else jnp.zeros((0,), bool)
    return Seen(jnp.sum(bad.astype(jnp.float32)), jnp.sqrt(jnp.mean(jnp.square(x))),
                bad_rows.astype(jnp.float32))


def first_bad(outputs: Mapping[str, Seen], backward: bool = False) -> str:
    """The name of the first output that is not finite; "" if all are.

    Args:
      outputs: on the host, in the order of the forward pass.
      backward: they are gradients, which come in the opposite order.
    """
    names = [name for name, seen in outputs.items() if seen.bad > 0]
    return (names[-1] if backward else names[0]) if names else ""
