"""How a trained model reads texts as batches."""

from collections.abc import Sequence

import numpy as np

from lmjax.data.reading import Reader
from lmjax.data.rows import ENCODER, Rows, fill_rows
from lmjax.decoding.generate import Generator
from lmjax.models.model import Model
from lmjax.sharding import Layout


def generator_of(model: Model, layout: Layout, reader: Reader,
                 end_ids: Sequence[int] = ()) -> Generator:
    """Makes the generator of a model whose texts `reader` reads; `end_ids` end an answer, too."""
    names = reader.names
    # A decoder reads [MASK] and never writes it; an encoder-decoder writes sentinels.
    vocab_size = (names if model.config.family == "encdec" else names.tokenizer).vocab_size
    return Generator(model, layout, end_ids=[*reader.end_ids, *end_ids],
                     banned_ids=reader.banned_ids, vocab_size=vocab_size, start_id=reader.start_id)


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
