"""Finding the examples of evaluation sets in a corpus: by runs of 13 words, and by long runs of letters.

13 words are what Brown et al. ("Language Models are Few-Shot Learners", 2020, appendix C) look for, 50 letters without
spaces and punctuation what the GPT-4 report does (2023, appendix C). An example that has neither is too short to be
looked for, and is reported as such.

Shape legend: E examples, N n-grams or runs of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.config import DecontaminateConfig
from lmjax.data.text.words import LETTER, UNSPACED, batches, classes, hash_runs, ngrams, split

KINDS = ("words", "letters")
_BITS = 22  # of the table that says at once of most hashes that no example has them


def runs(texts: Sequence[str], kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `length` words or letters: (hash_N uint64, which text_N)."""
    if kind == "words":
        words = split(texts)
        hashes, first = ngrams(words, length)
        return hashes, words.doc_W[first]
    words = split(texts, "lines")  # for their code points and offsets
    class_C = classes()[words.codes_C]
    at = np.flatnonzero((class_C == LETTER) | (class_C == UNSPACED))
    doc = np.searchsorted(words.offset_D, at, side="right") - 1
    start = np.arange(max(len(at) - length + 1, 0))
    start = start[doc[start] == doc[start + length - 1]]
    return hash_runs(words.codes_C[at], start, start + length), doc[start]


def build_index(texts: Sequence[str], config: DecontaminateConfig, folder: str) -> dict[str, list[int]]:
    """Writes KIND.npy: uint64 [2, N], sorted (hash, example); returns how many runs of each kind each example has."""
    counts = {}
    for kind in KINDS:
        rows = [np.zeros((2, 0), np.uint64)]
        for base, group in batches(texts):
            hashes, example = runs(group, kind, getattr(config, kind))
            rows.append(np.stack([hashes, (example + base).astype(np.uint64)]))
        table = np.unique(np.concatenate(rows, axis=1), axis=1)
        np.save(os.path.join(folder, f"{kind}.npy"), table)
        counts[kind] = np.bincount(table[1].astype(np.int64), minlength=len(texts)).tolist()
    return counts


class Index:
    """What `build_index` wrote, for looking up."""

    def __init__(self, folder: str, config: DecontaminateConfig):
        self.config = config
        self.tables = {kind: np.load(os.path.join(folder, f"{kind}.npy")) for kind in KINDS}
        self.maybe = {}
        for kind, table in self.tables.items():
            self.maybe[kind] = np.zeros(1 << _BITS, bool)
            self.maybe[kind][self._slot(table[0])] = True

    def matches(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """{text, example, kind, run}: every different run that a text shares with an example; `run` is its hash."""
        out = []
        for kind in KINDS:
            hash_N, example_N = self.tables[kind]
            for base, group in batches(texts) if len(hash_N) else ():
                found, doc = runs(group, kind, getattr(self.config, kind))
                some = np.flatnonzero(self.maybe[kind][self._slot(found)])
                low = np.searchsorted(hash_N, found[some])
                high = np.searchsorted(hash_N, found[some], side="right")
                pairs = {(int(doc[i]) + base, int(example_N[n]), int(hash_N[n]))
                         for i, a, b in zip(some, low, high, strict=True) for n in range(a, b)}
                out += [{"text": t, "example": e, "kind": kind, "run": run} for t, e, run in sorted(pairs)]
        return out

    @staticmethod
    def _slot(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - _BITS)).astype(np.int64)
