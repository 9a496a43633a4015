"""How a model and its optimizer change with width and depth: one table over names of axes.

Settings that were tuned on a small model, the base, hold for a wider or deeper one if activations
and their changes per step keep their size. muP (Yang and Hu 2022, arXiv:2203.03466) does this for
width, CompleteP (Dey et al. 2025, arXiv:2505.01618) for width and depth. At the base dimensions
both are what "standard" is.

With m the ratio of the widths, of `embed_dim` to `base_embed_dim`, TABLE holds powers of m. All
other widths are taken to grow in proportion. With l the ratio of the depths, CompleteP besides
multiplies the output of each residual branch by 1/l, draws the initial weights as at the base
depth, and divides AdamW's epsilon of the layers by l.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.errors import UserError
from lmjax.models.config import TransformerConfig
from lmjax.tree import named_leaves

WIDTHS = ("embed", "expert_embed", "mlp", "heads", "kv_heads", "head_dim")  # they grow with m
TABLES = ("vocab", "positions", "outputs")  # axes of what is looked up, or scores a vocabulary


class Powers(NamedTuple):
    """Powers of the width ratio m."""

    init: float  # of the standard deviation of the initial weights
    rate: float  # of the learning rate of an optimizer whose updates have the size of AdamW's
    # Of Muon's rate. An update of AdamW has a low rank, so that its effect grows with the number of
    # inputs, m. Muon's is orthogonal: at the same RMS of its elements its effect grows with the
    # root of m (Yang et al. 2023, arXiv:2310.17813).
    muon: float
    # Of AdamW's epsilon: the power with which the gradient of an element falls.
    eps: float


# By the kind of a parameter. Weight decay is divided by what the rate is multiplied by, so that a
# weight without gradient decays equally fast in a model of any width.
TABLE = {
    "vector": Powers(init=0, rate=0, muon=0, eps=-1),  # scales, biases
    "embedding": Powers(init=0, rate=0, muon=0, eps=-1),  # of tokens, positions, types
    "into": Powers(init=0, rate=0, muon=0, eps=-1),  # from a fixed number: B of an adapter
    "hidden": Powers(init=-0.5, rate=-1, muon=-0.5, eps=-1),
    # To a fixed number: a router, a gate, a task's head, A of an adapter.
    "out_of": Powers(init=-1, rate=-1, muon=-1, eps=0),
    # The logits are multiplied by 1/m, also those of a table that is the embedding as well.
    "unembedding": Powers(init=0, rate=0, muon=0, eps=-1),
}


class Factors(NamedTuple):
    """What the settings of an optimizer are multiplied by for one parameter."""

    rate: float
    decay: float  # of the weights
    eps: float


def kind_of(path: str, axes: tuple[str, ...]) -> str:
    """The row of TABLE that a parameter belongs to."""
    own = [name for name in axes if name not in ("layers", "experts")]
    if "norm" in own or not own or own in (["heads"], ["mlp"]):  # sinks, biases
        return "vector"
    if path.startswith("task_head/table"):
        return "out_of"
    if set(own) & set(TABLES):
        return "unembedding" if path.startswith("head/") else "embedding"
    grows = own[0] in WIDTHS, own[-1] in WIDTHS
    return {(True, True): "hidden", (True, False): "out_of", (False, True): "into",
            (False, False): "vector"}[grows]


def attention_multiplier(config: TransformerConfig) -> float:
    """What attention scores are multiplied by, beside 1 / sqrt(`query_scalar` or head_dim).

    Scores become proportional to 1 / head_dim. If `query_scalar` is set and the same for all sizes,
    they become proportional to 1 / sqrt(head_dim) only.
    Without `base_head_dim`, the heads are taken to be as large as the base's.
    """
    if config.parametrization == "standard" or not config.base_head_dim:
        return 1.0
    return (config.base_head_dim / config.dims.head_dim) ** 0.5


def embedding_multiplier(config: TransformerConfig) -> float:
    """What embeddings are multiplied by: `scale_embeddings` may not make them grow with width."""
    return _width(config) ** -0.5 if config.scale_embeddings else 1.0


def residual_multiplier(config: TransformerConfig, num_layers: int) -> float:
    """What the output of each residual branch of a stack of this depth is multiplied by."""
    return 1 / _depth(config, num_layers)


def logit_multiplier(config: TransformerConfig) -> float:
    """What the logits are multiplied by."""
    # T5's division of the last states by sqrt(embed_dim) is a part of it.
    return _width(config) ** (-0.5 if getattr(config, "scale_output", False) else -1)


def scale_initial(config: TransformerConfig, params: Any, axes: Any) -> Any:
    """Scales the initial weights of a model, which were drawn as "standard" draws them.

    Adapters and projections of states are drawn by their own number of inputs and stay.

    Args:
      config: of the model.
      params: a tree of arrays.
      axes: the same tree with a tuple of axis names per parameter.
    """
    if config.parametrization == "standard":
        return params
    m, leaves = _width(config), []
    for (path, leaf), names in _with_axes(params, axes):
        scale = m ** TABLE[kind_of(path, names)].init
        if "adapter/" in path or path == "projection":
            scale = 1.0
        elif names[0] == "layers" and names[-1] in ("embed", "expert_embed"):
            # `nn.layers.residual_init` divides by the root of the depth.
            scale *= _depth(config, leaf.shape[0]) ** 0.5
        leaves.append(leaf if scale == 1.0 else leaf * np.float32(scale))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def optimizer_factors(config: TransformerConfig, optimizer: str, shapes: Any,
                      axes: Any) -> dict[str, Factors]:
    """What the rate, the decay and the epsilon of each parameter are multiplied by.

    Args:
      config: of the model.
      optimizer: its name.
      shapes: of the model's parameters.
      axes: their axis names.

    Returns:
      By path; empty if nothing changes.
    """
    if config.parametrization == "standard":
        return {}
    m, found = _width(config), {}
    for (path, leaf), names in _with_axes(shapes, axes):
        row = TABLE[kind_of(path, names)]
        rate = m ** (row.muon if optimizer == "muon" else row.rate)
        depth = _depth(config, leaf.shape[0]) if names[0] == "layers" else 1.0
        found[path] = Factors(rate, 1 / rate, m ** row.eps / depth)
    return found


def check_optimizer(config: TransformerConfig, optimizer: str) -> None:
    """Refuses an optimizer whose updates grow with the gradient.

    Raises:
      UserError: it is one, and the parametrization is not the standard one.
    """
    if config.parametrization != "standard" and optimizer == "sgd":
        raise UserError(f"adamw, muon, lion or adafactor with model.parametrization="
                        f"{config.parametrization}, whose rates are for updates of a fixed size",
                        optimizer, "change one of them", where="optimizer.name")


def _width(config: TransformerConfig) -> float:
    standard = config.parametrization == "standard"
    return 1.0 if standard else config.embed_dim / config.base_embed_dim


def _depth(config: TransformerConfig, num_layers: int) -> float:
    return (num_layers / config.base_num_layers if config.parametrization == "completep" else 1.0)


def _with_axes(tree: Any, axes: Any) -> Iterator[tuple[tuple[str, Any], tuple[str, ...]]]:
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    return zip(named_leaves(tree), names, strict=True)
