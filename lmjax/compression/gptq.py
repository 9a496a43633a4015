"""Rounds a matrix so that its products change least, for inputs like those that were seen.

GPTQ (Frantar et al. 2022, arXiv:2210.17323). The inputs are rounded one after another, and what
each loses is made up for by those that are still to come, as far as inputs occur together.

Shape suffixes: F outputs, I inputs, N groups, G inputs per group.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.nn.packed import FORMATS, Packed, from_ints, group_size, pack

DAMPING = 0.01  # is added to the squares of the inputs, as a share of their mean
SHRINKS = [1.0 - 0.025 * i for i in range(17)]  # that `best_shrink` tries: 1 to 0.6


def rounded(w_FI: jax.Array, gram_II: jax.Array, format: str, group: int) -> Packed:
    """Packs a matrix by GPTQ.

    Args:
      w_FI: float32.
      gram_II: float32, the sum over the inputs x seen of x x^T.
      format: a row of `packed.FORMATS`.
      group: inputs that share a scale.
    """
    return _rounded(w_FI, gram_II, format, group_size(w_FI.shape[-1], format, group))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rounded(w_FI: jax.Array, gram_II: jax.Array, format: str, size: int) -> Packed:
    num_out, num_in = w_FI.shape
    groups, largest = num_in // size, FORMATS[format].largest
    seen_I = jnp.diag(gram_II)
    damped = gram_II + jnp.eye(num_in) * (DAMPING * jnp.mean(seen_I) + jnp.finfo(jnp.float32).tiny)
    # Row i of the upper factor of the inverse: what the later inputs take over from input i.
    inverse = jnp.linalg.inv(damped)
    upper_II = jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def one_group(n: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w_FI, ints_FNG, scales_FN = state
        at = n * size
        w_FG = lax.dynamic_slice_in_dim(w_FI, at, size, axis=1)
        rows_GI = lax.dynamic_slice_in_dim(upper_II, at, size, axis=0)
        within_GG = lax.dynamic_slice_in_dim(rows_GI, at, size, axis=1)
        shrink_F = best_shrink(w_FG, lax.dynamic_slice_in_dim(seen_I, at, size), format)
        scale_F = pack(w_FG, format, size, shrink_F[:, None]).scales[:, 0]

        def one_input(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            w_FG, ints_FG, errors_FG = state
            ints_F = jnp.clip(jnp.round(w_FG[:, i] / scale_F), -largest, largest)
            error_F = (w_FG[:, i] - ints_F * scale_F) / within_GG[i, i]
            w_FG = w_FG - error_F[:, None] * within_GG[i][None]
            return w_FG, ints_FG.at[:, i].set(ints_F), errors_FG.at[:, i].set(error_F)

        _, ints_FG, errors_FG = lax.fori_loop(
            0, size, one_input, (w_FG, jnp.zeros_like(w_FG), jnp.zeros_like(w_FG)))
        # The inputs of this group change too, but are not read again.
        w_FI = w_FI - errors_FG @ rows_GI
        return w_FI, ints_FNG.at[:, n].set(ints_FG), scales_FN.at[:, n].set(scale_F)

    start = w_FI, jnp.zeros((num_out, groups, size)), jnp.zeros((num_out, groups))
    _, ints_FNG, scales_FN = lax.fori_loop(0, groups, one_group, start)
    return from_ints(ints_FNG, scales_FN, format)


def best_shrink(w_FG: jax.Array, seen_G: jax.Array, format: str) -> jax.Array:
    """The share of a group's largest magnitude at which cutting costs least, [F].

    Args:
      w_FG: one group of each output.
      seen_G: the sum of the squares of each input, which weighs its errors.
    """
    def loss(shrink: jax.Array) -> jax.Array:
        near = pack(w_FG, format, w_FG.shape[1], shrink).dense(jnp.float32)
        return jnp.sum(jnp.square(near - w_FG) * seen_G[None], axis=1)

    tried = jnp.asarray(SHRINKS)
    losses = lax.map(lambda shrink: loss(jnp.broadcast_to(shrink, (len(w_FG), 1))), tried)
    return tried[jnp.argmin(losses, axis=0)]
