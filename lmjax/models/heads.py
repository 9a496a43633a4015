"""Heads: what a model that is fine-tuned for a task has in place of its unembedding.

Shape suffixes: B batch, T sequence, D embed_dim, C outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.nn.layers import ACTIVATIONS, Dense
from lmjax.nn.module import normal, param, zeros
from lmjax.nn.ops import dropout
from lmjax.sharding import constrain

KEY = 0x4EAD  # folded into the key of the layers
# kind -> the activation after a square matrix, both before the head's own matrix: of BERT, RoBERTa
# and T5; of DistilBERT; of ELECTRA
POOLERS = {"pooler": jnp.tanh, "pooler_relu": ACTIVATIONS["relu"],
           "pooler_gelu": ACTIVATIONS["gelu"]}
# linear: a matrix and a bias; plain: a matrix alone (decoders of transformers). transform: an
# encoder's MLM transform before (ModernBERT).
HEAD_KINDS = ("linear", "plain", *POOLERS, "transform")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The head of a task."""

    outputs: int = 0  # numbers per position, such as classes; 0: the model has its unembedding
    kind: str = "linear"  # one of HEAD_KINDS
    dropout: float = 0.0  # before the last matrix
    first_dropout: float = 0.0  # before the matrix of a pooler: RoBERTa has it, BERT does not

    def __post_init__(self) -> None:
        at_least(0, outputs=self.outputs, dropout=self.dropout, first_dropout=self.first_dropout)
        choice("kind", self.kind, HEAD_KINDS)


class Head(nnx.Module):
    """From hidden states to those that `table` and `bias` turn into the outputs."""

    def __init__(self, config: HeadConfig, width: int, *, init_std: float, rngs: nnx.Rngs):
        c, init = config, normal(init_std)
        self.dropout, self.first_dropout = c.dropout, c.first_dropout
        self.dense = (Dense((width,), (width,), ("embed", "mlp"), use_bias=True, init=init,
                            rngs=rngs) if c.kind in POOLERS else None)
        self.activation = POOLERS.get(c.kind)
        self.table = param(rngs, init, (c.outputs, width), ("outputs", "embed"))
        self.bias = None if c.kind == "plain" else param(rngs, zeros, (c.outputs,), ("norm",))

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The states [B, T, D] that the table multiplies.

        key: turns dropout on; in a pipeline [M] keys, of which the first serves the head.
        """
        first, second = None, None
        if key is not None:  # other keys than those of the layers
            first, second = jax.random.split(jax.random.fold_in(key.reshape(-1)[0], KEY))
        if self.dense is not None and self.activation is not None:
            x_BTD = self.dense(dropout(x_BTD, self.first_dropout, first))
            x_BTD = self.activation(constrain(x_BTD, "batch", "seq", "act_embed"))
        return dropout(x_BTD, self.dropout, second)

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The table (C, D), and the bias (C,) if there is one."""
        return self.table[...], None if self.bias is None else self.bias[...]
