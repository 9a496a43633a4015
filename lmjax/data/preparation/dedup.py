"""Finds documents that occur twice: equal ones and near copies.

Both are a `group` of `engine.Engine` by 64-bit hashes. Of several copies the first document stays.
A document is removed as a near copy only for a document that stays, and only after their Jaccard
similarity has been computed in full: MinHash with bands (Broder, 1997; Indyk and Motwani, 1998)
merely proposes candidates.

Shape legend: G shingles, D documents, K permutations, B bands, N records, P pairs.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from lmjax.data.config import DedupConfig
from lmjax.data.hashing import fold, key_of, mix64
from lmjax.data.preparation import shards
from lmjax.data.preparation.engine import Engine, between
from lmjax.data.preparation.shards import Shard, shard_of
from lmjax.data.text.words import batches, ngrams, split

CANDIDATES = 16  # a document is compared with the 16 before it in its band, and with the first
PAIRS = 20_000  # compared per task of a worker
_DOCUMENT_BITS = np.uint64(32)  # a pair is one integer: later document << 32 | earlier document
_LOWER = bytes(range(256)).lower()
_SPACES = b" \t\n\r\v\f"


def exact(engine: Engine, parts: Sequence[Shard], folder: str, removed: str = "") -> np.ndarray:
    """Finds documents that equal an earlier one except for spaces and ASCII case.

    Args:
      engine: groups the documents.
      parts: the shards of the corpus.
      removed: .npy of documents to leave out, uint64 [_, N], sorted by document; "": none.
      folder: for `removed.npy`, which holds the result, and for spilled records in `spill`.
    Returns:
      uint64 [2, N]: the number of each copy and of the document that stays, sorted by copy.
    """
    spill = os.path.join(folder, "spill")
    files = engine.group(functools.partial(_digests, removed=removed), parts, _copies, spill)
    count = engine.sort(files, spill, out := os.path.join(folder, "removed.npy"))
    return np.load(out) if count else np.zeros((2, 0), np.uint64)


def _digest(raw: bytes | memoryview) -> bytes:
    """Hashes UTF-8 text to 16 bytes that ignore spaces and ASCII case."""
    return hashlib.blake2b(bytes(raw).translate(_LOWER, _SPACES), digest_size=16).digest()


def _digests(part: Shard, removed: str) -> np.ndarray:
    """Records (first half of the digest, second half, document): uint64 [3, D]."""
    data = b"".join(map(_digest, shards.raw_texts(part)))
    halves = np.frombuffer(data, "<u8").reshape(-1, 2).T
    rows = np.stack([halves[0], halves[1], np.arange(part.first, part.end, dtype=np.uint64)])
    if not removed:
        return rows
    gone = between(np.load(removed, mmap_mode="r"), part.first, part.end)[0]
    return rows[:, ~np.isin(rows[2], gone)]


def _copies(rows: np.ndarray) -> np.ndarray:
    """Turns records of `_digests` into pairs (copy, the first document with that digest)."""
    rows = rows[:, np.lexsort((rows[2], rows[1], rows[0]))]
    new = np.ones(rows.shape[1], bool)
    new[1:] = (rows[:2, 1:] != rows[:2, :-1]).any(axis=0)
    kept = rows[2][np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
    return np.stack([rows[2], kept])[:, ~new]


def near(engine: Engine, parts: Sequence[Shard], removed: str, config: DedupConfig,
         folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Finds documents that are nearly equal to one that stays.

    Args:
      engine: groups the documents.
      parts: the shards of the corpus.
      removed: .npy of documents to leave out, uint64 [_, N], sorted by document (the first row).
      config: the threshold, the shingles and the bands.
      folder: for `spill`, which holds shingles and spilled records; the caller removes it.
    Returns:
      uint64 [2, N]: the number of each near copy and of the document that stays, sorted by copy;
      float64 [N]: their Jaccard similarity.
    """
    spill = os.path.join(folder, "spill")
    os.makedirs(spill)
    emit = functools.partial(_bands, removed=removed, config=config, folder=spill)
    files = engine.group(emit, parts, _candidates, os.path.join(spill, "bands"))
    pairs = os.path.join(spill, "pairs.npy")
    count = engine.sort(files, os.path.join(spill, "pairs"), pairs)
    tasks = [(low, min(low + PAIRS, count)) for low in range(0, count, PAIRS)]
    verify = functools.partial(_verify, pairs=pairs, folder=spill, parts=parts,
                               threshold=config.threshold)
    found = [(np.zeros((2, 0), np.uint64), np.zeros(0)), *engine.map(verify, tasks)]
    return _greedy(np.concatenate([pairs_2P for pairs_2P, _ in found], axis=1),
                   np.concatenate([similar_P for _, similar_P in found]))


