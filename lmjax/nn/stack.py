"""A stack of equal layers, scanned (compiled once) or unrolled, under a named remat policy."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.errors import UserError
from lmjax.nn.module import Params, merge_module, split_module, stack_modules
from lmjax.nn.ops import MATMUL
from lmjax.nn.pipeline import pipeline
from lmjax.nn.sequence import mesh_axes

# Names of a layer's arrays that `remat` may list.
REMAT_NAMES = ("query", "key", "value", "kernel", "out", "gate", "up")
# What each policy saves of a layer's forward pass; the backward pass computes the rest again.
REMAT = {
    "none": None,  # saves everything
    "full": (),
    "attention": REMAT_NAMES[:5],  # everything outside the MLP
    "dots": (MATMUL,),  # every matmul's result
}


def kept_names(remat: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the arrays that `remat` saves: on the device, and in the host's memory.

    Args:
      remat: a row of `REMAT` but "none", or names of `REMAT_NAMES` joined by "+". One written
        host:NAME is saved in the host's memory.

    Raises:
      UserError: an unknown name.
    """
    assert remat != "none", "saves everything"
    if (names := REMAT.get(remat)) is not None:
        return names, ()
    parts = remat.split("+")
    host = tuple(part.removeprefix("host:") for part in parts if part.startswith("host:"))
    device = tuple(part for part in parts if not part.startswith("host:"))
    if unknown := set(host + device) - set(REMAT_NAMES):
        raise UserError(
            f"one of {', '.join(REMAT)}, or names of {', '.join(REMAT_NAMES)} joined by + "
            "(host:NAME: kept in the host's memory)",
            repr(remat), f"correct {sorted(unknown)[0]!r}", where="remat")
    return device, host


def remat_policy(remat: str) -> Any:
    """The policy of `jax.checkpoint` for `remat` (see `kept_names`); None for "none"."""
    if remat == "none":
        return None
    device, host = kept_names(remat)
    if not host:
        return jax.checkpoint_policies.save_only_these_names(*device)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=device, names_which_can_be_offloaded=host, offload_src="device",
        offload_dst="pinned_host")


@jax.tree_util.register_pytree_node_class
class Unstacked(tuple):
    """A parameter of all layers as one array per layer, in place of one stacked array.

    XLA's CPU backend copies a layer out of a stacked array each time that it is used. In a loop
    over generated tokens these copies would take most of the time (docs/speed.md).
    """

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Sequence[Any]) -> "Unstacked":
        return cls(arrays)


def is_unstacked(x: Any) -> bool:
    """Whether x is an `Unstacked` parameter, which functions over layers treat as one leaf."""
    return isinstance(x, Unstacked)


Build = Callable[[Any], Any]  # from a layer's parameters to its block


class Inputs(NamedTuple):
    """What several layers read besides x; every array has a leading dimension of layers."""

    params: Params | None  # None: all layers share theirs
    per_layer: Any
    caches: Sequence[Any]  # one per kind of layer


