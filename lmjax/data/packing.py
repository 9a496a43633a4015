"""Packing: which pieces of which documents make up each row, as a plan from document lengths alone.

Lengths are in what the objective counts. For a decoder that is predictions: a stored document of n tokens
(BOS + text + EOS) makes n - 1 of them, and prediction i reads token i and targets token i + 1. A piece
(document, start, length) therefore covers the stored tokens [start, start + length], and two pieces of one
document share one token. Every plan puts everything that is counted of every document in exactly one row.

Shape legend: P pieces, N rows, L row length (seq_len).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rows = dict[str, np.ndarray]
# Arrays [B, T] of a decoder's batch. segment_ids: 1.. for the documents of a row, 0 on padding. positions: from 0 in
# each document. loss_mask: how much each target counts.
DECODER = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


@dataclass(frozen=True)
class Plan:
    """Rows as runs of pieces: row r holds pieces first_N[r] .. first_N[r + 1] - 1, side by side.

    document_P, start_P, length_P are int64; first_N has one entry more than there are rows.
    """

    document_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    first_N: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.first_N) - 1

    @property
    def predictions(self) -> int:
        return int(self.length_P.sum())

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For row numbers (int64 [n]): the piece numbers in order, and each one's place 0..n-1 in `rows`."""
        counts = self.first_N[rows + 1] - self.first_N[rows]
        place = np.repeat(np.arange(len(rows)), counts)
        return ramps(self.first_N[rows], counts), place


def ramps(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start, start + length) over all pairs, without a Python loop; int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def make_plan(method: str, lengths: np.ndarray, seq_len: int, cost: np.ndarray | None = None) -> Plan:
    """Packs documents of `lengths` (int64 [documents]) into rows of `seq_len` by `method`.

    cost: what a piece of n takes of a row, int64 [longest piece + 1], rising to at most seq_len; by default n.

    Raises:
      ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"data.packing: expected one of {sorted(METHODS)}, got {method!r}; use one of those")
    cost = np.arange(seq_len + 1) if cost is None else cost
    return METHODS[method](np.asarray(lengths, np.int64), seq_len, cost)


def cut(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts only what is longer than `longest`: (document, start, length) of each piece, in document order."""
    counts = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = ramps(np.zeros_like(counts), counts) * longest
    return document, start, np.minimum(lengths[document] - start, longest)


def best_fit(lengths: np.ndarray, seq_len: int, cost: np.ndarray) -> Plan:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row that still has room for it.

    Close to the fewest rows possible, and cuts no document unless it is longer than a row ("Fewer
    Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830). Pieces of one length, and
    rows with the same room, are moved together, so the cost grows with the number of distinct lengths.
    """
    document, start, length = cut(lengths, len(cost) - 1)
    taken = cost[length]
    order = np.argsort(-taken, kind="stable")
    row_sorted = np.empty(len(order), np.int64)
    counts = np.bincount(taken, minlength=seq_len + 1)
    room = _Room(seq_len)
    at = 0
    for size in np.flatnonzero(counts)[::-1]:
        at = room.place(int(size), int(counts[size]), row_sorted, at)
    row = np.empty_like(row_sorted)
    row[order] = row_sorted
    return _plan(document, start, length, row, order, room.rows)


class _Room:
    """Rows grouped by the room they have left, for `best_fit`."""

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.rows = 0
        self.left: dict[int, list[np.ndarray]] = {}  # room -> stacks of row numbers with that room
        self.has = np.zeros(seq_len + 1, bool)

    def place(self, size: int, count: int, out: np.ndarray, at: int) -> int:
        """Writes the rows of `count` pieces of `size` to out[at:], returns the next `at`."""
        while count:
            fit = np.flatnonzero(self.has[size:])
            room = int(fit[0]) + size if len(fit) else self.seq_len
            per_row = room // size  # the row just filled stays the best fit while another one goes in
            rows = self._take(room, -(-count // per_row)) if len(fit) else self._open(-(-count // per_row))
            used = min(count, len(rows) * per_row)
            out[at : at + used] = np.repeat(rows, per_row)[:used]
            last = used - (len(rows) - 1) * per_row  # the last row may take fewer
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


def concat(lengths: np.ndarray, seq_len: int, cost: np.ndarray) -> Plan:
    """All documents one after the other, cut at every row's end; only the last row has padding."""
    assert len(cost) == seq_len + 1, "a stream is cut by length: checked by DataConfig"
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.unique(np.concatenate([[0], ends, np.arange(0, total, seq_len), [total]]))
    begin, length = bounds[:-1], np.diff(bounds)
    document = np.searchsorted(ends, begin, side="right")
    start = begin - (ends - lengths)[document]
    return _plan(document, start, length, begin // seq_len, np.arange(len(begin)), -(-total // seq_len))


def none(lengths: np.ndarray, seq_len: int, cost: np.ndarray) -> Plan:
    """One piece a row: a document alone, or one longest piece of a longer one."""
    document, start, length = cut(lengths, len(cost) - 1)
    pieces = np.arange(len(length))
    return _plan(document, start, length, pieces, pieces, len(pieces))


Method = Callable[[np.ndarray, int, np.ndarray], Plan]
METHODS: dict[str, Method] = {"best_fit": best_fit, "concat": concat, "none": none}


def _plan(document, start, length, row, order, num_rows: int) -> Plan:
    """Groups pieces by row, keeping `order` within one."""
    order = order[np.argsort(row[order], kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))]).astype(np.int64)
    return Plan(document[order], start[order], length[order], first)


def segments(place_P: np.ndarray) -> np.ndarray:
    """Numbers the pieces of each row from 1; pieces of one row (of one place) are neighbours."""
    return np.arange(1, len(place_P) + 1) - np.searchsorted(place_P, place_P)


def starts(size_P: np.ndarray, place_P: np.ndarray, width: int) -> np.ndarray:
    """Where in [rows * width] each piece begins, when those of a row lie side by side."""
    before = np.cumsum(size_P) - size_P
    return place_P * width + before - before[np.searchsorted(place_P, place_P)]


def empty(fields: dict[str, int], rows: int) -> Rows:
    """`rows` rows of nothing but padding: [rows, length] of every field."""
    return {name: np.zeros((rows, length), dtype_of(name)) for name, length in fields.items()}


def empty_rows(rows: int, seq_len: int) -> Rows:
    """The same of a decoder's rows."""
    return empty(dict.fromkeys(DECODER, seq_len), rows)


def dtype_of(name: str) -> type[np.generic]:
    """Of an array of a batch: int32, but loss_mask float32."""
    return np.float32 if name == "loss_mask" else np.int32


def fill_rows(flat: np.ndarray, at_P: np.ndarray, length_P: np.ndarray, place_P: np.ndarray, rows: int,
              seq_len: int) -> Rows:
    """Rows from pieces: piece p reads flat[at : at + length + 1] into row place, behind the row's earlier ones.

    Args:
      flat: tokens, any unsigned integer dtype.
      at_P, length_P, place_P: int64; pieces of one row must be neighbours, in order.
    Returns:
      the row dict: [rows, L] for each of `DECODER`, with a segment for every piece and loss_mask 1 on it.
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
