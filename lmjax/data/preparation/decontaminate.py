"""Finds examples of evaluation sets in a corpus: by runs of words, and by runs of letters.

By default a run has 13 words, as in Brown et al., "Language Models are Few-Shot Learners" (2020),
appendix C, or 50 letters without spaces and punctuation, as in the GPT-4 report (2023), appendix C.
An example without any such run is too short to be looked for, and is reported as such.

Shape legend: E examples, N runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.config import DecontaminateConfig
from lmjax.data.preparation import shards
from lmjax.data.text import clean, sources
from lmjax.data.text.words import LETTER, UNSPACED, batches, classes, hash_runs, ngrams, split

RUN_KINDS = ("words", "letters")
_SLOT_BITS = 22  # a table of 2**22 flags rejects most hashes that no example has


def runs(texts: Sequence[str], kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes all runs of `length` words or letters.

    Returns:
      uint64 [N]: the hashes; int64 [N]: the index of each run's text.
    """
    if kind == "words":
        words = split(texts)
        hashes, first = ngrams(words, length)
        return hashes, words.doc_W[first]
    lines = split(texts, "lines")  # only for their code points and offsets
    class_C = classes()[lines.codes_C]
    at = np.flatnonzero((class_C == LETTER) | (class_C == UNSPACED))
    doc = np.searchsorted(lines.offset_D, at, side="right") - 1
    start = np.arange(max(len(at) - length + 1, 0))
    start = start[doc[start] == doc[start + length - 1]]
    return hash_runs(lines.codes_C[at], start, start + length), doc[start]


def index_sources(config: DecontaminateConfig, rules: Sequence[str], broken_budget: float,
                  folder: str) -> dict[str, int]:
    """Reads the evaluation sets, and writes their index and `examples.arrow`.

    Args:
      config: names the evaluation sets.
      rules: the cleaning rules of the corpus; examples get those that concern the encoding.
      broken_budget: the share of records that may be broken.
      folder: where the files go.
    Returns:
      the numbers of examples, of broken records, and of examples too short to be looked for.
    Raises:
      UserError: too many broken records.
    """
    examples: list[tuple[str, sources.Document]] = []
    broken = 0
    for source in config.sources:
        files = [file for unit in sources.units(source, 1 << 60) for file in unit]
        found = list(sources.read(source, files, broken_budget))
        bad = [item for item in found if isinstance(item, sources.Broken)]
        sources.check_budget(source, documents=len(found) - len(bad), broken=len(bad),
                             example=bad[0][:2] if bad else (), budget=broken_budget)
        examples += [(source.name, item) for item in found if isinstance(item, sources.Document)]
        broken += len(bad)
    kept_rules = [rule for rule in ("newlines", "control", "nfc") if rule in rules]
    texts = [clean.clean(document.data, kept_rules)[0] for _, document in examples]
    counts = build_index(texts, config, folder)
    shards.write(os.path.join(folder, "examples.arrow"), {
        "set": [name for name, _ in examples], "id": [document.id for _, document in examples],
        "text": texts, **counts})
    return {"examples": len(examples), "broken": broken,
            "too_short": sum(not any(n) for n in zip(*counts.values(), strict=True))}


def build_index(texts: Sequence[str], config: DecontaminateConfig,
                folder: str) -> dict[str, list[int]]:
    """Writes `words.npy` and `letters.npy`: uint64 [2, N], sorted pairs (hash of a run, example).

    Returns:
      for each kind, how many different runs each example has.
    """
    counts = {}
    for kind in RUN_KINDS:
        rows = [np.zeros((2, 0), np.uint64)]
        for base, group in batches(texts):
            hashes, example = runs(group, kind, getattr(config, kind))
            rows.append(np.stack([hashes, (example + base).astype(np.uint64)]))
        table = np.unique(np.concatenate(rows, axis=1), axis=1)
        np.save(os.path.join(folder, f"{kind}.npy"), table)
        counts[kind] = np.bincount(table[1].astype(np.int64), minlength=len(texts)).tolist()
    return counts


class Index:
    """Looks texts up in what `build_index` wrote."""

    def __init__(self, folder: str, config: DecontaminateConfig):
        self.config = config
        self.tables = {kind: np.load(os.path.join(folder, f"{kind}.npy")) for kind in RUN_KINDS}
        self._maybe: dict[str, np.ndarray] = {}
        for kind, table in self.tables.items():
            self._maybe[kind] = np.zeros(1 << _SLOT_BITS, bool)
            self._maybe[kind][_slot(table[0])] = True

    def matches(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Returns every different run that a text shares with an example.

        A match has the indices of the `text` and the `example`, the `kind` (one of `RUN_KINDS`),
        and the hash of the `run`.
        """
        out = []
        for kind in RUN_KINDS:
            hash_N, example_N = self.tables[kind]
            for base, group in batches(texts) if len(hash_N) else ():
                found, doc = runs(group, kind, getattr(self.config, kind))
                some = np.flatnonzero(self._maybe[kind][_slot(found)])
                low = np.searchsorted(hash_N, found[some])
                high = np.searchsorted(hash_N, found[some], side="right")
                pairs = {(int(doc[i]) + base, int(example_N[n]), int(hash_N[n]))
                         for i, a, b in zip(some, low, high, strict=True) for n in range(a, b)}
                out += [{"text": text, "example": example, "kind": kind, "run": run}
                        for text, example, run in sorted(pairs)]
        return out


def _slot(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
