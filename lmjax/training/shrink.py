"""A smaller model out of a larger one's weights: fewer layers, narrower matrices.

Layers are taken evenly, the first and the last among them, as DistilBERT (Sanh et al. 2019,
arXiv:1910.01108) takes every other. Of every other axis the first entries are taken. Grouped
queries stay with their keys, since both kinds of heads shrink alike.
"""

import jax
import numpy as np

from lmjax.errors import UserError
from lmjax.models.layer_map import evenly
from lmjax.models.model import Model, ModelConfig
from lmjax.nn.module import Params
from lmjax.tree import named_leaves

# Fields of a model's config that may be smaller than in the model that it is cut from.
SIZES = ("num_layers", "num_encoder_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim",
         "mlp_dim")


def check_sizes(ours: ModelConfig, theirs: ModelConfig) -> None:
    """Checks that a model can be cut out of another one.

    Raises:
      UserError: it is larger in some way, or its heads are other than the other's.
    """
    for name in ("latent", "first_dense"):
        own, other = getattr(ours, name), getattr(theirs, name)
        if own != other:
            raise UserError(f"{other}, as train.init_from has", own, "take it over",
                            where=f"config.model.{name.replace('first', 'moe.first')}")
    small, large = ours.dims, theirs.dims
    pairs = {name: tuple(getattr(c, name, 0) or c.num_layers for c in (ours, theirs))
             for name in SIZES if name not in small._fields}
    pairs |= dict(zip(small._fields, zip(small, large, strict=True), strict=True))
    if small.head_dim != large.head_dim:
        raise UserError(f"heads of {large.head_dim} dimensions, as train.init_from has",
                        small.head_dim, "set model.num_heads so that it divides embed_dim into "
                        "such heads, or model.head_dim itself", where="config.model.head_dim")
    if getattr(theirs, "shared_layers", False) and ours.num_layers != theirs.num_layers:
        raise UserError(f"the {theirs.num_layers} layers of train.init_from, which share their "
                        "parameters", ours.num_layers, "set it to that", "config.model.num_layers")
    for name, (own, other) in pairs.items():
        if own > other:
            raise UserError(f"at most {other}, as train.init_from has", own, "lower it",
                            where=f"config.model.{name}")
    if small.num_heads * large.num_kv_heads != large.num_heads * small.num_kv_heads:
        raise UserError(f"{large.num_heads // large.num_kv_heads} query heads for each key head, "
                        "as train.init_from has", small.num_heads // small.num_kv_heads,
                        "change num_kv_heads", where="config.model.num_kv_heads")


def shrunk(params: Params, theirs: Model, model: Model) -> Params:
    """Cuts the parameters of `theirs` to the shapes of `model`, where it has them too."""
    shapes, axes = dict(named_leaves(model.shapes)), _axes(theirs)
    leaves, tree = jax.tree.flatten(params)

    def cut(name: str, leaf: jax.Array) -> jax.Array:
        if name not in shapes:
            return leaf
        for d, (size, axis) in enumerate(zip(shapes[name].shape, axes[name], strict=True)):
            if size < leaf.shape[d]:
                taken = (np.array(evenly(size, leaf.shape[d], model.config, theirs.config))
                         if axis == "layers" else np.arange(size))
                leaf = leaf.take(taken, axis=d)
        return leaf

    names = [name for name, _ in named_leaves(params)]
    return jax.tree.unflatten(tree, [cut(*pair) for pair in zip(names, leaves, strict=True)])


def _axes(model: Model) -> dict[str, tuple[str, ...]]:
    flat = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    return dict(zip((name for name, _ in named_leaves(model.shapes)), flat, strict=True))
