"""Starts a run with more tokens than the model has that it starts from."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.tokenizers import Tokenizer
from lmjax.nn.module import Params

UNKNOWN = "\ufffd".encode()  # what SentencePiece writes for its unknown token
# The parameters that have a row per token.
TABLES = ("embedding/table", "head/table", "head_bias")


def extends(tokenizer: Tokenizer | None, old: Tokenizer | None) -> bool:
    """Whether `tokenizer` has all ids of `old` with the same bytes, and more ids after them."""
    if tokenizer is None or old is None or tokenizer.vocab_size <= old.vocab_size:
        return False
    special = all(getattr(tokenizer, name) == getattr(old, name)
                  for name in ("bos_id", "eos_id", "pad_id"))
    return special and _pieces(tokenizer, old.vocab_size) == _pieces(old, old.vocab_size)


def _pieces(tokenizer: Tokenizer, num: int) -> list[bytes]:
    """The bytes of the first `num` ids; of special tokens none."""
    text, lengths = tokenizer.surface(np.arange(num))
    ends = np.cumsum(lengths)
    pieces = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return [b"" if piece == UNKNOWN else piece for piece in pieces]


def with_mean_rows(leaves: dict[str, jax.Array], old: int, new: int, rows: int,
                   shardings: Params) -> dict[str, jax.Array]:
    """Gives tokens old to new - 1 the mean of the rows of the old tokens, in every table.

    Args:
      leaves: parameters by path; other parameters than tables stay as they are.
      old: the number of old tokens.
      new: the number of all tokens.
      rows: of the grown tables, at least `new`. Rows that no token has are the mean, too, unless
        the table had them before.
      shardings: of the grown tables, by path.
    """
    def grown(table: jax.Array) -> jax.Array:
        mean = jnp.mean(table[:old], axis=0, keepdims=True)
        padded = jnp.pad(table, [(0, rows - table.shape[0])] + [(0, 0)] * (table.ndim - 1))
        at = jnp.arange(rows).reshape(-1, *(1,) * (table.ndim - 1))
        is_new = ((at >= old) & (at < new)) | (at >= table.shape[0])
        return jnp.where(is_new, mean, padded)

    tables = {path: jax.jit(grown, out_shardings=shardings[path])(leaf)
              for path, leaf in leaves.items() if path in TABLES and path in shardings}
    return leaves | tables
