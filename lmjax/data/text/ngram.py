"""N-gram baselines on the tokens that a model sees: the loss that counting alone achieves.

The model is interpolated modified Kneser-Ney (Chen and Goodman, "An Empirical Study of Smoothing
Techniques for Language Modeling", 1998), the strongest of the classical n-gram models. For a
history h of k - 1 tokens, and h' without its first token,

    P_k(w | h) = (c(h w) - D(c)) / sum_v c(h v) + gamma(h) P_{k-1}(w | h'),    P_0 = 1 / V.

At the highest order, c is the count of h w; at lower orders it is the number of different tokens
seen before h w. N-grams that begin with BOS keep their counts, because nothing comes before BOS.
The discounts D of counts 1, 2 and 3 or more are estimated from the counts of counts. For an unseen
history, P_k = P_{k-1}. Histories never cross the BOS of a document, so the probabilities are those
of whole documents and sum to one.

All n-grams of an order are one sorted array of uint64 keys, (rank of the first n - 1 tokens) * V +
last token. The keys are exact: nothing is hashed.

Shape legend: T tokens, G different n-grams of one order, H histories (different (n-1)-grams), V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class _Order(NamedTuple):
    """The n-grams of one order, smoothed."""

    keys_G: np.ndarray     # uint64, sorted
    count_G: np.ndarray    # float64, discounted; 0 for n-grams that are only histories
    total_H: np.ndarray    # float64: sum of the counts of all tokens after this history
    backoff_H: np.ndarray  # float64: gamma


class Counts:
    """All n-grams of up to `order` tokens, counted once for models of every order.

    Args:
      tokens: documents end to end, integers [T], each beginning with `bos_id` and holding no other.
      order: tokens of the longest n-gram, at least 1.
      vocab_size: number of token ids.
      bos_id: the token that begins each document, which is never predicted.
    """

    def __init__(self, tokens: np.ndarray, *, order: int, vocab_size: int, bos_id: int):
        self.order, self.vocab_size, self.bos_id = order, vocab_size, bos_id
        place_T = positions(tokens, bos_id)
        # One entry per order, for each of its n-grams:
        self.keys: list[np.ndarray] = []    # uint64 [G], sorted
        self.raw: list[np.ndarray] = []     # how often it occurs, int64 [G]
        self.begins: list[np.ndarray] = []  # whether it begins with BOS, bool [G]
        self.spread: list[np.ndarray] = []  # how many different tokens come before it, int64 [G]
        history_T = np.zeros(len(tokens), np.int64)  # rank of the k - 1 tokens before each token
        previous_T = history_T
        for k in range(1, order + 1):
            at = np.flatnonzero(place_T >= k - 1)
            key_A = history_T[at].astype(np.uint64) * np.uint64(vocab_size)
            key_A += tokens[at].astype(np.uint64)
            # A stable sort is much faster than the default on repeated keys.
            by_key = np.argsort(key_A, kind="stable")
            sorted_A = key_A[by_key]
            new_A = np.concatenate([[True], sorted_A[1:] != sorted_A[:-1]])
            starts = np.flatnonzero(new_A)
            first = at[by_key[starts]]
            if k > 1:  # the last k - 1 tokens of every different k-gram
                self.spread.append(np.bincount(previous_T[first], minlength=len(self.keys[-1])))
            self.keys.append(sorted_A[starts])
            self.raw.append(np.diff(starts, append=len(at)))
            self.begins.append(place_T[first] == k - 1)
            # The rank of the k-gram that ends at each token.
            previous_T = np.zeros(len(tokens), np.int64)
            previous_T[at[by_key]] = np.cumsum(new_A) - 1
            history_T = np.concatenate([[0], previous_T[:-1]])


class NGram:
    """A Kneser-Ney model of n-grams of up to `order` tokens, at most as many as were counted."""

    def __init__(self, counts: Counts, *, order: int):
        self.vocab_size, self.bos_id = counts.vocab_size, counts.bos_id
        self._orders: list[_Order] = []
        for k in range(order):
            count_G = counts.raw[k]
            if k + 1 < order:
                count_G = np.where(counts.begins[k], count_G, counts.spread[k])
            if k == 0:
                # BOS is a history, never a prediction.
                count_G = np.where(counts.keys[0] == self.bos_id, 0, count_G)
            histories = len(counts.keys[k - 1]) if k else 1
            self._orders.append(_smooth(counts.keys[k], count_G.astype(float), histories,
                                        self.vocab_size))

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Log of each token's probability given its document so far; float64 [T], 0 for BOS."""
        tokens = np.asarray(tokens).astype(np.uint64)
        place_T = positions(tokens, self.bos_id)
        p_T = np.full(len(tokens), 1 / self.vocab_size)
        history_T = np.zeros(len(tokens), np.int64)  # rank of the k - 1 tokens before, -1 if unseen
        for order in self._orders:
            known = np.flatnonzero(history_T >= 0)
            history = history_T[known]
            gram, found = _find(order.keys_G, history, tokens[known], self.vocab_size)
            total = order.total_H[history]
            seen = total > 0
            c = np.where(found, order.count_G[gram], 0.0)
            mixed = c / np.where(seen, total, 1) + order.backoff_H[history] * p_T[known]
            p_T[known] = np.where(seen, mixed, p_T[known])
            rank_T = np.full(len(tokens), -1, np.int64)
            rank_T[known] = np.where(found, gram, -1)
            history_T = np.concatenate([[-1], rank_T[:-1]])[: len(tokens)]
            history_T[place_T == 0] = -1
        return np.where(place_T == 0, 0.0, np.log(p_T))

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that the model consists of, as named arrays."""
        named = {f"{k}.{name}": value for k, order in enumerate(self._orders)
                 for name, value in order._asdict().items()}
        return named | {"ids": np.array([self.vocab_size, self.bos_id])}

    @classmethod
    def of_arrays(cls, named: Mapping[str, np.ndarray]) -> NGram:
        """The model whose `arrays` these are."""
        model = cls.__new__(cls)
        model.vocab_size, model.bos_id = map(int, named["ids"])
        orders = (len(named) - 1) // len(_Order._fields)
        model._orders = [_Order(*(named[f"{k}.{name}"] for name in _Order._fields))
                         for k in range(orders)]
        return model


def positions(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """How many tokens of its document come before each token; int64 [T]."""
    at = np.arange(len(tokens))
    return at - np.maximum.accumulate(np.where(tokens == bos_id, at, 0)) if len(tokens) else at


def _find(keys_G: np.ndarray, history: np.ndarray, tokens: np.ndarray,
          vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of each (history, token) among the n-grams, and whether it is there."""
    wanted = history.astype(np.uint64) * np.uint64(vocab_size) + tokens
    gram = np.minimum(np.searchsorted(keys_G, wanted), len(keys_G) - 1)
    return gram, keys_G[gram] == wanted


