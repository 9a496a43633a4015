"""The moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp


def ema_update(ema: Any, params: Any, decay: float, step: Any) -> Any:
    """Returns d * ema + (1 - d) * params with d = min(decay, (1 + step) / (10 + step)).

    d starts small to keep the random initial weights out of the average of a short run.

    Args:
      ema, params: trees of float32 arrays.
      decay: the largest d.
      step: an integer from 0, traced or not.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)
