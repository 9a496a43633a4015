"""The order of training rows as a pure function of (seed, sources, row number): nothing is ever stored.

Row g lies in block g // BLOCK. In every block each source has an exact number of rows, by its weight;
where in the block they come is a keyed permutation of the block. That gives (source, running index);
the running index gives (epoch, place in the epoch), and a permutation keyed by (seed, source, epoch)
turns the place into a packed row. So a run's data state is the number of rows it has consumed, any row
can be found again, and the order knows nothing of steps, batch sizes, devices or processes.

The mixture may change at any row: each stage is such blocks from its own first row on, and a source's
running index goes on through all of them, so its epochs know nothing of stages either.

The permutation is a Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002), in NumPy, so that the order depends on no library's version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.hashing import fold, key_of, permute

BLOCK = 256  # rows: a power of two; sources are mixed as evenly as this
PERIOD = 1024  # blocks after which the counts repeat: weights are exact to 1 / (BLOCK * PERIOD)


class BlockMixture:
    """Which source every row is of, in blocks with exact counts.

    Args:
      weights: share of rows of each source, any positive scale; 0 leaves a source out.
      seed: of the order within blocks.
    """

    def __init__(self, *, weights: Sequence[float], seed: int):
        self.num_sources, self.seed = len(weights), seed
        self.cumulative = block_counts(np.asarray(weights, np.float64))

    def running(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers int64 [n] -> (source int64 [n], how many rows of that source came before it [n])."""
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
        source_UB = sum(mixed_UB >= ends_US[:, s, None] for s in range(self.num_sources))
        rank_UB = np.zeros(shape, np.int64)  # rows of the same source that come earlier in the block
        for s in range(self.num_sources):
            mine_UB = source_UB == s
            rank_UB += mine_UB * (np.cumsum(mine_UB, axis=1) - 1)
        source = source_UB[which, place]
        return source, before_US[which, source] + rank_UB[which, place]

    def seen(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows are of each source; int64 [sources]."""
        block, rest = divmod(rows, BLOCK)
        tail, _ = self.running(np.arange(block * BLOCK, block * BLOCK + rest))
        return self._before(np.array([block]))[0] + np.bincount(tail, minlength=self.num_sources)

    def _before(self, block: np.ndarray) -> np.ndarray:
        period, rest = np.divmod(block, PERIOD)
        return period[:, None] * self.cumulative[-1] + self.cumulative[rest]


class StagedMixture:
    """Which row of which source every row of a run is.

    Args:
      names: one a source; part of the keys, so that sources are shuffled independently.
      sizes: packed rows of each source in an epoch.
      stages: (first row, weights) of every stretch with one mixture, ascending; the first begins at row 0.
      seed: of all permutations.
    """

    def __init__(self, *, names: Sequence[str], sizes: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]],
                 seed: int):
        self.names, self.sizes, self.seed = tuple(names), tuple(sizes), seed
        self.starts = np.array([row for row, _ in stages], np.int64)
        self.mixtures = [BlockMixture(weights=weights, seed=seed) for _, weights in stages]
        self.before_KS = np.zeros((len(stages), len(names)), np.int64)  # rows of each source in earlier stages
        for k in range(1, len(stages)):
            self.before_KS[k] = self.before_KS[k - 1] + self.mixtures[k - 1].seen(
                int(self.starts[k] - self.starts[k - 1]))

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers int64 [n] -> (source, epoch, packed row of the source), int64 [n] each."""
        source, index = self._running(np.asarray(g, np.int64))
        epoch, row = np.empty_like(index), np.empty_like(index)
        for s in np.unique(source):
            mine, size = source == s, self.sizes[s]
            epoch[mine], place = np.divmod(index[mine], size)
            row[mine] = permute(place, size, fold(key_of("epoch", self.seed, self.names[s]), epoch[mine]))
        return source, epoch, row

    def seen(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows are of each source; int64 [sources]."""
        k = max(int(np.searchsorted(self.starts, rows, side="right")) - 1, 0)
        return self.before_KS[k] + self.mixtures[k].seen(rows - int(self.starts[k]))

    def _running(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many rows of that source came before in the run), int64 [n] each."""
        source, index = np.empty_like(g), np.empty_like(g)
        stage = np.searchsorted(self.starts, g, side="right") - 1
        for k in np.unique(stage):
            mine = stage == k
            source[mine], index[mine] = self.mixtures[k].running(g[mine] - self.starts[k])
            index[mine] += self.before_KS[k][source[mine]]
        return source, index


class Change(NamedTuple):
    """From this many steps and rows on, a step trains on `size` rows."""

    step: int
    row: int
    size: int


class Steps:
    """Which rows each step of a run trains on: consecutive ones, `size` a step, until the size changes.

    changes: the first begins at step 0 and row 0. All of it fits into a line of a checkpoint's JSON.
    """

    def __init__(self, changes: Sequence[Sequence[int]]):
        self.changes = tuple(Change(*change) for change in changes)

    def rows(self, step: int) -> int:
        """Rows that the first `step` steps train on: step k has rows(k - 1) to rows(k) - 1."""
        change = next(c for c in reversed(self.changes) if c.step <= step)
        return change.row + (step - change.step) * change.size

    def resumed(self, step: int, size: int) -> Steps:
        """The same up to `step`, then `size` rows a step."""
        kept = [c for c in self.changes if c.step < step]
        same = kept and kept[-1].size == size
        return Steps(kept if same else [*kept, Change(step, self.rows(step), size)])

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps has to hold, as plain JSON values."""
        return {"next_row": self.rows(step), "batches": [list(c) for c in self.changes]}

    @classmethod
    def restored(cls, state: Mapping[str, Any], step: int) -> Steps:
        """The steps of a checkpoint's `state`, from whose `next_row` they go on."""
        steps = cls(state["batches"])
        assert steps.rows(step) == state["next_row"], f"{state} does not belong to step {step}"
        return steps


def block_counts(weights: np.ndarray) -> np.ndarray:
    """Rows of each source before each block of a period, int64 [PERIOD + 1, sources].

    Largest remainder with the error carried from block to block: a block has BLOCK rows, and after any
    number of blocks a source is within about a row of its share.
    """
    target = weights / weights.sum() * BLOCK
    total = np.zeros((PERIOD + 1, len(weights)), np.int64)
    for block in range(PERIOD):
        due = target * (block + 1) - total[block]
        count = np.maximum(np.floor(due), 0).astype(np.int64)
        while (missing := BLOCK - count.sum()) != 0:  # at most about as often as there are sources
            step = 1 if missing > 0 else -1
            able = np.where((count > 0) | (step > 0), step * (due - count), -np.inf)
            count[np.argmax(able)] += step
        total[block + 1] = total[block] + count
    return total
