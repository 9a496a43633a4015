"""Model FLOPs of training, counted from the parameters' shapes and axis names.

A matmul weight costs 6 FLOPs per token (2 in the forward pass, 4 in the backward pass). Beside
adapters it costs 4, since it has no gradient. Attention costs 12 * head_dim FLOPs per head, query
and key. So counts PaLM (arXiv:2204.02311, appendix B), with one difference: here only the keys
count that causality and the window leave visible.
"""

import math
from collections.abc import Iterator, Mapping

import jax

from lmjax.models.encdec import EncDecConfig
from lmjax.models.model import Model, ModelConfig
from lmjax.nn.adapters import NAME
from lmjax.tree import named_leaves

TABLES = {"vocab", "positions"}  # axes of parameters that are looked up, not multiplied with
MATRICES = {"embed", "expert_embed", "rank"}  # each of the other matrices has one of these axes


def flops_per_token(model: Model, seq_len: int, encoder_len: int = 0) -> float:
    """Model FLOPs of training on one token of a row of `seq_len` tokens.

    An encoder-decoder's tokens are the decoder's; each carries its share of the FLOPs of an
    encoder row of `encoder_len` tokens (0: seq_len).
    """
    c = model.config
    share = (encoder_len or seq_len) / seq_len  # encoder tokens per decoder token
    cost = 4.0 if model.adapter.kind else 6.0
    unembedding = cost * c.vocab_size * c.embed_dim
    weights = sum(((share if _reads_source(path) else 1.0) * _multiplied(shape, axes, c)
                   * (6.0 if NAME in path else cost) for path, shape, axes in _leaves(model)
                   if path[0] != "pooler"), start=unembedding)  # the loss does not read the pooler
    pairs = visible_keys(c, c.num_layers, seq_len, causal=c.family != "encoder")
    if isinstance(c, EncDecConfig):
        layers = c.num_encoder_layers or c.num_layers
        within = visible_keys(c, layers, int(share * seq_len), causal=False)
        pairs += share * (c.num_layers * seq_len + within)
    return weights + 12.0 * c.dims.num_heads * c.dims.head_dim * pairs


def flops_per_row(model: Model, lengths: Mapping[str, int]) -> float:
    """Model FLOPs of training on one row. lengths: of the row's arrays, by their names."""
    length = lengths["tokens"]
    return length * flops_per_token(model, length, lengths.get("encoder_tokens", 0))


def visible_keys(config: ModelConfig, num_layers: int, seq_len: int, *, causal: bool) -> float:
    """The keys that a query sees, averaged over the row's queries and summed over the layers."""
    kinds, pattern = config.kinds(num_layers)
    total = 0.0
    for i in range(num_layers):
        span = min(config.window(kinds[pattern[i % len(pattern)]]) or seq_len, seq_len)
        before = span * (1 - span / (2 * seq_len))  # less than span: the row begins somewhere
        total += before if causal else 2 * before
    return total


def embedding_parameters(model: Model) -> int:
    """The number of parameters in tables of tokens and of positions."""
    return sum(math.prod(shape) for _, shape, axes in _leaves(model) if TABLES & set(axes))


def _multiplied(shape: tuple[int, ...], axes: tuple[str, ...], config: ModelConfig) -> float:
    """How many weights of a parameter are multiplied with each token."""
    if TABLES & set(axes) or not MATRICES & set(axes):
        return 0.0
    # The router, which has no `mlp` axis, computes a token for all experts; each of the chosen
    # experts computes it, too.
    chosen = "experts" in axes and "mlp" in axes
    return math.prod(shape) * (config.moe.per_token / config.moe.experts if chosen else 1.0)


def _reads_source(path: list[str]) -> bool:
    """Whether the parameter is multiplied with an encoder-decoder's encoder tokens."""
    return path[0] == "encoder" or (
        "cross_attention" in path and ("key" in path or "value" in path))


def _leaves(model: Model) -> Iterator[tuple[list[str], tuple[int, ...], tuple[str, ...]]]:
    """(path, shape, axis names) of every parameter."""
    axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    for (name, leaf), names in zip(named_leaves(model.shapes), axes, strict=True):
        yield name.split("/"), leaf.shape, names
