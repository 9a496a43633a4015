"""Packing: which pieces of which documents make up each row, planned from document lengths alone.

The objective says what a length counts. For a decoder, lengths count predictions: a stored document
of n tokens (BOS + text + EOS) makes n - 1 predictions, and prediction i reads token i and targets
token i + 1. So a piece (document, start, length) covers the stored tokens start to start + length,
and two neighbouring pieces of a document share one token. Every plan puts everything that is
counted into exactly one row.

Shape legend: P pieces, N rows, L row length (seq_len).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmjax.data.rows import ramps
from lmjax.errors import UserError


@dataclass(frozen=True)
class PackingPlan:
    """The pieces of every row: row r holds pieces first_N[r] to first_N[r + 1] - 1."""

    document_P: np.ndarray  # the document of each piece, int64
    start_P: np.ndarray     # where the piece begins in its document, int64
    length_P: np.ndarray    # its length, int64
    first_N: np.ndarray     # the first piece of each row, and one more entry: the number of pieces

    @property
    def num_rows(self) -> int:
        return len(self.first_N) - 1

    @property
    def predictions(self) -> int:
        """Sum of all lengths."""
        return int(self.length_P.sum())

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of some rows, in order, and the index in `rows` of each piece's row; int64."""
        counts = self.first_N[rows + 1] - self.first_N[rows]
        place = np.repeat(np.arange(len(rows)), counts)
        return ramps(self.first_N[rows], counts), place


def make_plan(method: str, lengths: np.ndarray, seq_len: int,
              cost: np.ndarray | None = None) -> PackingPlan:
    """Packs documents into rows.

    Args:
      method: a key of `METHODS`.
      lengths: of the documents, int64.
      seq_len: length of a row.
      cost: room that a piece of n takes in a row, int64 [longest piece + 1], rising to at most
        seq_len; by default n.
    Raises:
      UserError: the method is unknown.
    """
    if method not in METHODS:
        raise UserError(f"one of {sorted(METHODS)}", repr(method), "use one of those",
                        where="data.packing")
    cost = np.arange(seq_len + 1) if cost is None else cost
    return METHODS[method](np.asarray(lengths, np.int64), seq_len, cost)


def cut(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents longer than `longest`: (document, start, length) of all pieces, in order."""
    counts = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = ramps(np.zeros_like(counts), counts) * longest
    return document, start, np.minimum(lengths[document] - start, longest)


def best_fit(lengths: np.ndarray, seq_len: int, cost: np.ndarray) -> PackingPlan:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row that has room for it.

    The number of rows is close to the least possible, and only documents longer than a row are cut
    ("Fewer Truncations Improve Language Modeling", arXiv:2404.10830). Pieces of one length, and
    rows with the same room, are handled together, so the time grows with the number of distinct
    lengths.
    """
    document, start, length = cut(lengths, len(cost) - 1)
    taken = cost[length]
    order = np.argsort(-taken, kind="stable")
    row_sorted = np.empty(len(order), np.int64)
    counts = np.bincount(taken, minlength=seq_len + 1)
    open_rows = _OpenRows(seq_len)
    at = 0
    for size in np.flatnonzero(counts)[::-1]:
        at = open_rows.place(int(size), int(counts[size]), row_sorted, at)
    row = np.empty_like(row_sorted)
    row[order] = row_sorted
    return _group(document, start, length, row, order, open_rows.rows)


class _OpenRows:
    """Rows grouped by the room that is left in them, for `best_fit`."""

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.rows = 0
        self.left: dict[int, list[np.ndarray]] = {}  # room -> stacks of row numbers with that room
        self.has = np.zeros(seq_len + 1, bool)

    def place(self, size: int, count: int, out: np.ndarray, at: int) -> int:
        """Writes the rows of `count` pieces of `size` to out[at:] and returns the next `at`."""
        while count:
            fit = np.flatnonzero(self.has[size:])
            room = int(fit[0]) + size if len(fit) else self.seq_len
            per_row = room // size  # a row just filled stays the best fit while another piece fits
            needed = -(-count // per_row)
            rows = self._take(room, needed) if len(fit) else self._open(needed)
            used = min(count, len(rows) * per_row)
            out[at : at + used] = np.repeat(rows, per_row)[:used]
            last = used - (len(rows) - 1) * per_row  # pieces of the last row, which may be fewer
            self._put(room - per_row * size, rows[:-1] if last < per_row else rows)
            if last < per_row:
                self._put(room - last * size, rows[-1:])
            at, count = at + used, count - used
        return at

    def _open(self, number: int) -> np.ndarray:
        self.rows += number
        return np.arange(self.rows - number, self.rows)

    def _take(self, room: int, number: int) -> np.ndarray:
        stack, taken = self.left[room], []
        while stack and number:
            rows = stack.pop()
            if len(rows) > number:
                stack.append(rows[number:])
                rows = rows[:number]
            number -= len(rows)
            taken.append(rows)
        self.has[room] = bool(stack)
        return np.concatenate(taken)

    def _put(self, room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            self.left.setdefault(room, []).append(rows)
            self.has[room] = True


def concat(lengths: np.ndarray, seq_len: int, cost: np.ndarray) -> PackingPlan:
    """Joins all documents and cuts at the end of every row; only the last row has padding."""
    assert len(cost) == seq_len + 1, "DataConfig allows concat only where a piece of n costs n"
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.unique(np.concatenate([[0], ends, np.arange(0, total, seq_len), [total]]))
    begin, length = bounds[:-1], np.diff(bounds)
    document = np.searchsorted(ends, begin, side="right")
    start = begin - (ends - lengths)[document]
    return _group(document, start, length, begin // seq_len, np.arange(len(begin)),
                  -(-total // seq_len))


def one_per_row(lengths: np.ndarray, seq_len: int, cost: np.ndarray) -> PackingPlan:
    """One piece per row: a whole document, or one longest piece of a longer document."""
    document, start, length = cut(lengths, len(cost) - 1)
    pieces = np.arange(len(length))
    return _group(document, start, length, pieces, pieces, len(pieces))


PackingMethod = Callable[[np.ndarray, int, np.ndarray], PackingPlan]
METHODS: dict[str, PackingMethod] = {"best_fit": best_fit, "concat": concat, "none": one_per_row}


def _group(document: np.ndarray, start: np.ndarray, length: np.ndarray, row: np.ndarray,
           order: np.ndarray, num_rows: int) -> PackingPlan:
    """Groups pieces by row; within a row they keep `order`."""
    order = order[np.argsort(row[order], kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))]).astype(np.int64)
    return PackingPlan(document[order], start[order], length[order], first)
