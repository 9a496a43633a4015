"""Finding what is there twice: equal documents, nearly equal ones, repeated windows of words, repeated lines.

Each is a group-by-key of `engine.Engine` whose records are 64-bit hashes and documents' numbers. Of what is equal the
first stays. A document is removed as nearly equal only to one that stays and whose Jaccard similarity to it has been
worked out in full: MinHash and its bands (Broder, 1997; Indyk and Motwani, 1998) do no more than name candidates.

Shape legend: G shingles, D documents, K permutations, B bands, N records, P pairs.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.config import DedupConfig
from lmjax.data.hashing import fold, key_of, mix64
from lmjax.data.preparation import shards
from lmjax.data.preparation.engine import Engine, between
from lmjax.data.preparation.shards import Shard
from lmjax.data.text.words import batches, ngrams, split

CANDIDATES = 16  # earlier documents of the same band that one is compared with, besides the first
PAIRS = 20_000  # verified by a worker at once
POSITION = 32  # bits of a place within a document; the rest is the document's number
_LOWER = bytes(range(256)).lower()
_SPACES = b" \t\n\r\v\f"


def exact(engine: Engine, parts: Sequence[Shard], folder: str) -> np.ndarray:
    """Documents that are copies of earlier ones, letter for letter but for spaces and ASCII case: uint64
    [2, n], (copy, the one that stays)."""
    spill = os.path.join(folder, "spill")
    files = engine.group(_digests, parts, _copies, spill)
    count = engine.sort(files, spill, out := os.path.join(folder, "removed.npy"))
    return np.load(out) if count else np.zeros((2, 0), np.uint64)


def digest(raw: bytes | memoryview) -> bytes:
    """16 bytes that are equal for texts (UTF-8) that differ in spaces and ASCII case only."""
    return hashlib.blake2b(bytes(raw).translate(_LOWER, _SPACES), digest_size=16).digest()


def _digests(part: Shard) -> np.ndarray:
    data = b"".join(map(digest, shards.raw_texts(part)))
    halves = np.frombuffer(data, "<u8").reshape(-1, 2).T
    return np.stack([halves[0], halves[1], np.arange(part.first, part.end, dtype=np.uint64)])


def _copies(rows: np.ndarray) -> np.ndarray:
    rows = rows[:, np.lexsort((rows[2], rows[1], rows[0]))]
    new = np.ones(rows.shape[1], bool)
    new[1:] = (rows[:2, 1:] != rows[:2, :-1]).any(axis=0)
    kept = rows[2][np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
    return np.stack([rows[2], kept])[:, ~new]


def near(engine: Engine, parts: Sequence[Shard], removed: str, config: DedupConfig,
         folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents that are nearly equal to one that stays.

    Args:
      parts: the documents.
      removed: .npy of those that are gone already, [_, n] by document.
      folder: for sets and spilled records; the caller removes `spill` in it.
    Returns:
      uint64 [2, n]: (document, the one that stays) by document; float64 [n]: their Jaccard similarity.
    """
    spill = os.path.join(folder, "spill")
    os.makedirs(spill)
    emit = functools.partial(_bands, removed=removed, config=config, folder=spill)
    files = engine.group(emit, parts, _candidates, os.path.join(spill, "bands"))
    count = engine.sort(files, os.path.join(spill, "pairs"), pairs := os.path.join(spill, "pairs.npy"))
    tasks = [(low, min(low + PAIRS, count)) for low in range(0, count, PAIRS)]
    verify = functools.partial(_verify, pairs=pairs, folder=spill, parts=parts, threshold=config.threshold)
    found = engine.map(verify, tasks)
    return _greedy(np.concatenate([np.zeros((2, 0), np.uint64), *(pair for pair, _ in found)], axis=1),
                   np.concatenate([np.zeros(0), *(similar for _, similar in found)]))


