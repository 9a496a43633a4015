"""The order of training rows: a pure function of (seed, sources, row number), never stored.

Row g lies in block g // BLOCK. Each source has an exact number of rows in each block, by its
weight, and a keyed permutation of the block places them. That gives (source, running index in the
source). The running index gives (epoch, place in the epoch), and a permutation keyed by (seed,
source, epoch) turns the place into a packed row. So the data state of a run is the number of rows
that it has consumed, any row can be found again, and the order does not depend on steps, batch
sizes, devices or processes.

The mixture may change at any row. The blocks of each stage begin at the stage's first row; the
running index of a source continues through all stages, so the epochs do not depend on the stages.

Shape legend: U blocks, B rows of a block, S sources, K stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.hashing import fold, key_of, permute

BLOCK = 256    # rows over which sources are mixed evenly; a power of two
PERIOD = 1024  # blocks after which the counts repeat: weights are exact to 1 / (BLOCK * PERIOD)


class BlockMixture:
    """Which source each row belongs to, in blocks with exact counts.

    Args:
      weights: share of rows of each source, of any positive scale; 0 leaves a source out.
      seed: of the order within blocks.
    """

    def __init__(self, *, weights: Sequence[float], seed: int):
        self.num_sources, self.seed = len(weights), seed
        self.cumulative = block_counts(np.asarray(weights, np.float64))

    def running(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row's source, and how many rows of that source came before; int64 [n] each."""
        g = np.asarray(g, np.int64)
        if self.num_sources == 1:
            return np.zeros_like(g), g
        block, place = np.divmod(g, BLOCK)
        blocks, which = np.unique(block, return_inverse=True)
        before_US, shape = self._before(blocks), (len(blocks), BLOCK)
        key_U = fold(key_of("block", self.seed), blocks)
        place_UB = np.broadcast_to(np.arange(BLOCK), shape)
        mixed_UB = permute(place_UB, BLOCK, np.broadcast_to(key_U[:, None], shape))
        ends_US = np.cumsum(self._before(blocks + 1) - before_US, axis=1)
        source_UB = np.zeros(shape, np.int64)
        for s in range(self.num_sources):
            source_UB += mixed_UB >= ends_US[:, s, None]
        rank_UB = np.zeros(shape, np.int64)  # earlier rows of the same source in the block
        for s in range(self.num_sources):
            mine_UB = source_UB == s
            rank_UB += mine_UB * (np.cumsum(mine_UB, axis=1) - 1)
        source = source_UB[which, place]
        return source, before_US[which, source] + rank_UB[which, place]

    def seen(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows each source has; int64 [S]."""
        block, rest = divmod(rows, BLOCK)
        tail, _ = self.running(np.arange(block * BLOCK, block * BLOCK + rest))
        return self._before(np.array([block]))[0] + np.bincount(tail, minlength=self.num_sources)

    def _before(self, block: np.ndarray) -> np.ndarray:
        """Rows of each source before each block, int64 [U, S]."""
        period, rest = np.divmod(block, PERIOD)
        return period[:, None] * self.cumulative[-1] + self.cumulative[rest]


class StagedMixture:
    """Which packed row of which source each row of a run is.

    Args:
      names: one per source; they are part of the keys, so sources are shuffled independently.
      sizes: packed rows of each source in an epoch.
      stages: (first row, weights) of every stretch with one mixture, ascending; the first begins at
        row 0.
      seed: of all permutations.
    """

    def __init__(self, *, names: Sequence[str], sizes: Sequence[int],
                 stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        self.names, self.sizes, self.seed = tuple(names), tuple(sizes), seed
        self.starts = np.array([row for row, _ in stages], np.int64)
        self.mixtures = [BlockMixture(weights=weights, seed=seed) for _, weights in stages]
        # Rows of each source in earlier stages.
        self.before_KS = np.zeros((len(stages), len(names)), np.int64)
        for k in range(1, len(stages)):
            self.before_KS[k] = self.before_KS[k - 1] + self.mixtures[k - 1].seen(
                int(self.starts[k] - self.starts[k - 1]))

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, packed row of the source) of each row number of `g`; int64 [n] each."""
        source, index = self._running(np.asarray(g, np.int64))
        epoch, row = np.empty_like(index), np.empty_like(index)
        for s in np.unique(source):
            mine, size = source == s, self.sizes[s]
            epoch[mine], place = np.divmod(index[mine], size)
            row[mine] = permute(place, size,
                                fold(key_of("epoch", self.seed, self.names[s]), epoch[mine]))
        return source, epoch, row

    def seen(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows each source has; int64 [S]."""
        k = max(int(np.searchsorted(self.starts, rows, side="right")) - 1, 0)
        return self.before_KS[k] + self.mixtures[k].seen(rows - int(self.starts[k]))

    def _running(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row's source, and how many rows of that source came before; int64 [n] each."""
        source, index = np.empty_like(g), np.empty_like(g)
        stage = np.searchsorted(self.starts, g, side="right") - 1
        for k in np.unique(stage):
            mine = stage == k
            source[mine], index[mine] = self.mixtures[k].running(g[mine] - self.starts[k])
            index[mine] += self.before_KS[k][source[mine]]
        return source, index


class BatchSize(NamedTuple):
    """The batch size from some step of a run on, and the row from which it takes rows."""

    step: int  # steps before it
    row: int   # the first row; rows that are left out lie before it
    size: int  # rows per step


class Steps:
    """Which rows each step of a run trains on. Each step takes the next `batch size` rows.

    Rows may be left out; see `without`.

    Args:
      changes: the batch sizes of the run, ascending; the first begins at step 0 and row 0.
    """

    def __init__(self, changes: Sequence[Sequence[int]]):
        self.changes = tuple(BatchSize(*change) for change in changes)

    def rows(self, step: int) -> int:
        """The first row of step `step` + 1; all rows before it were trained on or left out."""
        change = self._change(step)
        return change.row + (step - change.step) * change.size

    def of(self, step: int) -> tuple[int, int]:
        """The first row of step `step`, which counts from 1, and the row after its last one."""
        first = self.rows(step - 1)
        return first, first + self._change(step - 1).size

    def resumed(self, step: int, size: int) -> Steps:
        """The same up to `step`, then `size` rows per step; what is left out stays left out.

        If that does not begin where a step ends now, up to `size` - 1 rows more are left out.
        """
        if {self._change(step).size, *(c.size for c in self.changes if c.step > step)} == {size}:
            return self
        return self._changed(BatchSize(step, self.rows(step), size))

    def without(self, step: int, row: int) -> Steps:
        """The same up to `step`; the next step begins at `row`, and the rows before are left out.

        Rows that later steps leave out stay left out.
        """
        return self._changed(BatchSize(step, row, self._change(step).size))

    def step_of(self, row: int) -> int:
        """How many steps come before the one that takes `row`, which is not left out."""
        change = next(c for c in reversed(self.changes) if c.row <= row)
        return change.step + (row - change.row) // change.size

    def trained(self, step: int) -> int:
        """How many rows the first `step` steps take; `rows` also counts those left out."""
        return self.rows(step) - sum(change.row - first for first, change in self._gaps()
                                     if change.step <= step)

    def _changed(self, new: BatchSize) -> Steps:
        """The same up to `new`; of what comes after it only the rows that are left out stay so."""
        made = [*(c for c in self.changes if c.step < new.step), new]
        for first, change in self._gaps():
            if change.step > new.step and first >= new.row:
                last = made[-1]
                step = last.step + (first - last.row) // new.size
                if step == last.step:  # not even one step fits before these rows
                    made.pop()
                made.append(BatchSize(step, change.row, new.size))
        return Steps(made)

    def _gaps(self) -> list[tuple[int, BatchSize]]:
        """The changes that leave rows out, each with the first of these rows."""
        found = [(Steps(self.changes[:i]).rows(change.step) if i else 0, change)
                 for i, change in enumerate(self.changes)]
        return [(first, change) for first, change in found if first < change.row]

    def _change(self, step: int) -> BatchSize:
        return next(c for c in reversed(self.changes) if c.step <= step)

    def state(self, step: int) -> dict[str, Any]:
        """The data state of a checkpoint after `step` steps, as plain JSON values."""
        return {"next_row": self.rows(step), "batches": [list(c) for c in self.changes]}

    @classmethod
    def restored(cls, state: Mapping[str, Any], step: int) -> Steps:
        """The steps of a checkpoint after `step` steps, from its `state`."""
        steps = cls(state["batches"])
        assert steps.rows(step) == state["next_row"], f"{state} does not belong to step {step}"
        return steps


def block_counts(weights: np.ndarray) -> np.ndarray:
    """Rows of each source before each block of a period, int64 [PERIOD + 1, S].

    The largest-remainder method, with the error carried from block to block: each block has BLOCK
    rows, and after any number of blocks a source is within about one row of its share.
    """
    target = weights / weights.sum() * BLOCK
    total = np.zeros((PERIOD + 1, len(weights)), np.int64)
    for block in range(PERIOD):
        due = target * (block + 1) - total[block]
        count = np.maximum(np.floor(due), 0).astype(np.int64)
        while (missing := BLOCK - count.sum()) != 0:  # about one round per source at most
            step = 1 if missing > 0 else -1
            able = np.where((count > 0) | (step > 0), step * (due - count), -np.inf)
            count[np.argmax(able)] += step
        total[block + 1] = total[block] + count
    return total