def _greedy(pairs_2P: np.ndarray, similar_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decides document by document: it goes if it is similar to an earlier one that stays.

    Of several such documents the most similar one is named, and of equally similar ones the
    earliest.
    """
    order = np.lexsort((pairs_2P[1], -similar_P, pairs_2P[0]))
    gone: dict[int, tuple[int, float]] = {}
    sorted_pairs = zip(*pairs_2P[:, order].tolist(), similar_P[order].tolist(), strict=True)
    for later, earlier, value in sorted_pairs:
        if later not in gone and earlier not in gone:
            gone[later] = earlier, value
    rows = [(later, earlier) for later, (earlier, _) in gone.items()]
    found = np.array(rows, np.uint64).reshape(-1, 2).T  # the memory order is part of the file
    return found, np.array([value for _, value in gone.values()])


def shingle_sets(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each text's set of shingles: its runs of n words, or all its words if it has fewer.

    Returns:
      uint64 [G]: 48-bit hashes, sorted and without repetitions per text;
      int64 [D + 1]: where each text's hashes begin.
    """
    sets, sizes = [], [np.zeros(1, np.int64)]
    for _, group in batches(texts):
        for low in range(0, len(group), 1 << 16):  # the text's number takes 16 bits above the hash
            words = split(group[low : low + (1 << 16)])
            hash_G, first_G = ngrams(words, n, shorter=True)
            text_G = words.doc_W[first_G].astype(np.uint64)
            key_G = np.sort(text_G << np.uint64(48) | hash_G >> np.uint64(16))
            key_G = key_G[np.concatenate([[True], key_G[1:] != key_G[:-1]])[: len(key_G)]]
            sizes.append(np.bincount((key_G >> np.uint64(48)).astype(np.int64),
                                     minlength=len(words.offset_D)))
            sets.append(key_G & np.uint64((1 << 48) - 1))
    return np.concatenate([np.zeros(0, np.uint64), *sets]), np.cumsum(np.concatenate(sizes))


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an odd factor and a summand per permutation: uint32 [K] each."""
    numbers = fold(key_of("minhash"), np.arange(count))
    return (numbers.astype(np.uint32) | np.uint32(1)), (numbers >> np.uint64(32)).astype(np.uint32)


def signatures(set_G: np.ndarray, bounds_D1: np.ndarray, count: int) -> np.ndarray:
    """Computes MinHash signatures of sets, none of which is empty.

    Args:
      set_G: the hashes of all sets, one set after the other.
      bounds_D1: where each set begins.
      count: the number of permutations.
    Returns:
      uint32 [K, D]. Two documents agree in a row with a probability equal to their Jaccard
      similarity.
    """
    x_G = mix64(set_G).astype(np.uint32)
    scale_K, shift_K = _permutations(count)
    out = np.empty((count, len(bounds_D1) - 1), np.uint32)
    # Each permutation is a bijection of 32-bit integers; a linear one alone is not random enough.
    for k in range(count):
        y_G = (x_G + shift_K[k]) * scale_K[k]
        y_G = (y_G ^ y_G >> np.uint32(16)) * np.uint32(0x85EBCA6B)
        np.minimum.reduceat(y_G, bounds_D1[:-1], out=out[k])
    return out


def _bands(part: Shard, removed: str, config: DedupConfig, folder: str) -> np.ndarray:
    """Writes the shingles of a shard's documents and returns their `_band_keys`."""
    set_G, bounds = shingle_sets(shards.texts(part), config.shingle)
    np.save(os.path.join(folder, f"{part.name}.sets.npy"), set_G)
    np.save(os.path.join(folder, f"{part.name}.bounds.npy"), bounds)
    gone = between(np.load(removed, mmap_mode="r"), part.first, part.end)[0] - np.uint64(part.first)
    wanted = np.diff(bounds) > 0
    wanted[gone.astype(np.int64)] = False
    return _band_keys(set_G, bounds, np.flatnonzero(wanted), part.first, config)


def _band_keys(set_G: np.ndarray, bounds_D1: np.ndarray, wanted: np.ndarray, first: int,
               config: DedupConfig) -> np.ndarray:
    """Hashes each band of the documents' signatures.

    Args:
      set_G: the shingles of all documents, one document after the other.
      bounds_D1: where each document's shingles begin.
      wanted: the indices of the documents to take.
      first: the number of the document with index 0.
      config: how many bands there are, and how many rows of the signature each has.
    Returns:
      records (hash of a band, document): uint64 [2, B * len(wanted)].
    """
    sizes = np.diff(bounds_D1)[wanted]
    ends = np.cumsum(sizes)
    at = np.arange(ends[-1] if len(ends) else 0)
    at += np.repeat(bounds_D1[wanted] - (ends - sizes), sizes)
    keys = np.zeros((config.bands, len(wanted)), np.uint64)
    if len(wanted):
        table = signatures(set_G[at], np.concatenate([[0], ends]), config.bands * config.rows)
        for row in range(config.rows):
            keys = mix64(keys + table[row :: config.rows]).reshape(keys.shape)
        keys = fold(key_of("band"), np.arange(config.bands))[:, None] ^ keys
    documents = np.broadcast_to(wanted + first, keys.shape).astype(np.uint64)
    return np.stack([mix64(keys.reshape(-1)), documents.reshape(-1)])


def _candidates(rows: np.ndarray) -> np.ndarray:
    """Turns records of `_band_keys` into pairs of documents that share a band: uint64 [1, P]."""
    key, document = rows
    place = np.arange(len(key))
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    start = np.maximum.accumulate(np.where(new, place, 0)) if len(key) else place
    pairs = []
    for back in [*range(1, CANDIDATES + 1), None]:
        other = start if back is None else place - back
        ok = np.flatnonzero((other >= start) & (other < place))
        pairs.append(document[ok] << _DOCUMENT_BITS | document[other[ok]])
    return np.unique(np.concatenate(pairs))[None]


def _verify(task: tuple[int, int], pairs: str, folder: str, parts: Sequence[Shard],
            threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Computes the similarity of a range of pairs; returns those that reach the threshold."""
    pair_P = np.load(pairs, mmap_mode="r")[0, task[0] : task[1]]
    later = (pair_P >> _DOCUMENT_BITS).astype(np.int64)
    earlier = pair_P.astype(np.uint32).astype(np.int64)

    @functools.cache
    def opened(shard: int) -> tuple[np.ndarray, np.ndarray]:
        load = functools.partial(np.load, mmap_mode="r")
        name = parts[shard].name
        return load(f"{folder}/{name}.sets.npy"), load(f"{folder}/{name}.bounds.npy")

    @functools.lru_cache(maxsize=4096)
    def set_of(document: int) -> np.ndarray:
        shard = shard_of(parts, document)
        sets, bounds = opened(shard)
        index = document - parts[shard].first
        return np.asarray(sets[bounds[index] : bounds[index + 1]])

    similar_P = np.array([_jaccard(set_of(a), set_of(b))
                          for a, b in zip(later.tolist(), earlier.tolist(), strict=True)])
    keep = similar_P >= threshold
    return np.stack([later, earlier]).astype(np.uint64)[:, keep], similar_P[keep]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Computes |a and b| / |a or b| of two sorted arrays without repetitions; 0 if one is empty."""
    a, b = (a, b) if len(a) < len(b) else (b, a)
    if not len(a):
        return 0.0
    at = np.searchsorted(b, a)
    at[at == len(b)] = 0
    shared = int(np.count_nonzero(b[at] == a))
    return shared / (len(a) + len(b) - shared)
