"""Plain float32 weights out of others: with adapters merged into them, or unpacked."""

import dataclasses

import jax

from lmjax.models.model import Model
from lmjax.nn.adapters import NO_ADAPTERS, merge_adapters
from lmjax.nn.module import Params
from lmjax.nn.packed import NOT_QUANTIZED
from lmjax.sharding import Layout
from lmjax.training.checkpoint import About


def merged(model: Model, params: Params, layout: Layout, about: About) -> tuple[
        Model, Params, About]:
    """The model without adapters: W + scale * A B in place of each weight W."""
    plain, adapter = model.plain, model.adapter
    merge = jax.jit(lambda params: merge_adapters(params, adapter),
                    out_shardings=layout.tree(plain.axes, plain.shapes))
    kept = {key: value for key, value in about.items() if key != "base"}
    kept["recipe"] = kept["recipe"] | {"adapter": dataclasses.asdict(NO_ADAPTERS)}
    return plain, merge(params), kept


def unpacked(model: Model, params: Params, layout: Layout, about: About) -> tuple[
        Model, Params, About]:
    """The model with float32 weights in place of packed ones."""
    plain = model.with_quantization(NOT_QUANTIZED)
    unpack = jax.jit(lambda params: model.dense(params)[1],
                     out_shardings=layout.tree(plain.axes, plain.shapes))
    return plain, unpack(params), {k: v for k, v in about.items() if k != "quantization"}
