"""Synthetic rows: a fixed random Markov chain over the vocabulary, with a known entropy.

Needs no file, no tokenizer and no TensorFlow, and a row is a pure function of (seed, row number), so it
serves tests, benchmarks and machines that have nothing else. A document begins with BOS; every token has
four likely successors; after each the document ends with probability END. A model that has learnt it
reaches `entropy` nats per prediction; one that knows nothing starts at log(vocab_size).
"""

from __future__ import annotations

import functools

import numpy as np

from lmjax.data.hashing import fold, key_of, permute
from lmjax.data.packing import DECODER, Rows, empty_rows, ramps

BOS_ID, EOS_ID, SPECIALS = 1, 2, 4  # the ids that the tokenizer reserves too: pad 0, bos 1, eos 2, unk 3
SUCCESSORS = np.array([0.55, 0.25, 0.15, 0.05])
END = 1 / 48  # so that a row of 256 holds several documents


class SyntheticRows:
    """Rows of the chain; the same interface as rows packed from a store.

    Args:
      name: of the source; with `seed` the key of everything random.
      vocab_size: including the 4 special ids; at least 8.
      seq_len: row length.
      num_rows: rows in an epoch.
      seed: of the chain and of the rows.
      split: "train" or "heldout": other rows of the same chain.
    """

    def __init__(self, *, name: str, vocab_size: int, seq_len: int, num_rows: int, seed: int, split: str):
        if vocab_size < SPECIALS + len(SUCCESSORS):
            raise ValueError(f"data.tokenizer.vocab_size: expected at least 8 for synthetic data, "
                             f"got {vocab_size}; raise it")
        self.name, self.vocab_size, self.seq_len, self.num_rows = name, vocab_size, seq_len, num_rows
        self.fingerprint = f"synthetic-1-{vocab_size}-{seq_len}-{num_rows}-{seed}-{split}"
        self.fields = dict.fromkeys(DECODER, seq_len)
        self._key = key_of("synthetic", name, seed, split)
        self._next_VK = _successors(vocab_size, key_of("chain", name, seed))
        self.predictions = int(self._used(np.arange(num_rows)).sum())
        self.bytes = self.predictions  # a token counts as a byte: bits per byte are bits per token

    @property
    def entropy(self) -> float:
        """Nats per prediction of the chain itself: what a perfect model's loss tends to."""
        step = -float(np.sum(SUCCESSORS * np.log(SUCCESSORS)))
        inside = -END * np.log(END) - (1 - END) * np.log(1 - END) + (1 - END) * step
        return float((step + inside / END) / (1 + 1 / END))  # a document: one BOS, then 1 / END tokens

    def documents(self) -> MadeDocuments:
        """All of them in memory, for objectives that pack documents themselves."""
        return MadeDocuments(self)

    def documents_at(self, row: int) -> list[tuple[str, int, int]]:
        """(id, first token, number of predictions) of what a row holds."""
        lengths = np.bincount(self.rows_at(np.array([row]))["segment_ids"][0])[1:]
        return [(f"{row}/{i}", 0, int(length)) for i, length in enumerate(lengths, 1)]

    def rows_at(self, rows: np.ndarray, keys: np.ndarray | None = None) -> Rows:
        """Row numbers int64 [n] -> the row dict (see `packing.fill_rows`); causal rows have no use for keys."""
        rows = np.asarray(rows, np.int64)
        out = empty_rows(len(rows), self.seq_len)
        token, begin = np.full(len(rows), BOS_ID, np.int32), np.zeros(len(rows), np.int32)
        segment, used = np.ones(len(rows), np.int32), self._used(rows)
        for t in range(self.seq_len):
            inside = t < used
            target = self._step(token, fold(self._key, rows, t + 1))
            columns = {"tokens": token, "targets": target, "segment_ids": segment, "positions": t - begin,
                       "loss_mask": 1.0}
            for name, value in columns.items():
                out[name][:, t] = np.where(inside, value, 0)
            ended = target == EOS_ID
            token = np.where(ended, BOS_ID, target)
            begin, segment = np.where(ended, t + 1, begin), segment + ended
        return out

    def _step(self, token: np.ndarray, random: np.ndarray) -> np.ndarray:
        uniform = (random >> np.uint64(11)).astype(np.float64) * 2.0**-53
        begins = token == BOS_ID  # never followed by EOS: no document is empty
        ends = ~begins & (uniform < END)
        uniform = np.where(begins, uniform, (uniform - END) / (1 - END))
        pick = np.searchsorted(np.cumsum(SUCCESSORS)[:-1], uniform, side="right")
        return np.where(ends, EOS_ID, self._next_VK[token, pick]).astype(np.int32)

    def _used(self, rows: np.ndarray) -> np.ndarray:
        """Predictions of a row: up to an eighth of it is padding, as packed text may have."""
        spare = np.uint64(self.seq_len // 8 + 1)
        return self.seq_len - (fold(self._key, rows, 0) % spare).astype(np.int64)


class MadeDocuments:
    """The documents of all rows, as a token store holds them; those that a row's end cut off have no EOS."""

    specials = (BOS_ID, EOS_ID)

    def __init__(self, rows: SyntheticRows):
        made = rows.rows_at(np.arange(rows.num_rows))
        used, segments = made["loss_mask"] > 0, made["segment_ids"]
        first = np.flatnonzero((made["positions"] == 0)[used])
        self.lengths = np.diff(np.append(first, used.sum()))  # predictions
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths + 1)])
        self.tokens = np.empty(self.offsets[-1], np.uint32)
        self.tokens[ramps(self.offsets[:-1], self.lengths)] = made["tokens"][used]
        self.tokens[self.offsets[1:] - 1] = made["targets"][used][first + self.lengths - 1]
        self._rows, self._segments = np.nonzero(used)[0][first], segments[used][first]
        self.predictions, self.bytes, self.fingerprint = rows.predictions, rows.bytes, rows.fingerprint

    @functools.cached_property
    def ids(self) -> list[str]:
        return [f"{row}/{segment}" for row, segment in zip(self._rows, self._segments, strict=True)]

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranges of tokens at once: (flat, at) such that range p is flat[at[p] : at[p] + lengths[p]]."""
        return self.tokens, starts


def _successors(vocab_size: int, key: np.ndarray) -> np.ndarray:
    """int32 [vocab_size, 4]: distinct ordinary tokens for every token."""
    ordinary = vocab_size - SPECIALS
    place_V = permute(np.arange(vocab_size) % ordinary, ordinary, key)
    shift_K = permute(np.arange(len(SUCCESSORS)), ordinary, fold(key, 1))
    return ((place_V[:, None] + shift_K) % ordinary + SPECIALS).astype(np.int32)

