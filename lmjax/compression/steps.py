"""What one unit of each packed weight's integer is worth, for formats that store integers."""

import jax
import jax.numpy as jnp

from lmjax.lm import LM
from lmjax.models.packing import matrices, unpack_params
from lmjax.nn.module import Params
from lmjax.nn.packed import FORMATS, NOT_QUANTIZED


def integer_steps(lm: LM) -> Params:
    """By parameter, float32 of its dense shape: the step of each weight; 0 where none is packed."""
    plain = lm.model.with_quantization(NOT_QUANTIZED)
    which = set(matrices(plain.functional))

    def ones(params: Params, within: str = "") -> Params:
        out: Params = {}
        for key, node in params.items():
            path = within + key
            if path in which:
                [name] = set(node) & set(FORMATS)
                one = 1 if FORMATS[name].bits == 8 else 0x99  # 1 + 8 in each half
                out[key] = {**node, name: jnp.full_like(node[name], one)}
            else:
                out[key] = (ones(node, f"{path}/") if isinstance(node, dict)
                            else jnp.zeros_like(node))
        return out

    unpacked: Params = jax.jit(lambda params: unpack_params(
        plain.functional, params, lm.model.quantization))(ones(lm.params))
    return unpacked
