"""Zeros in place of the weights that matter least: a share of them, or two of each four."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lmjax.compression.layer_inputs import grams
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.packing import TABLES, as_matrix, matrices
from lmjax.nn.packed import by_inputs
from lmjax.tree import named_leaves

TWO_OF_FOUR = "2:4"  # what NVIDIA's sparse tensor cores skip


def with_zeros(lm: LM, share: float | str, *, texts: Sequence[str] = (),
               log: Callable[[str], None] = print) -> LM:
    """Sets weights of the matrices of layers and of experts to 0.

    The inputs of each output are ranked among themselves, as in Wanda (Sun et al. 2023,
    arXiv:2306.11695): by |w| times the norm of the input over the texts. The matrices of experts,
    and all of them without texts, are ranked by |w|.

    Args:
      share: of the inputs of each output, or `TWO_OF_FOUR`.

    Raises:
      UserError: inputs that cannot be taken by four, or see `grams`.
    """
    which = {path: how for path, how in matrices(lm.model.functional).items()
             if path not in TABLES}
    leaves = dict(named_leaves(lm.params))
    for path, how in which.items():
        inputs = math.prod(leaves[path].shape[how.lead : how.lead + how.num_in])
        if share == TWO_OF_FOUR and inputs % 4:
            raise UserError(f"a multiple of 4 inputs of {path}", inputs, "name a share instead",
                            where="prune weights=2:4")
    seen = grams(lm, texts, log) if texts else {}
    for path, how in which.items():
        w = as_matrix(leaves[path], how)  # [*lead, *out, I]
        size, count = (4, 2) if isinstance(share, str) else (
            w.shape[-1], round(share * w.shape[-1]))
        norms = jnp.ones(w.shape[-1])
        if path in seen:
            norms = jnp.sqrt(jnp.diagonal(seen[path], axis1=-2, axis2=-1))
            norms = norms.reshape(*norms.shape[:-1], *(1,) * (w.ndim - norms.ndim), w.shape[-1])
        kept = _zeroed(w, jnp.broadcast_to(norms, w.shape), size, count)
        leaves[path] = by_inputs(kept, leaves[path].shape, how.num_in, how.lead)
    zeros = sum(int(jnp.sum(leaves[path] == 0)) for path in which)
    log(f"weights: {zeros / sum(leaves[path].size for path in which):.1%} of {len(which)} kinds "
        f"of matrices are 0, the least by {'Wanda' if seen else 'magnitude'}")
    params = jax.tree.unflatten(jax.tree.structure(lm.params), list(leaves.values()))
    params = jax.device_put(params, lm.layout.tree(lm.model.axes, lm.model.shapes))
    return LM(lm.model, params, lm.layout, lm.tokenizer, lm.recipe, lm.about, lm.source)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _zeroed(w: jax.Array, norms: jax.Array, size: int, count: int) -> jax.Array:
    """w [..., I] without the `count` least of each `size` products with `norms` in a row."""
    products = (jnp.abs(w) * norms).reshape(*w.shape[:-1], -1, size)
    ranks = jnp.argsort(jnp.argsort(products, axis=-1), axis=-1).reshape(w.shape)
    return jnp.where(ranks < count, 0.0, w)
