"""A model with its weights packed as small integers.

    lm = lmjax.load("runs/quickstart")
    small = quantize(lm, Quantization("int4", group=128), texts=texts)
    small.save("runs/quickstart-int4")
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.compression.gptq import rounded
from lmjax.compression.layer_inputs import grams
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.model import Model
from lmjax.models.packing import as_dict, as_matrix, matrices, pack_params
from lmjax.nn.module import Params
from lmjax.nn.packed import FORMATS, Quantization


def quantize(lm: LM, quantization: Quantization, *, texts: Sequence[str] = (),
             log: Callable[[str], None] = print) -> LM:
    """Packs a model's weights.

    Args:
      lm: a model with float32 weights, without adapters.
      quantization: the format of the integers.
      texts: what the model reads. With texts, GPTQ rounds the matrices of layers to int4 so that
        their outputs on them change least; else each weight goes to the nearest integer. The tables
        of tokens and the matrices of experts are always rounded to the nearest.
      log: prints a line for the user.

    Raises:
      UserError: the weights are packed already, the model has adapters, it is asked for no format,
        or the texts have too few tokens.
    """
    model = lm.model
    if not quantization.weights:
        raise UserError("a format of weights", "none", "choose int8 or int4", "quantize")
    if model.quantization.weights:
        raise UserError("a model with float32 weights", model.quantization.weights,
                        "quantise the model that it was made from", where=lm.source)
    if texts and FORMATS[quantization.weights].bits == 8:
        log("8 bits are enough without texts: every weight goes to the nearest integer")
        texts = ()
    packed = model.with_quantization(quantization)
    seen = grams(lm, texts, log) if texts else {}
    shardings = lm.layout.tree(packed.axes, packed.shapes)
    pack_all = jax.jit(lambda params: pack_params(model.functional, params, quantization),
                       out_shardings=shardings)
    params = pack_all(lm.params)
    for n, (path, gram) in enumerate(seen.items()):
        log(f"GPTQ: {path} ({n + 1} of {len(seen)} kinds of matrices)")
        _replace(params, path, _by_gptq(lm.params, path, model, gram, quantization))
    params = jax.device_put(params, shardings) if seen else params
    about = lm.about | {"quantization": dataclasses.asdict(quantization)}
    return LM(packed, params, lm.layout, lm.tokenizer, lm.recipe, about, lm.source)


def _by_gptq(params: Params, path: str, model: Model, gram: jax.Array,
             quantization: Quantization) -> dict[str, jax.Array]:
    how = matrices(model.functional)[path]
    whole = as_matrix(_at(params, path), how)  # [*lead, *out, I]
    grams = gram if how.lead else gram[None]
    layers = whole if how.lead else whole[None]
    made = []
    for w, one in zip(layers, grams, strict=True):
        packed = rounded(w.reshape(-1, w.shape[-1]), one, quantization.weights,
                         quantization.group)
        made.append(as_dict(packed))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *made)
    lead = whole.shape[:-1]
    return {name: x.reshape(*lead, x.shape[-1]) for name, x in stacked.items()}


def _at(params: Params, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def _replace(params: Params, path: str, node: dict[str, jax.Array]) -> None:
    *above, last = path.split("/")
    _at(params, "/".join(above))[last] = node
