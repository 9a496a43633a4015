"""How a trained model reads a text: as ids, with those before and after it, and as batches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.objectives import Objective
from lmjax.data.rows import ENCODER, START_ID, Rows, fill_rows
from lmjax.data.tokenizers import NamedIds, Tokenizer
from lmjax.models.model import Model


class Reader(NamedTuple):
    """How texts become ids: as in the model's training, or as the imported files say."""

    names: NamedIds  # the tokenizer, with names for the ids of an encoder-decoder's objective
    prefix: tuple[int, ...]  # ids before a text
    suffix: tuple[int, ...]  # ids after a text
    start_id: int  # the id with which an encoder-decoder's answer begins

    def ids(self, text: str, room: int | None = None, *, end: bool = True) -> list[int]:
        """The ids that the model reads for a text.

        A text without any ids, prefix and suffix included, becomes a single BOS token.

        Args:
          text: the text.
          room: limit of the text's own tokens; the rest is cut.
          end: whether the suffix follows.
        """
        suffix = self.suffix if end else ()
        ids = [*self.prefix, *self.names.encode(text)[:room], *suffix]
        return ids or [self.names.tokenizer.bos_id]


def make_reader(tokenizer: Tokenizer, family: str, data: DataConfig,
                imported: Mapping[str, Any] | None) -> Reader:
    """Makes the reader of a model.

    Args:
      tokenizer: the model's.
      family: of the model: decoder, encoder or encdec.
      data: the config of the data that it was trained on.
      imported: what a Hugging Face directory said of it (`HFModel.source`), if it is imported.
    """
    names, prefix, suffix = NamedIds(tokenizer), tokenizer.prefix, tokenizer.suffix
    if imported:
        told = [imported[part].get("decoder_start_token_id") for part in ("generation", "settings")]
        start_id = next((i for i in told if i is not None), tokenizer.pad_id)
        return Reader(names, prefix, suffix, start_id)
    if family != "encdec":
        return Reader(names, prefix, suffix, START_ID)
    objective = Objective(data.objective, seq_len=data.seq_len, vocab_size=tokenizer.vocab_size)
    return Reader(NamedIds(tokenizer, objective.extra), (), (tokenizer.eos_id,), START_ID)


def rows_of(model: Model, pieces: Sequence[Sequence[int]], rows: int, length: int,
            given: Sequence[int]) -> Rows:
    """Puts each piece into a row of its own.

    Args:
      model: reads the batch.
      pieces: ids. The last id of a piece is only a target.
      rows: number of rows; those without a piece are padding.
      length: tokens per row.
      given: per piece, how many of its first ids a prefix-LM reads in both directions.

    Returns:
      A batch of arrays [rows, length].
    """
    sizes = np.array([len(piece) for piece in pieces])
    batch = fill_rows(np.concatenate(pieces), np.cumsum(sizes) - sizes, sizes - 1,
                      np.arange(len(pieces)), rows, length)
    if model.prefix_lm:
        given_B = np.pad(np.asarray(given, np.int32), (0, rows - len(given)))
        batch["bidirectional"] = (batch["positions"] < given_B[:, None]).astype(np.int32)
    if model.config.family == "encdec":
        batch |= {name: batch[name.removeprefix("encoder_")] for name in ENCODER}
    return batch
