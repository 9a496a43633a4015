"""A smaller model out of a larger one: without the layers, heads and channels that matter least.

Shape suffixes: L layers, I inputs, D embed_dim, N parts of a layer, S inputs of a part.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.compression.layer_inputs import grams, influences
from lmjax.config import plain
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.models.config import is_local
from lmjax.models.model import ModelConfig
from lmjax.training.program import placed
from lmjax.tree import named_leaves

BLOCK = "layers/block/"  # in the paths of the parameters of layers
# The parameters that have an entry per query head, key head and channel, each with the dimension
# of these entries after that of layers.
QUERIES = {"attention/query/kernel": 1, "attention/query/bias": 0, "attention/sinks": 0,
           "attention/out/kernel": 0}
KEYS = {f"attention/{name}/{leaf}": dim for name in ("key", "value")
        for leaf, dim in (("kernel", 1), ("bias", 0))}
CHANNELS = {"mlp/gate/kernel": 1, "mlp/gate/bias": 0, "mlp/up/kernel": 1, "mlp/up/bias": 0,
            "mlp/down/kernel": 0}
Cuts = dict[str, tuple[int, np.ndarray]]  # path within a block -> (dimension, entries kept [L, N])


def without_parts(lm: LM, *, layers: int = 0, heads: float = 0.0, mlp: float = 0.0,
                  texts: Sequence[str], log: Callable[[str], None] = print) -> LM:
    """Removes whole layers, groups of heads and channels, and returns the smaller model.

    The layers that turn the residual stream least go first (`influences`). Of the parts of a layer,
    those go first whose outputs on the texts, as they are added up, have the least squared norm.

    Args:
      layers: how many to remove.
      heads: the share of the key heads of every layer, each of which goes with its query heads.
      mlp: the share of the channels of every MLP.
      texts: what the model reads.

    Raises:
      UserError: there are no texts, the model has not so much to remove, all layers share a bias
        per head, or its MLPs are experts.
    """
    old = lm.model.config
    _check(old, layers, heads, mlp, bool(texts))
    kept, cuts = np.arange(old.num_layers), Cuts()
    sizes: dict[str, Any] = {}
    if layers:
        kept = _kept_layers(old, influences(lm, texts), layers, log)
        sizes |= {"num_layers": len(kept)} | _pattern(old, kept)
    if heads or mlp:
        seen = grams(lm, texts, log)
        leaves = dict(named_leaves(lm.params))
        dims = old.dims
        if heads:
            each = dims.num_heads // dims.num_kv_heads
            path = f"{BLOCK}attention/out/kernel"
            energies = _energies(leaves[path], seen[path], dims.num_kv_heads)
            groups = _kept_parts(energies[kept], heads, "heads", log)
            queries = (groups[..., None] * each + np.arange(each)).reshape(len(groups), -1)
            cuts |= {name: (dim, queries) for name, dim in QUERIES.items()}
            cuts |= {name: (dim, groups) for name, dim in KEYS.items()}
            sizes |= {"num_heads": queries.shape[1], "head_dim": dims.head_dim}
            sizes |= {"num_kv_heads": groups.shape[1]} if old.num_kv_heads else {}
        if mlp:
            path = f"{BLOCK}mlp/down/kernel"
            channels = _kept_parts(_energies(leaves[path], seen[path], old.mlp_dim)[kept], mlp,
                                   "mlp", log)
            cuts |= {name: (dim, channels) for name, dim in CHANNELS.items()}
            sizes["mlp_dim"] = channels.shape[1]
    recipe = dataclasses.replace(lm.recipe, model=dataclasses.replace(old, **sizes))
    model, layout = placed(recipe)
    params = jax.device_put(_cut(lm.params, kept, cuts), layout.tree(model.axes, model.shapes))
    about = lm.about | {"recipe": plain(recipe)}
    return LM(model, params, layout, lm.tokenizer, recipe, about, lm.source)


def _check(config: ModelConfig, layers: int, heads: float, mlp: float, texts: bool) -> None:
    """Refuses what cannot be removed, before anything is measured."""
    if config.family == "encdec":
        raise UserError("a decoder or an encoder", "an encoder-decoder", "prune its weights "
                        "instead: weights=0.5", where="prune")
    if config.first_dense or (heads and config.latent.kv_rank):
        raise UserError("layers that are all alike, and heads with keys of their own",
                        f"moe.first_dense={config.first_dense}, latent.kv_rank="
                        f"{config.latent.kv_rank}", "prune its weights instead: weights=0.5",
                        where="prune")
    if not texts:
        raise UserError("texts to measure layers, heads and channels on", "none",
                        "add texts like those that the model reads (--texts FILE ...)", "prune")
    if getattr(config, "shared_layers", False):
        raise UserError("a model whose layers have parameters of their own", "shared_layers=true",
                        "prune its weights instead: weights=0.5", where="prune")
    if layers >= config.num_layers:
        raise UserError(f"fewer than the {config.num_layers} layers", layers, "lower it",
                        where="prune layers")
    if heads and config.positions == "relative":
        raise UserError("a model whose layers share nothing per head", "positions=relative",
                        "leave heads out", where="prune heads")
    if heads and config.qk_norm and config.qk_norm_over != "head":
        raise UserError("norms of queries and keys that all heads share",
                        f"qk_norm_over={config.qk_norm_over}", "leave heads out",
                        where="prune heads")
    if mlp and config.moe.experts:
        raise UserError("a model without experts", f"{config.moe.experts} experts", "leave mlp out",
                        where="prune mlp")
    for name, share, count in (("heads", heads, config.dims.num_kv_heads),
                               ("mlp", mlp, config.mlp_dim)):
        if share and not 1 <= round(share * count) < count:
            raise UserError(f"a share that removes some, not all, of the {count} "
                            + ("key heads" if name == "heads" else "channels"), share, "change it",
                            where=f"prune {name}")


def _kept_layers(config: ModelConfig, scores: np.ndarray, count: int,
                 log: Callable[[str], None]) -> np.ndarray:
    if config.embedding_norm == "first":  # the first layer also norms the embeddings
        scores = np.concatenate([[np.inf], scores[1:]])
    gone = np.sort(np.argsort(scores, kind="stable")[:count])
    kept = np.delete(np.arange(len(scores)), gone)
    log(f"layers: {', '.join(str(i) for i in gone)} of 0 to {len(scores) - 1} removed, which turn "
        f"the residual stream by {', '.join(f'{scores[i]:.3f}' for i in gone)} (1 - cosine); "
        f"the others by {scores[kept].min():.3f} or more")
    return kept


def _pattern(config: ModelConfig, kept: np.ndarray) -> dict[str, Any]:
    """The fields of the config that give each kept layer its kind."""
    if not config.layer_pattern:
        return {}
    names, pattern = config.kinds(config.num_layers)
    kinds = [names[pattern[i % len(pattern)]] for i in kept]
    period = next(n for n in range(1, len(kinds) + 1)
                  if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return {"layer_pattern": () if set(kinds) == {"global"} else tuple(kinds[:period]),
            "sliding_window": config.sliding_window if any(map(is_local, kinds)) else 0}


def _energies(kernel: jax.Array, grams_LII: jax.Array, count: int) -> np.ndarray:
    """The sums over the texts of the squared norms of what each part adds, float32 [L, N].

    kernel: [L, *inputs, D], whose inputs are those of the parts, one part after another.
    """
    w_LNSD = kernel.reshape(len(kernel), count, -1, kernel.shape[-1])
    size = w_LNSD.shape[2]

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        w_NSD, gram_II = layer
        parts = jnp.arange(count)
        gram_NSS = gram_II.reshape(count, size, count, size)[parts, :, parts]
        return jnp.einsum("NSD,NSR,NRD->N", w_NSD, gram_NSS, w_NSD)

    return np.asarray(jax.lax.map(of_layer, (w_LNSD, grams_LII)))


def _kept_parts(energies_LN: np.ndarray, share: float, name: str,
                log: Callable[[str], None]) -> np.ndarray:
    """The parts of each layer that stay, int [L, fewer], in their order."""
    total = energies_LN.shape[1]
    count = round(share * total)
    order = np.argsort(energies_LN, axis=1, kind="stable")
    lost_L = np.take_along_axis(energies_LN, order[:, :count], 1).sum(1)
    lost = np.mean(lost_L / np.maximum(energies_LN.sum(1), 1e-30))
    what = "key heads, each with its query heads," if name == "heads" else "channels"
    log(f"{name}: {count:,} of {total:,} {what} removed in every layer, with {lost:.1%} of the "
        "squared norms there")
    return np.sort(order[:, count:], axis=1)


def _cut(params: Any, kept: np.ndarray, cuts: Cuts) -> Any:
    def cut(path: str, leaf: jax.Array) -> jax.Array:
        if not path.startswith(BLOCK):
            return leaf
        leaf = leaf[kept]
        if path.removeprefix(BLOCK) not in cuts:
            return leaf
        dim, entries = cuts[path.removeprefix(BLOCK)]
        return jnp.stack([w.take(i, axis=dim) for w, i in zip(leaf, entries, strict=True)])

    return jax.tree.unflatten(jax.tree.structure(params),
                              [cut(*pair) for pair in named_leaves(params)])
