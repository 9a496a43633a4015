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

BRANCH = "the outputs of residual branches"


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
    leaves, to_fold = [], dict(_by_module(config))
    missing = {name for name, scale in to_fold.items() if scale != 1.0}
    for path, leaf in named_leaves(params):
        name = _part(path, config)
        scale = to_fold.get(name, 1.0)
        if name == BRANCH:
            scale = residual_multiplier(config, leaf.shape[0])
        missing.discard(name)
        leaves.append(leaf if scale == 1.0 else _scaled(leaf, path, scale, config))
    if missing or (config.qkv_clip and not config.qk_norm and to_fold["attention/query"] != 1.0):
        raise UserError(f"weights that take the multipliers of parametrization="
                        f"{config.parametrization}",
                        f"none of {', '.join(sorted(missing)) or 'queries, which are clipped'}",
                        "keep lmjax's own checkpoint", where="config.model.parametrization")
    plain = dataclasses.replace(config, parametrization="standard", base_embed_dim=0,
                                base_num_layers=0, base_head_dim=0)
    device = next(iter(leaves[0].devices()))
    made = build_model(plain, vocab_size=0, platform=device.platform, dtype=model.dtype,
                       prefix_lm=model.prefix_lm)
    return made, jax.tree.unflatten(jax.tree.structure(params), leaves)


def _by_module(config: ModelConfig) -> dict[str, float]:
    """What the weights and biases of modules are multiplied by, by their paths.

    Those of layers are named without what stands before "layers/block/". Each stack has its own
    value for BRANCH.
    """
    embeddings, logits = embedding_multiplier(config), logit_multiplier(config)
    query = "attention/query_norm" if config.qk_norm else "attention/query"
    scales = {query: attention_multiplier(config), "embedding": embeddings,
              BRANCH: residual_multiplier(config, config.num_layers)}
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


def _part(path: str, config: ModelConfig) -> str:
    """The name in `_by_module` of what a parameter belongs to; "" for what is not scaled."""
    module, _, _ = path.rpartition("/")
    _, layer, inside = module.partition("layers/block/")
    if not layer:
        return module
    if config.norm_position in ("both", "after"):  # the last module of a branch is its norm
        ends = inside.endswith("_post_norm")
    else:
        ends = inside.endswith("attention/out") or (
            inside.startswith("mlp/") and inside.endswith("down"))
    return BRANCH if ends else inside.removeprefix("cross_")


def _scaled(leaf: jax.Array, path: str, scale: float, config: ModelConfig) -> jax.Array:
    norm = config.norm
    if path.endswith("query_norm/scale") and config.qk_norm_kind != "auto":
        norm = config.qk_norm_kind
    if path.endswith("/scale") and norm == "rmsnorm_1p":  # the parameter is the scale - 1
        return (leaf + 1) * np.float32(scale) - 1
    return leaf * np.float32(scale)
