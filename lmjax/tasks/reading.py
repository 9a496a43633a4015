"""How a model reads one text or two: ids with those around them, cut to fit into a row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmjax.data.reading import Reader


class Read(NamedTuple):
    """A text, or a pair, as a model reads it."""

    ids: np.ndarray  # int32 [n]
    types: np.ndarray  # int32 [n]: the kind of segment of each token, 0 but in a second text
    cut: int  # tokens that did not fit


def read_text(reader: Reader, text: str, room: int, second: str = "") -> Read:
    """Reads a text, and a second one after it if there is one.

    Args:
      reader: of the model.
      text: the text.
      room: the most ids, those around the texts included.
      second: another text. Tokens that do not fit are cut from the end of the longer of the two.
    """
    parts = [reader.names.encode(text)] + ([reader.names.encode(second)] if second else [])
    around = len(reader.prefix) + len(reader.suffix) + (len(reader.middle) if second else 0)
    over = cut = max(sum(map(len, parts)) + around - room, 0)
    while over:
        longest = max(parts, key=len)
        others = [len(part) for part in parts if part is not longest]
        take = min(over, max(len(longest) - max(others, default=0), 1), len(longest))
        if not take:
            break
        del longest[len(longest) - take:]
        over -= take
    ids, types = [*reader.prefix, *parts[0]], []
    if second:
        ids += reader.middle
        types = [0] * len(ids) + [reader.second_type] * (len(parts[1]) + len(reader.suffix))
        ids += parts[1]
    ids = [*ids, *reader.suffix] or [reader.names.tokenizer.bos_id]
    return Read(np.array(ids, np.int32), np.array(types or [0] * len(ids), np.int32), cut)
