"""Finds passages that occur twice, windows of words and whole lines, and cuts them out of texts.

A place in the corpus is one uint64: document << POSITION_BITS | number of the word or line in it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np

from lmjax.data.config import DedupConfig
from lmjax.data.preparation import shards
from lmjax.data.preparation.engine import Engine, between
from lmjax.data.preparation.shards import Shard
from lmjax.data.text.words import batches, ngrams, split

POSITION_BITS = 32


def repeats(engine: Engine, parts: Sequence[Shard], removed: Sequence[str], config: DedupConfig,
            folder: str, kind: str) -> str:
    """Finds windows of words, or lines, that have come before.

    Args:
      engine: groups the passages.
      parts: the shards of the corpus.
      removed: .npy files of documents to leave out, uint64 [_, n], sorted by the document in row 0.
      config: how long the windows are, and which lines count.
      folder: for KIND.npy, and for spilled records in `spill`, which the caller removes.
      kind: `windows` or `lines`.
    Returns:
      the path of KIND.npy: the sorted places of repeated lines, or of the first words of repeated
      windows, uint64 [1, n].
    """
    spill = os.path.join(folder, "spill", kind)
    emit = functools.partial(_records, removed=tuple(removed), config=config, kind=kind)
    reduce = functools.partial(_repeated, documents=config.line_documents if kind == "lines" else 0)
    files = engine.group(emit, parts, reduce, spill)
    engine.sort(files, spill, out := os.path.join(folder, f"{kind}.npy"))
    return out


def _passages(texts: Sequence[str], config: DedupConfig,
              kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes every window of words, or every line that is long enough.

    Returns:
      per passage its hash (uint64), the index of its text, and the number of its line or first
      word.
    """
    if kind == "windows":
        words = split(texts)
        hashes, first = ngrams(words, config.window)
        return hashes, words.doc_W[first], first - words.bounds_D1[words.doc_W[first]]
    lines = split(texts, "lines")
    first = np.flatnonzero(lines.end_W - lines.start_W >= config.line_chars)
    return lines.hash_W[first], lines.doc_W[first], first - lines.bounds_D1[lines.doc_W[first]]


def _records(part: Shard, removed: Sequence[str], config: DedupConfig, kind: str) -> np.ndarray:
    """Returns (hash, place) of every passage of a shard: uint64 [2, n]."""
    gone = np.concatenate([between(np.load(path, mmap_mode="r"), part.first, part.end)[0]
                           for path in removed])
    texts = shards.texts(part)
    for number in gone.tolist():
        texts[number - part.first] = ""
    out = [np.zeros((2, 0), np.uint64)]
    for base, group in batches(texts):
        hashes, text, number = _passages(group, config, kind)
        document = (text + (part.first + base)).astype(np.uint64)
        place = document << np.uint64(POSITION_BITS) | number.astype(np.uint64)
        out.append(np.stack([hashes, place]))
    return np.concatenate(out, axis=1)


def _repeated(rows: np.ndarray, documents: int) -> np.ndarray:
    """Returns the places of passages that came before, given all `_records` of some hashes.

    With `documents`, only passages that are in more documents than that count, and their first
    document keeps all of them.
    """
    key, place = rows
    rows = rows[:, np.lexsort((place, key))]
    key, place = rows
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    if not documents:
        return place[~new][None]
    group = np.cumsum(new) - 1
    document = place >> np.uint64(POSITION_BITS)
    fresh = new | np.concatenate([[True], document[1:] != document[:-1]])[: len(key)]
    enough = np.bincount(group, fresh, minlength=1) > documents
    first = document[new][group] if len(key) else document
    return place[enough[group] & (document != first)][None]


def positions(places: np.ndarray, document: int) -> np.ndarray:
    """Returns which words or lines of `document` the sorted places name: int64 [n]."""
    bits = np.uint64(POSITION_BITS)
    low, high = np.searchsorted(places, np.array([document, document + 1], np.uint64) << bits)
    return (places[low:high] & np.uint64((1 << POSITION_BITS) - 1)).astype(np.int64)


def cut(text: str, windows: np.ndarray, lines: np.ndarray,
        config: DedupConfig) -> tuple[str, list[tuple[str, str]]]:
    """Cuts repeated passages out of a text.

    Args:
      text: of one document.
      windows: the numbers of the first words of repeated windows.
      lines: the numbers of repeated lines.
      config: how long the windows are.
    Returns:
      the rest of the text, and (`repeated_window` or `repeated_line`, piece) for every cut.
    """
    spans: list[tuple[int, int, str]] = []
    if len(windows):
        words = split([text])
        breaks = np.flatnonzero(np.diff(windows) > config.window) + 1
        for run in np.split(windows, breaks):
            start, end = words.start_W[run[0]], words.end_W[run[-1] + config.window - 1]
            spans.append((int(start), int(end), "repeated_window"))
    if len(lines):
        found = split([text], "lines")
        spans += [(int(found.start_W[i]), int(found.end_W[i]) + 1, "repeated_line") for i in lines]
    pieces, removed, at = [], [], 0
    for start, end, kind in sorted(spans):
        start = max(start, at)
        if end > start:
            pieces.append(text[at:start])
            removed.append((kind, text[start:end]))
            at = end
    return "".join([*pieces, text[at:]]), removed
