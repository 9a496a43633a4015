"""What callers pass in: texts, token ids, positions and settings, checked before anything is run.

XLA clamps an id or a position that is out of range, and Python reads a string as a list of letters.
Neither fails, so every entry point checks its arguments here.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from lmjax.config import scalar
from lmjax.errors import UserError
from lmjax.models.model import ModelConfig

NO_LIST = (str, bytes, bytearray, memoryview, Mapping, Set)  # iterable, but no list of things


def check_text(text: Any, where: str) -> str:
    """Returns a text.

    Raises:
      UserError: it is no string, or UTF-8 cannot express it.
    """
    if not isinstance(text, str):
        raise UserError("a text", _kind(text), "pass a str", where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("Unicode text", f"half of a surrogate pair at character {error.start}",
                        "read it with errors='replace', or repair its encoding", where) from None
    return str(text)


def check_texts(texts: Any, where: str) -> list[str]:
    """Returns a list of texts.

    Raises:
      UserError: it is one text or no list, or see `check_text`.
    """
    return [check_text(text, f"{where}[{i}]")
            for i, text in enumerate(_listed(texts, where, "texts", "text"))]


def check_ids(rows: Any, config: ModelConfig, where: str) -> list[list[int]]:
    """Returns rows of token ids.

    Args:
      rows: lists or arrays of ids, of any lengths.
      config: of the model that reads them.
      where: the argument's name in error messages.

    Raises:
      UserError: it is one row, or see `check_row`.
    """
    rows = list(_listed(rows, where, "rows of token ids", "ids"))
    if rows and isinstance(rows[0], (int, np.integer)):
        raise UserError("a list of rows of token ids", "one row", "write [ids]", where)
    return [check_row(row, config, f"{where}[{i}]").tolist() for i, row in enumerate(rows)]


def check_row(row: Any, config: ModelConfig, where: str) -> np.ndarray:
    """Returns one row of token ids, int32 [T]; the arguments are those of `check_ids`.

    Raises:
      UserError: the row is empty, or holds something else than ids of the model's vocabulary.
    """
    items = list(_listed(row, where, "token ids", "id"))
    if not items:
        raise UserError("at least one token id", "none", "begin with the tokenizer's bos_id", where)
    wrong = [i for i in items if isinstance(i, bool) or not isinstance(i, (int, np.integer))]
    if wrong:
        raise UserError("whole numbers as token ids", _kind(wrong[0]),
                        "pass one list of ids, as lm.tokenizer.encode makes them", where)
    size = config.vocab_size
    for i in (min(items), max(items)):
        if not 0 <= i < size:
            raise UserError(f"ids of 0 to {size - 1:,}", f"{i:,}", "encode with lm.tokenizer",
                            where)
    return np.array(items, np.int32)


def check_array(rows: Any, config: ModelConfig, where: str) -> np.ndarray:
    """Returns rows of one length as int32 [B, T]; the arguments are those of `check_ids`.

    Raises:
      UserError: there is no row, the rows differ in length, or see `check_ids`.
    """
    found = check_ids(rows, config, where)
    lengths = sorted({len(row) for row in found})
    if len(lengths) != 1:
        got = f"rows of {lengths[0]} to {lengths[-1]}" if lengths else "none"
        raise UserError("one or more rows of one length", got,
                        "pad them on the right, which changes nothing on its left", where)
    return np.array(found, np.int32)


def check_positions(config: ModelConfig, length: int, where: str, *, answer: int = 0) -> None:
    """Raises a `UserError` if a row is longer than the model's learned positions.

    Args:
      config: of the model.
      length: of the row.
      where: the argument's name in the message.
      answer: tokens that are generated after the row.
    """
    # An encoder-decoder reads the row with its encoder and begins its answer at position 0.
    total = max(length, answer) if config.family == "encdec" else length + answer
    if config.positions == "learned" and total > config.max_positions:
        what = "prompt and answer" if answer else "rows"
        raise UserError(f"{what} within max_positions={config.max_positions}",
                        f"{length} + {answer}" if answer else length,
                        "shorten one of them" if answer else "shorten them", where)


def check_scored(rows: Any, config: ModelConfig) -> list[tuple[list[int], int]]:
    """Returns rows as (token ids, how many of the last ones to score).

    Raises:
      UserError: the model is no decoder, a row is longer than its learned positions, or a row has
        fewer ids than are to be scored after its first; or see `check_ids`.
    """
    if config.family != "decoder":
        raise UserError("a decoder, which has likelihoods of texts", f"an {config.family}",
                        "use lm.embed or lm.model")
    pieces = check_ids([ids for ids, _ in rows], config, "rows")
    for i, (piece, (_, n)) in enumerate(zip(pieces, rows, strict=True)):
        check_positions(config, len(piece) - 1, f"rows[{i}]")
        if not 0 <= scalar(int, n, f"rows[{i}]") < len(piece):
            raise UserError(f"0 to {len(piece) - 1} ids to score, after the first", n,
                            "put an id before them, such as the tokenizer's bos_id", f"rows[{i}]")
    return [(piece, int(n)) for piece, (_, n) in zip(pieces, rows, strict=True)]


def check_numbers(options: Any) -> None:
    """Converts the int and float fields of a frozen dataclass to these types, in `__post_init__`.

    Raises:
      UserError: a value of another type, a NaN or an infinity; the message names the field.
    """
    for field in dataclasses.fields(options):
        if field.type in (int, float):
            value = scalar(field.type, getattr(options, field.name), field.name)
            object.__setattr__(options, field.name, value)


def _listed(value: Any, where: str, many: str, one: str) -> Iterable[Any]:
    """Returns the things in `value`: a list, an array, or anything else that has them in order."""
    if isinstance(value, NO_LIST) or not isinstance(value, Iterable) or _is_scalar(value):
        fix = f"write [{one}]" if isinstance(value, (str, bytes)) else "pass a list"
        raise UserError(f"a list of {many}", _kind(value), fix, where)
    # One copy to the host for an array on a device.
    return np.asarray(value) if hasattr(value, "shape") else value


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == ()


def _kind(value: Any) -> str:
    """A value in words: its type, and itself where that is short."""
    if isinstance(value, str):
        return "one text"
    name = type(value).__name__
    return f"{name} {value}" if isinstance(value, (int, float, np.generic)) else name