class Stack(nnx.Module):
    """`num_layers` copies of a block; every parameter has a leading "layers" dimension.

    Layers may differ in the arguments of their call, such as a window: layer i is of kind
    pattern[i % len(pattern)]. If parameters are `Unstacked`, the layers are unrolled in any case,
    and the new caches are `Unstacked` too.

    Args:
      scan: runs the layers in one loop over repetitions of the pattern, whose body is compiled once
        whatever the depth. False unrolls the loop: the compiler can optimise across layers, but has
        to compile every one. Layers after the last full repetition follow the loop.
      remat: see `kept_names`.
      one_set: all layers have the same parameters, whose leading dimension is 1.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, scan: bool,
                 remat: str, rngs: nnx.Rngs, pattern: Sequence[int] = (0,), one_set: bool = False):
        self.num_layers, self.scan, self.remat = num_layers, scan, remat
        self.pattern, self.one_set = tuple(pattern), one_set
        self.block = stack_modules(build, 1 if one_set else num_layers, rngs)

    def __call__(self, x: jax.Array, per_layer: Any, caches: Sequence[Any],
                 shared: Sequence[Any]) -> tuple[jax.Array, Sequence[Any], Any]:
        """Runs x through block(x, per_layer[i], its cache, shared[its kind]) -> (x, cache, out).

        Args:
          per_layer: a tree of arrays with a leading dimension of all layers, or None.
          caches: one such tree per kind, with a leading dimension of the layers of that kind, or
            None.
          shared: one tree per kind, the same for all layers of that kind.

        Returns:
          x, the new caches, and the layers' outs, stacked.
        """
        block = split_module(self.block)
        if mesh_axes("layers") and not any(caches):
            x, outs = pipeline(self._run, block, x, per_layer, shared, period=len(self.pattern))
            return x, caches, outs
        return self._run(block, x, per_layer, caches, shared)

    def _run(self, block: tuple[Any, Params], x: jax.Array, per_layer: Any, caches: Sequence[Any],
             shared: Sequence[Any]) -> tuple[jax.Array, Sequence[Any], Any]:
        """`__call__` for the layers of `block`: all of them, or those of one pipeline stage."""
        graph, params = block
        if self.one_set:
            def one(_: Any) -> nnx.Module:
                return merge_module(graph, _at(params, 0))

            return self._scanned(one, x, Inputs(None, per_layer, caches), shared, self.num_layers)
        build, inputs = functools.partial(merge_module, graph), Inputs(params, per_layer, caches)
        num_layers = len(jax.tree.leaves(params, is_leaf=is_unstacked)[0])
        if not _any_unstacked(params):
            return self._scanned(build, x, inputs, shared, num_layers)
        kinds = [self.pattern[i % len(self.pattern)] for i in range(num_layers)]
        return self._unrolled(build, x, inputs, shared, kinds, join=_unstacked)

    def _scanned(self, build: Build, x: jax.Array, inputs: Inputs, shared: Sequence[Any],
                 num_layers: int) -> tuple[jax.Array, Sequence[Any], Any]:
        """Scans over the repetitions of the pattern, then unrolls the layers that are left."""
        rounds, num_left = divmod(num_layers, len(self.pattern))
        in_rounds, left = self._split_rounds(inputs, rounds)
        in_loop = self.scan and rounds > 1  # JAX inlines a loop of one round

        def one_round(x: jax.Array, inputs: Inputs) -> tuple[jax.Array, Any]:
            x, caches, outs = self._unrolled(build, x, inputs, shared, self.pattern, join=_stack,
                                             in_loop=in_loop)
            return x, (caches, outs)

        x, new = jax.lax.scan(one_round, x, in_rounds, length=rounds,
                              unroll=1 if self.scan else rounds)
        caches, outs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), new)
        if num_left:
            kinds = self.pattern[:num_left]
            x, more_caches, more_outs = self._unrolled(build, x, left, shared, kinds, join=_stack)
            caches = tuple(map(_concatenate, caches, more_caches))
            outs = _concatenate(outs, more_outs)
        return x, caches, outs

    def _unrolled(self, build: Build, x: jax.Array, inputs: Inputs, shared: Sequence[Any],
                  kinds: Sequence[int], *, join: Callable[[Sequence[Any]], Any],
                  in_loop: bool = False) -> tuple[jax.Array, Sequence[Any], Any]:
        """Runs one layer after another, layer i of kind kinds[i].

        Args:
          join: makes one tree of a list with one tree per layer.
          in_loop: whether this is the body of a loop.
        """
        layers = [self._layer(build, of_kind, in_loop) for of_kind in shared]
        caches: list[list[Any]] = [[] for _ in shared]
        outs = []
        for i, kind in enumerate(kinds):
            cache = _at(inputs.caches[kind], len(caches[kind]))
            params, per_layer = _at(inputs.params, i), _at(inputs.per_layer, i)
            x, cache, out = layers[kind](x, params, per_layer, cache)
            caches[kind].append(cache)
            outs.append(out)
        return x, tuple(join(of_kind) for of_kind in caches), join(outs)

    def _layer(self, build: Build, shared: Any, in_loop: bool) -> Callable[..., Any]:
        """The function of one kind of layer, under the remat policy."""

        def layer(x: jax.Array, params: Params, per_layer: Any,
                  cache: Any) -> tuple[jax.Array, Any, Any]:
            return build(params)(x, per_layer, cache, shared)

        policy = remat_policy(self.remat)
        if policy is None:
            return layer
        # In a loop, XLA cannot undo the recomputation by merging it with the forward pass.
        return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)

    def _split_rounds(self, inputs: Inputs, rounds: int) -> tuple[Inputs, Inputs]:
        """The inputs of all repetitions of the pattern, [rounds, ...], and of the layers left."""
        params, more_params = _split(inputs.params, rounds, len(self.pattern))
        per_layer, more_per_layer = _split(inputs.per_layer, rounds, len(self.pattern))
        caches = [_split(cache, rounds, self.pattern.count(kind))
                  for kind, cache in enumerate(inputs.caches)]
        return (Inputs(params, per_layer, tuple(first for first, _ in caches)),
                Inputs(more_params, more_per_layer, tuple(rest for _, rest in caches)))

    def map(self, fn: Callable[[Any], Any]) -> Any:
        """`fn(block)` for every layer, stacked (`Unstacked` if the parameters are)."""
        graph, params = split_module(self.block)
        if _any_unstacked(params):
            layers = range(self.num_layers)
            return _unstacked([fn(merge_module(graph, _at(params, i))) for i in layers])
        return jax.lax.map(lambda p: fn(merge_module(graph, p)), params)


def _split(tree: Any, rounds: int, each: int) -> tuple[Any, Any]:
    """Arrays [layers, ...] as [rounds, each, ...], and the layers beyond rounds * each."""
    cut = rounds * each
    return (jax.tree.map(lambda a: a[:cut].reshape(rounds, each, *a.shape[1:]), tree),
            jax.tree.map(lambda a: a[cut:], tree))


def _at(tree: Any, i: int) -> Any:
    """Layer i of every array."""
    return jax.tree.map(lambda a: a[i], tree, is_leaf=is_unstacked)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees) if trees else None


def _unstacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: Unstacked(a), *trees)


def _any_unstacked(tree: Any) -> bool:
    return any(map(is_unstacked, jax.tree.leaves(tree, is_leaf=is_unstacked)))


def _concatenate(a: Any, b: Any) -> Any:
    """Joins two trees of stacked layers; b may be None."""
    return a if b is None else jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
