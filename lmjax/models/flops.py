"""Model FLOPs of training, counted from the parameters' shapes and axis names.

A matmul weight costs 6 FLOPs per token: 2 in the forward pass, 2 for its gradient and 2 for that of
its input. A frozen weight costs 4, and 2 if nothing that is trained lies before it. Attention costs
12 * head_dim FLOPs per head, query and key, and 4 before all that is trained. So counts PaLM
(arXiv:2204.02311, appendix B), with one difference: here only the keys count that causality and the
window leave visible.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import jax

from lmjax.models.encdec import EncDecConfig
from lmjax.models.model import Model, ModelConfig, is_of_base
from lmjax.tree import named_leaves

TABLES = {"vocab", "positions"}  # axes of parameters that are looked up, not multiplied with
MATRICES = {"embed", "expert_embed", "rank"}  # each of the other matrices has one of these axes
# The parts of a model in the order in which a token passes through them; END: those after them.
PLACES = {"embedding": 0, "positions": 0, "token_types": 0, "embedding_norm": 0, "widening": 0,
          "encoder": 1, "relative_bias": 1, "dense_layers": 1, "layers": 1, "decoder": 2}
END = 3
Frozen = Callable[[str], bool]  # of a parameter's path


def flops_per_token(model: Model, seq_len: int, encoder_len: int = 0,
                    frozen: Frozen | None = None, scores: bool = True) -> float:
    """Model FLOPs of training on one token of a row of `seq_len` tokens.

    An encoder-decoder's tokens are the decoder's; each carries its share of the FLOPs of an
    encoder row of `encoder_len` tokens (0: seq_len).

    Args:
      frozen: whether the parameter of a path is not trained; None: beside adapters, those of the
        base.
      scores: whether the loss scores the vocabulary.
    """
    c = model.config
    share = (encoder_len or seq_len) / seq_len  # encoder tokens per decoder token
    frozen = frozen or (is_of_base if model.adapter.kind else lambda path: False)
    leaves = list(_leaves(model))
    first = min((_place(path) for path, _, _ in leaves if not frozen(path)), default=END)

    def cost(path: str, place: int) -> float:
        return 6.0 if not frozen(path) else 4.0 if first <= place else 2.0

    weights = sum((share if _reads_source(path) else 1.0) * _multiplied(shape, axes, c)
                  * cost(path, _place(path)) for path, shape, axes in leaves
                  if not path.startswith("pooler"))  # the loss does not read the pooler
    if scores and not c.head.outputs:
        weights += cost("embedding/table" if c.tie_embeddings else "head/table",
                        END) * c.vocab_size * (getattr(c, "table_dim", 0) or c.embed_dim)
    pairs = visible_keys(c, c.num_layers, seq_len, causal=c.family != "encoder")
    spent = pairs * (12.0 if first <= _place("layers") else 4.0)
    if isinstance(c, EncDecConfig):
        layers = c.num_encoder_layers or c.num_layers
        within = visible_keys(c, layers, int(share * seq_len), causal=False)
        spent = (pairs + share * c.num_layers * seq_len) * (
            12.0 if first <= _place("decoder") else 4.0)
        spent += share * within * (12.0 if first <= _place("encoder") else 4.0)
    latent, head_dim = c.latent, float(c.dims.head_dim)
    if latent.kv_rank:  # half of the work is with queries and keys, half with values
        head_dim = (latent.key_dim + latent.value_dim) / 2
    return weights + spent * c.dims.num_heads * head_dim


def flops_per_row(model: Model, lengths: Mapping[str, int], frozen: Frozen | None = None) -> float:
    """Model FLOPs of training on one row of a batch, both texts of which count if it has two.

    Args:
      lengths: of the row's arrays, by their names.
      frozen: as for `flops_per_token`.
    """
    length = lengths["tokens"]
    texts = sum(name.endswith("tokens") and name != "encoder_tokens" for name in lengths)
    return texts * length * flops_per_token(
        model, length, lengths.get("encoder_tokens", 0), frozen,
        scores="targets" in lengths or "encoder_tokens" in lengths)


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
    shared = getattr(config, "shared_layers", False) and "layers" in axes
    times = config.num_layers if shared else 1
    return math.prod(shape) * times * (config.moe.per_token / config.moe.experts if chosen else 1.0)


def _place(path: str) -> int:
    """Where a parameter lies between the tokens, 0, and the loss, END."""
    return PLACES.get(path.partition("/")[0], END)


def _reads_source(path: str) -> bool:
    """Whether the parameter is multiplied with an encoder-decoder's encoder tokens."""
    parts = path.split("/")
    return parts[0] == "encoder" or (
        "cross_attention" in parts and ("key" in parts or "value" in parts))


def _leaves(model: Model) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """(path, shape, axis names) of every parameter."""
    axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    for (name, leaf), names in zip(named_leaves(model.shapes), axes, strict=True):
        yield name, leaf.shape, names