def _greedy(pairs_2P: np.ndarray, similar_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In order: a document goes if it is similar to one that has stayed, the most similar (then the earliest)."""
    order = np.lexsort((pairs_2P[1], -similar_P, pairs_2P[0]))
    gone: dict[int, tuple[int, float]] = {}
    for (later, earlier), value in zip(pairs_2P.T[order].tolist(), similar_P[order].tolist(), strict=True):
        if later not in gone and earlier not in gone:
            gone[later] = earlier, value
    rows = [(later, earlier) for later, (earlier, _) in gone.items()]
    return np.array(rows, np.uint64).reshape(-1, 2).T, np.array([value for _, value in gone.values()])


def shingle_sets(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The sets of each text's runs of n words (of all its words where it has fewer).

    Returns:
      uint64 [G]: 48-bit hashes, each text's sorted and different; int64 [D + 1]: where each text's begin.
    """
    sets, sizes = [], [np.zeros(1, np.int64)]
    for _, group in batches(texts):
        for low in range(0, len(group), 1 << 16):  # so that a text's number fits above its hashes
            words = split(group[low : low + (1 << 16)])
            hash_G, first_G = ngrams(words, n, shorter=True)
            key_G = np.sort(words.doc_W[first_G].astype(np.uint64) << np.uint64(48) | hash_G >> np.uint64(16))
            key_G = key_G[np.concatenate([[True], key_G[1:] != key_G[:-1]])[: len(key_G)]]
            sizes.append(np.bincount((key_G >> np.uint64(48)).astype(np.int64), minlength=len(words.offset_D)))
            sets.append(key_G & np.uint64((1 << 48) - 1))
    return np.concatenate([np.zeros(0, np.uint64), *sets]), np.cumsum(np.concatenate(sizes))


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = fold(key_of("minhash"), np.arange(count))
    return (numbers.astype(np.uint32) | np.uint32(1)), (numbers >> np.uint64(32)).astype(np.uint32)


def signatures(set_G: np.ndarray, bounds_D1: np.ndarray, count: int) -> np.ndarray:
    """MinHash of sets, none of them empty: uint32 [K, D]; two agree in a row with the probability of their Jaccard."""
    x_G = mix64(set_G).astype(np.uint32)
    scale_K, shift_K = _permutations(count)
    out = np.empty((count, len(bounds_D1) - 1), np.uint32)
    for k in range(count):  # each a bijection of 32-bit integers; a linear one alone is not random enough
        y_G = (x_G + shift_K[k]) * scale_K[k]
        np.minimum.reduceat((y_G ^ y_G >> np.uint32(16)) * np.uint32(0x85EBCA6B), bounds_D1[:-1], out=out[k])
    return out


def _bands(part: Shard, removed: str, config: DedupConfig, folder: str) -> np.ndarray:
    set_G, bounds = shingle_sets(shards.texts(part), config.shingle)
    np.save(os.path.join(folder, f"{part.name}.sets.npy"), set_G)
    np.save(os.path.join(folder, f"{part.name}.bounds.npy"), bounds)
    gone = between(np.load(removed, mmap_mode="r"), part.first, part.end)[0] - np.uint64(part.first)
    wanted = np.diff(bounds) > 0
    wanted[gone.astype(np.int64)] = False
    return band_keys(set_G, bounds, np.flatnonzero(wanted), part.first, config)


def band_keys(set_G: np.ndarray, bounds_D1: np.ndarray, wanted: np.ndarray, first: int,
              config: DedupConfig) -> np.ndarray:
    """Records (hash of a band of the signature, document) of the documents `wanted`; uint64 [2, B * len(wanted)]."""
    sizes = np.diff(bounds_D1)[wanted]
    ends = np.cumsum(sizes)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(bounds_D1[wanted] - (ends - sizes), sizes)
    keys = np.zeros((config.bands, len(wanted)), np.uint64)
    if len(wanted):
        table = signatures(set_G[at], np.concatenate([[0], ends]), config.bands * config.rows)
        for row in range(config.rows):
            keys = mix64(keys + table[row :: config.rows]).reshape(keys.shape)
        keys = fold(key_of("band"), np.arange(config.bands))[:, None] ^ keys
    documents = np.broadcast_to(wanted + first, keys.shape).astype(np.uint64)
    return np.stack([mix64(keys.reshape(-1)), documents.reshape(-1)])


def _candidates(rows: np.ndarray) -> np.ndarray:
    """Pairs later << 32 | earlier of documents that share a band."""
    key, document = rows
    place = np.arange(len(key))
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    start = np.maximum.accumulate(np.where(new, place, 0)) if len(key) else place
    pairs = []
    for back in [*range(1, CANDIDATES + 1), None]:
        other = start if back is None else place - back
        ok = np.flatnonzero((other >= start) & (other < place))
        pairs.append(document[ok] << np.uint64(POSITION) | document[other[ok]])
    return np.unique(np.concatenate(pairs))[None]


def _verify(task: tuple[int, int], pairs: str, folder: str, parts: Sequence[Shard],
            threshold: float) -> tuple[np.ndarray, np.ndarray]:
    pair_P = np.load(pairs, mmap_mode="r")[0, task[0] : task[1]]
    later = (pair_P >> np.uint64(POSITION)).astype(np.int64)
    earlier = (pair_P & np.uint64((1 << POSITION) - 1)).astype(np.int64)
    firsts = np.array([part.first for part in parts])

    @functools.cache
    def opened(shard: int) -> tuple[np.ndarray, np.ndarray]:
        load = functools.partial(np.load, mmap_mode="r")
        return load(f"{folder}/{parts[shard].name}.sets.npy"), load(f"{folder}/{parts[shard].name}.bounds.npy")

    @functools.lru_cache(maxsize=4096)
    def of(document: int) -> np.ndarray:
        shard = int(np.searchsorted(firsts, document, side="right")) - 1
        sets, bounds = opened(shard)
        return np.asarray(sets[bounds[document - firsts[shard]] : bounds[document - firsts[shard] + 1]])

    similar_P = np.array([jaccard(of(a), of(b)) for a, b in zip(later.tolist(), earlier.tolist(), strict=True)])
    keep = similar_P >= threshold
    return np.stack([later, earlier]).astype(np.uint64)[:, keep], similar_P[keep]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sorted arrays without repetitions."""
    a, b = (a, b) if len(a) < len(b) else (b, a)
    if not len(a):
        return 0.0
    at = np.searchsorted(b, a)
    at[at == len(b)] = 0
    shared = int(np.count_nonzero(b[at] == a))
    return shared / (len(a) + len(b) - shared)


def repeats(engine: Engine, parts: Sequence[Shard], removed: Sequence[str], config: DedupConfig, folder: str,
            kind: str) -> str:
    """Windows of words or lines that have come before.

    kind: `windows` or `lines`.
    Returns:
      a .npy of uint64 [1, n]: document << 32 | number of the window's first word, or of the line; sorted.
    """
    spill = os.path.join(folder, "spill", kind)
    emit = functools.partial(_units, removed=tuple(removed), config=config, kind=kind)
    reduce = functools.partial(_again, documents=config.line_documents if kind == "lines" else 0)
    files = engine.group(emit, parts, reduce, spill)
    engine.sort(files, spill, out := os.path.join(folder, f"{kind}.npy"))
    return out


def _units(part: Shard, removed: Sequence[str], config: DedupConfig, kind: str) -> np.ndarray:
    gone = np.concatenate([between(np.load(path, mmap_mode="r"), part.first, part.end)[0] for path in removed])
    texts = shards.texts(part)
    for number in gone.tolist():
        texts[number - part.first] = ""
    out = [np.zeros((2, 0), np.uint64)]
    for base, group in batches(texts):
        hashes, doc, number = unit_hashes(group, config, kind)
        place = (doc + (part.first + base)).astype(np.uint64) << np.uint64(POSITION) | number.astype(np.uint64)
        out.append(np.stack([hashes, place]))
    return np.concatenate(out, axis=1)


def unit_hashes(texts: Sequence[str], config: DedupConfig, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hash, text, number of the first word or of the line) of every window of words, or of every long line."""
    if kind == "windows":
        words = split(texts)
        hashes, first = ngrams(words, config.window)
        return hashes, words.doc_W[first], first - words.bounds_D1[words.doc_W[first]]
    lines = split(texts, "lines")
    first = np.flatnonzero(lines.end_W - lines.start_W >= config.line_chars)
    return lines.hash_W[first], lines.doc_W[first], first - lines.bounds_D1[lines.doc_W[first]]


def _again(rows: np.ndarray, documents: int) -> np.ndarray:
    """Places of keys seen before; with `documents`, only of keys in more documents than that, and not in the first."""
    key, place = rows
    rows = rows[:, np.lexsort((place, key))]
    key, place = rows
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    if not documents:
        return place[~new][None]
    group = np.cumsum(new) - 1
    document = place >> np.uint64(POSITION)
    fresh = new | np.concatenate([[True], document[1:] != document[:-1]])[: len(key)]
    enough = np.bincount(group, fresh, minlength=1) > documents
    first = document[new][group] if len(key) else document
    return place[enough[group] & (document != first)][None]


def cut(text: str, windows: np.ndarray, lines: np.ndarray, config: DedupConfig) -> tuple[str, list[tuple[str, str]]]:
    """The text without repeated windows (first words) and lines (numbers), and (kind, piece) of all that was cut."""
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


def facts_of(config: DedupConfig, step: str) -> dict[str, Any]:
    """The part of the config that decides a step: `near` or `cuts`."""
    keys = {"near": ("threshold", "shingle", "bands", "rows"),
            "cuts": ("window", "line_documents", "line_chars")}[step]
    return {key: getattr(config, key) for key in keys}
