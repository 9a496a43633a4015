"""A stack of equal layers: scanned (one compiled body) or unrolled, under a named remat policy."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lmjax.nn.module import merge_module, split_module, stack_modules
from lmjax.nn.ops import MATMUL

# What the backward pass finds saved of a layer's forward pass; the rest it computes again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(MATMUL),
}


class Stack(nnx.Module):
    """`num_layers` copies of a block; every parameter has a leading "layers" dimension.

    scan: one loop over the layers, which compiles once whatever the depth. Without it the layers are
    laid out one after the other, which the compiler can optimise across but must compile one by one.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, scan: bool, remat: str,
                 rngs: nnx.Rngs):
        self.num_layers, self.scan, self.remat = num_layers, scan, remat
        self.block = stack_modules(build, num_layers, rngs)

    def __call__(self, x: jax.Array, per_layer: Any, *shared: Any) -> tuple[jax.Array, Any]:
        """Runs x through `block(x, layer's share of per_layer, *shared) -> (x, out)` for every layer.

        per_layer: a tree of arrays with a leading layers dimension (keys, caches), or None.
        Returns x and the outs, stacked likewise.
        """
        graph, params = split_module(self.block)

        def body(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            return merge_module(graph, layer[0])(x, layer[1], *shared)

        policy = REMAT[self.remat]
        if policy is not None:
            # Inside a scan the loop itself keeps XLA from undoing the recomputation.
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.scan)
        return jax.lax.scan(body, x, (params, per_layer), length=self.num_layers,
                            unroll=1 if self.scan else self.num_layers)
