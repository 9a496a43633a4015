"""A model whose parametrization is in its weights: it computes the same without multipliers."""

import dataclasses

import jax
import numpy as np

from lmjax.errors import UserError
from lmjax.models.model import Model, ModelConfig, build_model
from lmjax.models.parametrization import (
    attention_multiplier,
    embedding_multiplier,
    logit_multiplier,
    residual_multiplier,
)
from lmjax.nn.module import Params
from lmjax.tree import named_leaves


def folded(model: Model, params: Params) -> tuple[Model, Params]:
    """The same model with parametrization=standard, as other libraries compute it.

    Its logits are equal but for how the scaled weights are rounded.

    Args:
      model: the model, without adapters and with nothing packed.
      params: its parameters, float32.

    Raises:
      UserError: a multiplier has no weights of its own that could be scaled instead.
    """
    config = model.config
    if config.parametrization == "standard" or model.adapter.kind or model.quantization.weights:
        return model, params
    scales = _by_module(config)
    leaves = [_scaled(leaf, path, scales, config) for path, leaf in named_leaves(params)]
    plain = dataclasses.replace(config, parametrization="standard", base_embed_dim=0,
                                base_num_layers=0, base_head_dim=0)
    device = next(iter(leaves[0].devices()))
    made = build_model(plain, vocab_size=0, platform=device.platform, dtype=model.dtype,
                       prefix_lm=model.prefix_lm)
    return made, jax.tree.unflatten(jax.tree.structure(params), leaves)


def _by_module(config: ModelConfig) -> dict[str, float]:
    """What the weights and biases of modules are multiplied by, by their paths.

    Those of layers are named without what stands before "layers/block/".
    """
    embeddings, logits = embedding_multiplier(config), logit_multiplier(config)
    query = "attention/query_norm" if config.qk_norm else "attention/query"
    if config.qkv_clip and not config.qk_norm and attention_multiplier(config) != 1.0:
        raise UserError("queries that are not clipped", f"qkv_clip={config.qkv_clip}",
                        "keep lmjax's own checkpoint", where="config.model.parametrization")
    scales = {query: attention_multiplier(config), "embedding": embeddings}
    if config.head.outputs:  # it has no multiplier
        return scales
    if not config.tie_embeddings:
        return scales | {"head": logits}
    if config.family == "encoder" and getattr(config, "mlm_head", False):
        last = "transform_norm"
    elif (config.norm_position != "post" and config.family != "encoder"
          and config.norm != "layernorm_plain"):
        last = "decoder/norm" if config.family == "encdec" else "norm"
    else:
        raise UserError("a norm before the unembedding, whose scale takes the multiplier of the "
                        f"logits of parametrization={config.parametrization}", "none",
                        "keep lmjax's own checkpoint, or train with tie_embeddings=false",
                        where="config.model.parametrization")
    return scales | {last: logits / embeddings}


def _scaled(leaf: jax.Array, path: str, scales: dict[str, float],
            config: ModelConfig) -> jax.Array:
    module, _, name = path.rpartition("/")
    stack, layer, inside = module.partition("layers/block/")
    if layer:
        module = inside.removeprefix("cross_") if inside.startswith("cross_attention") else inside
        scale = scales.get(module, 1.0)
        if _ends_branch(module, config):
            scale = residual_multiplier(config, leaf.shape[0])
    else:
        scale = scales.get(module, 1.0)
    if scale == 1.0:
        return leaf
    if name == "scale" and config.norm == "rmsnorm_1p":
        return (leaf + 1) * np.float32(scale) - 1
    return leaf * np.float32(scale)


def _ends_branch(module: str, config: ModelConfig) -> bool:
    """Whether a module of a layer is the last one of a residual branch."""
    if config.norm_position in ("both", "after"):
        return module.endswith("_post_norm")
    return module == "attention/out" or (module.startswith("mlp/") and module.endswith("down"))


