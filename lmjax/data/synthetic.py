"""Synthetic rows: a fixed random Markov chain over the vocabulary, with a known entropy.

They need no file, no tokenizer and no TensorFlow, and a row is a pure function of (seed, row
number): for tests, benchmarks and machines without a corpus. A document begins with BOS, each token
has four possible successors, and after each token the document ends with probability END. A model
that has learnt the chain reaches a loss of `entropy` nats per prediction; an untrained one starts
at log(vocab_size).

Shape legend: V vocabulary, K successors of a token.
"""

from __future__ import annotations

import functools

import numpy as np

from lmjax.data.hashing import fold, key_of, permute, uniform
from lmjax.data.rows import DECODER, Rows, empty_rows, ramps
from lmjax.errors import UserError

BOS_ID, EOS_ID, SPECIALS = 1, 2, 4  # as our tokenizers have them: pad 0, bos 1, eos 2, unk 3
SUCCESSORS = np.array([0.55, 0.25, 0.15, 0.05])  # probabilities of a token's successors
END = 1 / 48  # a row of 256 holds several documents


class SyntheticRows:
    """Rows of the chain, with the interface of `pipeline.RowSource`.

    Args:
      name: of the source; `name` and `seed` key all random choices.
      vocab_size: number of ids, with the 4 special ones; at least 8.
      seq_len: length of a row.
      num_rows: rows in an epoch.
      seed: of the chain and of the rows.
      split: "train" or "heldout"; each has rows of its own, from the same chain.
    """

    stored, exact = False, True

    def __init__(self, *, name: str, vocab_size: int, seq_len: int, num_rows: int, seed: int,
                 split: str):
        if vocab_size < SPECIALS + len(SUCCESSORS):
            raise UserError("at least 8 for synthetic data", vocab_size, "raise it",
                            where="data.tokenizer.vocab_size")
        self.name, self.vocab_size = name, vocab_size
        self.seq_len, self.num_rows = seq_len, num_rows
        self.fingerprint = f"synthetic-1-{vocab_size}-{seq_len}-{num_rows}-{seed}-{split}"
        self.fields = dict.fromkeys(DECODER, seq_len)
        self._key = key_of("synthetic", name, seed, split)
        self._next_VK = _successors(vocab_size, key_of("chain", name, seed))
        self.predictions = int(self._used(np.arange(num_rows)).sum())
        self.bytes = self.predictions  # one byte per token, so bits per byte are bits per token

    @property
    def entropy(self) -> float:
        """Nats per prediction of the chain: the loss of a perfect model."""
        step = -float(np.sum(SUCCESSORS * np.log(SUCCESSORS)))
        inside = -END * np.log(END) - (1 - END) * np.log(1 - END) + (1 - END) * step
        # A document has one BOS, then 1 / END tokens on average.
        return float((step + inside / END) / (1 + 1 / END))

    def documents(self) -> MadeDocuments:
        """The documents of all rows, for objectives that pack documents themselves."""
        return MadeDocuments(self)

    def documents_at(self, row: int) -> list[tuple[str, int, int]]:
        """(id, first token, number of predictions) of the documents in a row."""
        lengths = np.bincount(self.rows_at(np.array([row]))["segment_ids"][0])[1:]
        return [(f"{row}/{i}", 0, int(length)) for i, length in enumerate(lengths, 1)]

    def rows_at(self, rows: np.ndarray, keys: np.ndarray | None = None) -> Rows:
        """The arrays of `DECODER` of the rows numbered `rows`, int64 [n]; `keys` are not needed."""
        rows = np.asarray(rows, np.int64)
        out = empty_rows(len(rows), self.seq_len)
        token, begin = np.full(len(rows), BOS_ID, np.int32), np.zeros(len(rows), np.int32)
        segment, used = np.ones(len(rows), np.int32), self._used(rows)
        for t in range(self.seq_len):
            inside = t < used
            target = self._step(token, fold(self._key, rows, t + 1))
            columns: dict[str, np.ndarray | float] = {
                "tokens": token, "targets": target, "segment_ids": segment, "positions": t - begin,
                "loss_mask": 1.0}
            for name, value in columns.items():
                out[name][:, t] = np.where(inside, value, 0)
            ended = target == EOS_ID
            token = np.where(ended, BOS_ID, target)
            begin, segment = np.where(ended, t + 1, begin), segment + ended
        return out

    def _step(self, token: np.ndarray, random: np.ndarray) -> np.ndarray:
        """The token after each token, chosen by random uint64."""
        draw = uniform(random)
        begins = token == BOS_ID  # EOS never follows BOS: no document is empty
        ends = ~begins & (draw < END)
        draw = np.where(begins, draw, (draw - END) / (1 - END))
        pick = np.searchsorted(np.cumsum(SUCCESSORS)[:-1], draw, side="right")
        return np.where(ends, EOS_ID, self._next_VK[token, pick]).astype(np.int32)

    def _used(self, rows: np.ndarray) -> np.ndarray:
        """Predictions of each row: as in packed text, some of it (up to an eighth) is padding."""
        spare = np.uint64(self.seq_len // 8 + 1)
        return self.seq_len - (fold(self._key, rows, 0) % spare).astype(np.int64)


class MadeDocuments:
    """The documents of all rows, as a token store holds them.

    A document that the end of a row cuts off has no EOS.
    """

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
        self.predictions, self.bytes = rows.predictions, rows.bytes
        self.fingerprint = rows.fingerprint

    @functools.cached_property
    def ids(self) -> list[str]:
        return [f"{row}/{segment}" for row, segment in zip(self._rows, self._segments, strict=True)]

    def gather(self, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads ranges of tokens: range p begins at token starts[p] and has sizes[p] tokens.

        Returns:
          (flat, at) such that range p is flat[at[p] : at[p] + sizes[p]].
        """
        return self.tokens, starts


def _successors(vocab_size: int, key: np.ndarray) -> np.ndarray:
    """The successors of each token: 4 distinct ordinary tokens, int32 [V, K]."""
    ordinary = vocab_size - SPECIALS
    place_V = permute(np.arange(vocab_size) % ordinary, ordinary, key)
    shift_K = permute(np.arange(len(SUCCESSORS)), ordinary, fold(key, 1))
    return ((place_V[:, None] + shift_K) % ordinary + SPECIALS).astype(np.int32)

