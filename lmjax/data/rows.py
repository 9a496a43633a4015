"""The arrays of a batch, and how pieces of documents fill their rows.

Shape legend: B rows of a batch, P pieces, T tokens in all pieces, L row length.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

Rows = dict[str, np.ndarray]  # arrays [B, L] by name
# The arrays of a decoder's batch. segment_ids number the documents of a row from 1, 0 is padding;
# positions count from 0 in each document; loss_mask is the weight of each target.
DECODER = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
# The arrays that an encoder-decoder's batch has as well.
ENCODER = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")
START_ID = 0  # the first input of an encoder-decoder's decoder: the padding id, as in T5


class Pieces(NamedTuple):
    """Runs of stored tokens and their rows; the pieces of a row are neighbours, in order."""

    flat: np.ndarray      # token ids, any integer dtype
    at_P: np.ndarray      # where each piece begins in `flat`, int64
    length_P: np.ndarray  # its length, int64
    place_P: np.ndarray   # its row in the batch, int64
    key_P: np.ndarray     # the key of its random decisions, uint64


class Draw(enum.IntEnum):
    """The random decisions about a piece; as counters of `hashing.fold` they are independent.

    The numbers decide what existing runs train on: they never change.
    """

    PREFIX = 0        # length of the prefix
    HIDE = 1          # whether a token is predicted
    HOW = 2           # what stands in its place
    DENOISER = 3      # which denoiser treats the piece
    KEPT_SPANS = 4    # lengths of the spans that stay
    HIDDEN_SPANS = 5  # lengths of the spans that are hidden
    AUGMENTED = 6     # whether the piece gets mistakes
    EDIT = 7          # which mistake a token gets
    RANDOM_TOKEN = 8  # the token of a replacement or an insertion


def ramps(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """arange(start, start + length) of all pairs, concatenated; int64, without a Python loop."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def segments(place_P: np.ndarray) -> np.ndarray:
    """Numbers the pieces of each row from 1; int64 [P]. Pieces of one row must be neighbours."""
    return np.arange(1, len(place_P) + 1) - np.searchsorted(place_P, place_P)


def starts(size_P: np.ndarray, place_P: np.ndarray, width: int) -> np.ndarray:
    """Where each piece begins in the flattened rows [B * width], laid side by side; int64 [P]."""
    before = np.cumsum(size_P) - size_P
    return place_P * width + before - before[np.searchsorted(place_P, place_P)]


def dtype_of(name: str) -> type[np.generic]:
    """The dtype of an array of a batch: float32 for loss masks and values, else int32."""
    return np.float32 if name.endswith(("loss_mask", "values")) else np.int32


def empty(fields: dict[str, int], rows: int) -> Rows:
    """Rows that are all padding: zeros [rows, length] for each (name, length) of `fields`."""
    return {name: np.zeros((rows, length), dtype_of(name)) for name, length in fields.items()}


def empty_rows(rows: int, seq_len: int) -> Rows:
    """Rows of a decoder that are all padding."""
    return empty(dict.fromkeys(DECODER, seq_len), rows)


def fill_rows(flat: np.ndarray, at_P: np.ndarray, length_P: np.ndarray, place_P: np.ndarray,
              rows: int, seq_len: int) -> Rows:
    """Rows of a decoder: a piece reads flat[at : at + length + 1] and predicts all but the first.

    Args:
      flat, at_P, length_P, place_P: as in `Pieces`; a piece's length counts predictions.
      rows: number of rows.
      seq_len: length of a row.
    Returns:
      [rows, seq_len] for each name of `DECODER`; each piece is a segment, with loss_mask 1.
    """
    out = empty_rows(rows, seq_len)
    within = ramps(np.zeros_like(length_P), length_P)
    source = within + np.repeat(at_P, length_P)
    target = within + np.repeat(starts(length_P, place_P, seq_len), length_P)
    out["tokens"].reshape(-1)[target] = flat[source]
    out["targets"].reshape(-1)[target] = flat[source + 1]
    out["segment_ids"].reshape(-1)[target] = np.repeat(segments(place_P), length_P)
    out["positions"].reshape(-1)[target] = within
    out["loss_mask"].reshape(-1)[target] = 1.0
    return out
