"""A stack of equal layers: scanned (one compiled body) or unrolled, under a named remat policy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.nn.module import Params, merge_module, split_module, stack_modules
from lmjax.nn.ops import MATMUL
from lmjax.nn.pipeline import pipeline
from lmjax.nn.sequence import axes_of

NAMES = ("query", "key", "value", "kernel", "out", "gate", "up")  # of a layer's arrays, that `remat` may list
# What the backward pass finds saved of a layer's forward pass; the rest it computes again.
REMAT = {
    "none": None,  # keep everything
    "full": (),
    "attention": NAMES[:5],  # all but the MLP
    "dots": (MATMUL,),  # every matmul's result
}


def kept_names(remat: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a row of `REMAT` but "none", or some of `NAMES` joined by +, keeps on the device, and what in the host's
    memory (of a list, those written host:NAME).

    Raises:
      ValueError: an unknown name.
    """
    assert remat != "none", "which keeps everything"
    if remat in REMAT:
        return REMAT[remat], ()
    parts = remat.split("+")
    host = tuple(part.removeprefix("host:") for part in parts if part.startswith("host:"))
    device = tuple(part for part in parts if not part.startswith("host:"))
    if unknown := set(host + device) - set(NAMES):
        raise ValueError(f"remat: expected one of {', '.join(REMAT)}, or names of {', '.join(NAMES)} joined by + "
                         f"(host:NAME: kept in the host's memory), got {remat!r}; correct {sorted(unknown)[0]!r}")
    return device, host


def remat_policy(remat: str) -> Any:
    """What `jax.checkpoint` takes for `remat` (see `kept_names`); None: keep everything."""
    if remat == "none":
        return None
    device, host = kept_names(remat)
    if not host:
        return jax.checkpoint_policies.save_only_these_names(*device)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=device, names_which_can_be_offloaded=host, offload_src="device",
        offload_dst="pinned_host")


@jax.tree_util.register_pytree_node_class
class Apart(tuple):
    """A stacked array taken apart: one array a layer. XLA's CPU backend copies a layer out of a stacked one each time
    that it is used, and with a loop around copies are most of what decoding would do (docs/speed.md)."""

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Sequence[Any]) -> "Apart":
        return cls(arrays)


def is_apart(x: Any) -> bool:
    """Whether x is a parameter with an array a layer: a leaf, where layers are concerned."""
    return isinstance(x, Apart)


class Stack(nnx.Module):
    """`num_layers` copies of a block; every parameter has a leading "layers" dimension.

    scan: one loop over the layers, which compiles once whatever the depth. Without it the layers are
    laid out one after the other, which the compiler can optimise across but must compile one by one.
    kinds: layers may differ in what they are called with (a window, an angle): layer i is of kind
    kinds[i % len(kinds)]. The loop is then over repetitions of `kinds`; layers that are left come after it.
    Parameters that are `Apart` have their layers laid out in any case, and so are the caches that come back.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, scan: bool, remat: str,
                 rngs: nnx.Rngs, kinds: Sequence[int] = (0,)):
        self.num_layers, self.scan, self.remat, self.kinds = num_layers, scan, remat, tuple(kinds)
        self.block = stack_modules(build, num_layers, rngs)

    def __call__(self, x: jax.Array, per_layer: Any, caches: Sequence[Any],
                 shared: Sequence[Any]) -> tuple[jax.Array, Sequence[Any], Any]:
        """Runs x through `block(x, layer's share of per_layer, its cache, shared[its kind]) -> (x, cache, out)`.

        per_layer: a tree of arrays with a leading dimension of all layers, or None. caches: one such tree a kind, with
        a leading dimension of the layers of that kind, or None. Returns x, the new caches, and the outs, stacked.
        """
        if axes_of("layers") and not any(caches):
            x, outs = pipeline(self._loop, split_module(self.block), x, per_layer, shared, period=len(self.kinds))
            return x, caches, outs
        return self._loop(split_module(self.block), x, per_layer, caches, shared)

    def _loop(self, block: tuple[Any, Params], x: jax.Array, per_layer: Any, caches: Sequence[Any],
              shared: Sequence[Any]) -> tuple[jax.Array, Sequence[Any], Any]:
        """`__call__` of as many layers as `block`, taken apart, has parameters of."""
        graph, params = block
        num_layers = len(jax.tree.leaves(params, is_leaf=is_apart)[0])
        policy = remat_policy(self.remat)

        def layer_of(kind: int, looped: bool) -> Callable[..., Any]:
            def layer(x: jax.Array, params: Any, per_layer: Any, cache: Any) -> tuple[jax.Array, Any, Any]:
                return merge_module(graph, params)(x, per_layer, cache, shared[kind])

            # Inside a scan the loop itself keeps XLA from undoing the recomputation.
            return layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=not looped)

        def run(x: jax.Array, part: Any, kinds: Sequence[int], join: Any = _stacked,
                looped: bool = False) -> tuple[jax.Array, Any]:
            params, per_layer, caches = part
            layers = [layer_of(kind, looped) for kind in range(len(shared))]
            new, outs = [[] for _ in shared], []
            for i, kind in enumerate(kinds):
                cache = _at(caches[kind], len(new[kind]))
                x, cache, out = layers[kind](x, _at(params, i), _at(per_layer, i), cache)
                new[kind].append(cache)
                outs.append(out)
            return x, (tuple(join(n) for n in new), join(outs))

        period = len(self.kinds)
        if _any_apart(params):
            kinds = [self.kinds[i % period] for i in range(num_layers)]
            x, (new, outs) = run(x, (params, per_layer, caches), kinds, _apart)
            return x, new, outs
        rounds, rest = divmod(num_layers, period)
        each = [self.kinds.count(kind) for kind in range(len(shared))]
        parts = [_split(params, rounds, period), _split(per_layer, rounds, period),
                 tuple(_split(c, rounds, n) for c, n in zip(caches, each, strict=True))]
        first, last = ((p[i], q[i], tuple(c[i] for c in cs)) for i in (0, 1) for p, q, cs in [parts])
        looped = self.scan and rounds > 1  # a loop of one round is inlined
        x, done = jax.lax.scan(lambda x, part: run(x, part, self.kinds, looped=looped), x, first, length=rounds,
                               unroll=1 if self.scan else rounds)
        new, outs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), done)
        if rest:
            x, (more, more_outs) = run(x, last, self.kinds[:rest])
            new, outs = tuple(map(_joined, new, more)), _joined(outs, more_outs)
        return x, new, outs

    def map(self, fn: Callable[[Any], Any]) -> Any:
        """`fn(block)` of every layer, stacked."""
        graph, params = split_module(self.block)
        if _any_apart(params):
            return _apart([fn(merge_module(graph, _at(params, i))) for i in range(self.num_layers)])
        return jax.lax.map(lambda p: fn(merge_module(graph, p)), params)


def _split(tree: Any, rounds: int, each: int) -> tuple[Any, Any]:
    """The leading dimension as [rounds, each], and what is left of it."""
    cut = rounds * each
    return (jax.tree.map(lambda a: a[:cut].reshape(rounds, each, *a.shape[1:]), tree),
            jax.tree.map(lambda a: a[cut:], tree))


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], tree, is_leaf=is_apart)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees) if trees else None


def _apart(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: Apart(a), *trees)


def _any_apart(tree: Any) -> bool:
    return any(map(is_apart, jax.tree.leaves(tree, is_leaf=is_apart)))


def _joined(a: Any, b: Any) -> Any:
    return a if b is None else jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