def _smooth(keys_G: np.ndarray, count_G: np.ndarray, histories: int, vocab_size: int) -> _Order:
    history_G = (keys_G // np.uint64(vocab_size)).astype(np.int64)
    discount_3 = _discounts(count_G)
    class_G = np.minimum(count_G, 3).astype(np.int64)  # counts of 0 are no predictions: no discount
    taken_G = np.concatenate([[0.0], discount_3])[class_G]
    total_H = np.bincount(history_G, count_G, histories)
    taken_H = np.bincount(history_G, taken_G, histories)
    backoff_H = np.divide(taken_H, total_H, out=np.ones(histories), where=total_H > 0)
    return _Order(keys_G, count_G - taken_G, total_H, backoff_H)


def _discounts(count_G: np.ndarray) -> np.ndarray:
    """Discounts of counts 1, 2 and 3 or more (Chen and Goodman, eq. 26), within (0, count)."""
    n = np.bincount(np.minimum(count_G, 5).astype(np.int64), minlength=6).astype(np.float64)
    if not n[1] or not n[2]:
        return np.full(3, 0.5)  # too little text to estimate from
    y = n[1] / (n[1] + 2 * n[2])
    estimate = [c - (c + 1) * y * n[c + 1] / n[c] if n[c] else c / 2 for c in (1, 2, 3)]
    return np.clip(estimate, 0.01, [0.99, 1.99, 2.99])


def unigram_log_probs(train: np.ndarray, tokens: np.ndarray, *, vocab_size: int,
                      bos_id: int) -> np.ndarray:
    """`NGram.log_probs` of a unigram model with add-one counts of `train`."""
    count_V = np.bincount(train[train != bos_id], minlength=vocab_size) + 1.0
    return np.where(tokens == bos_id, 0.0, np.log(count_V / count_V.sum())[tokens])


def baselines(train: np.ndarray, heldout: np.ndarray, *, heldout_bytes: int, vocab_size: int,
              bos_id: int) -> dict[str, Any]:
    """Losses of a unigram, a bigram and a 5-gram model on all held-out predictions.

    Args:
      train, heldout: documents end to end, integers [T], each beginning with BOS.
      heldout_bytes: UTF-8 bytes of the held-out text.
      vocab_size: number of token ids.
      bos_id: the token that begins each document.
    Returns:
      the content of baselines.json, with losses in nats per token.
    """
    predictions = int((heldout != bos_id).sum())
    counts = Counts(train, order=5, vocab_size=vocab_size, bos_id=bos_id)
    scores = {"unigram": unigram_log_probs(train, heldout, vocab_size=vocab_size, bos_id=bos_id)}
    for name, order in (("bigram", 2), ("5-gram", 5)):
        scores[name] = NGram(counts, order=order).log_probs(heldout)
    nats = {name: -float(score.sum()) for name, score in scores.items()}
    return {
        "unit": "loss: nats per token; bits_per_byte: bits per UTF-8 byte of the held-out text",
        "train_tokens": len(train),
        "heldout": {"tokens": predictions, "bytes": heldout_bytes},
        "baselines": [
            {"name": name, "loss": n / predictions,
             "bits_per_byte": n / heldout_bytes / math.log(2)}
            for name, n in nats.items()
        ],
    }
