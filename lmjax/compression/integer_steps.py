"""What one unit of each packed weight's integer is worth, for formats that store integers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmjax.lm import LM
from lmjax.models.packing import matrices
from lmjax.nn.module import Params
from lmjax.nn.packed import FORMATS


def integer_steps(lm: LM) -> Params:
    """By parameter, float32 of its dense shape: the step of each weight; 0 where none is packed."""
    which = matrices(lm.model.functional)

    def ones(params: Params, within: str = "") -> Params:
        out: Params = {}
        for key, node in params.items():
            path = within + key
            if path in which and isinstance(node, dict):
                [name] = set(node) & set(FORMATS)
                one = 1 if FORMATS[name].bits == 8 else 0x99  # 1 + 8 in each half
                out[key] = {**node, name: jnp.full_like(node[name], one)}
            else:
                out[key] = (ones(node, f"{path}/") if isinstance(node, dict)
                            else jnp.zeros_like(node))
        return out

    unpack: Callable[[Params], Params] = jax.jit(lambda params: lm.model.dense(params)[1])
    return unpack(ones(lm.params))
