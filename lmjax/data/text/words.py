"""Words, lines and their n-grams as 64-bit hashes, for many texts at once, in NumPy.

Texts become one array of code points. The hash of a run of characters is a difference of prefix
sums of v(c) * P**i modulo 2**64. v is random-looking and the same for both cases of a letter. P is
odd and so has an inverse: multiplying by P**-start makes the hash independent of the run's place.
Two different runs share a hash about once in 2**64 pairs.

Chinese and Japanese are written without spaces: each of their characters is a word of its own.

Shape legend: C characters, W units (words, tokens or lines), G n-grams, D texts.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.data.hashing import key_of, mix64

BATCH_CHARS = 1 << 20  # characters of texts that are hashed together, which takes some 60 MB
SEPARATOR, LETTER, OTHER, UNSPACED = 0, 1, 2, 3  # classes of characters
UNSPACED_RANGES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
                   (0x20000, 0x3FFFF))
_P = int(key_of("character")) | 1
_Q = np.uint64(int(key_of("word")) | 1)
# Below this, Python gives class and case; above it, all code points are Han.
_TABLED = 0x20000


class Words(NamedTuple):
    """The units (words, tokens or lines) of D texts, in order."""

    doc_W: np.ndarray      # the text of each unit, int64
    start_W: np.ndarray    # where the unit begins in its text, in characters
    end_W: np.ndarray      # where it ends
    hash_W: np.ndarray     # its hash, uint64
    bounds_D1: np.ndarray  # the units of text d are bounds_D1[d] : bounds_D1[d + 1]
    codes_C: np.ndarray    # code points of all texts, with a newline after each text
    offset_D: np.ndarray   # where each text begins in codes_C


@functools.cache
def classes() -> np.ndarray:
    """The class of every code point: uint8 [0x110000]."""
    table = np.full(sys.maxunicode + 1, OTHER, np.uint8)
    for code in range(_TABLED):
        character = chr(code)
        if character.isspace():
            table[code] = SEPARATOR
        elif (character.isalnum() or character == "_"
              or unicodedata.category(character).startswith("M")):
            table[code] = LETTER
    for first, last in UNSPACED_RANGES:
        table[first : last + 1] = UNSPACED
    return table


@functools.cache
def _units() -> dict[str, np.ndarray]:
    """The role of every code point in each unit: SEPARATOR, LETTER (joins) or UNSPACED (alone)."""
    of = classes()
    words = np.where(of == OTHER, SEPARATOR, of).astype(np.uint8)
    tokens = np.where(of == OTHER, LETTER, of).astype(np.uint8)
    lines = np.full(len(of), LETTER, np.uint8)
    lines[ord("\n")] = SEPARATOR
    return {"words": words, "tokens": tokens, "lines": lines}


@functools.cache
def _values() -> np.ndarray:
    """v(c) of every code point, uint64 [0x110000]."""
    codes = np.arange(sys.maxunicode + 1, dtype=np.uint64)
    for code in range(_TABLED):
        lower = chr(code).lower()
        if len(lower) == 1:
            codes[code] = ord(lower)
    return mix64(codes + key_of("letter"))


@functools.lru_cache(maxsize=1)
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """P**i and P**-i for i in range(n), uint64 each."""
    def powers(p: int) -> np.ndarray:
        out = np.full(n, p, np.uint64)
        out[0] = 1
        return np.cumprod(out, dtype=np.uint64)

    return powers(_P), powers(pow(_P, -1, 1 << 64))


def batches(texts: Sequence[str], chars: int = BATCH_CHARS) -> Iterator[tuple[int, Sequence[str]]]:
    """Groups neighbouring texts of up to `chars` characters together: (index of the first, texts).

    A longer text is a group of its own.
    """
    first = size = 0
    for i, text in enumerate(texts):
        if i > first and size + len(text) > chars:
            yield first, texts[first:i]
            first, size = i, 0
        size += len(text)
    if len(texts) > first:
        yield first, texts[first:]


def split(texts: Sequence[str], unit: str = "words") -> Words:
    """Cuts texts into units, whose hashes depend neither on case nor on the other texts.

    Args:
      texts: what to cut.
      unit: `words` (runs of letters and digits), `tokens` (runs of anything but spaces) or `lines`.
    """
    codes_C = np.frombuffer("".join(f"{text}\n" for text in texts).encode("utf-32-le"), np.uint32)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
    offset_D = np.cumsum(lengths) - lengths
    class_C = _units()[unit][codes_C]
    before_C = np.concatenate([np.zeros(1, np.uint8), class_C[:-1]])
    edge_C = (class_C != before_C) | (class_C == UNSPACED)
    start_W = np.flatnonzero(edge_C & (class_C != SEPARATOR))
    # Each text ends in a separator.
    end_W = np.flatnonzero(edge_C[1:] & (class_C[:-1] != SEPARATOR)) + 1
    bounds = np.searchsorted(start_W, np.append(offset_D, len(codes_C)))
    doc_W = np.repeat(np.arange(len(texts)), np.diff(bounds))
    base_W = offset_D[doc_W]
    hash_W = hash_runs(codes_C, start_W, end_W)
    return Words(doc_W, start_W - base_W, end_W - base_W, hash_W, bounds, codes_C, offset_D)


def hash_runs(codes_C: np.ndarray, start_W: np.ndarray, end_W: np.ndarray) -> np.ndarray:
    """Hashes of the runs start_W : end_W of an array of code points; uint64 [W]."""
    n = len(codes_C)
    power, inverse = _powers(max(1 << (n - 1).bit_length(), BATCH_CHARS) if n else 1)
    sums = np.zeros(n + 1, np.uint64)
    np.cumsum(_values()[codes_C] * power[:n], dtype=np.uint64, out=sums[1:])
    return mix64((sums[end_W] - sums[start_W]) * inverse[start_W])


def ngrams(words: Words, n: int, *, shorter: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The runs of n units within one text.

    Args:
      words: the units of the texts.
      n: units in a run.
      shorter: whether a text of fewer than n units gives one n-gram of all its units.
    Returns:
      (hash_G uint64, index of the first unit of each n-gram, int64), in the order of the texts.
    """
    first_G = np.arange(max(len(words.hash_W) - n + 1, 0))
    first_G = first_G[words.doc_W[first_G] == words.doc_W[first_G + n - 1]]
    hash_G = words.hash_W[first_G]
    for k in range(1, n):
        hash_G = hash_G * _Q + words.hash_W[first_G + k]
    if not shorter:
        return mix64(hash_G), first_G
    extra = []
    count_D = np.diff(words.bounds_D1)
    for d in np.flatnonzero((count_D > 0) & (count_D < n)):
        h = np.zeros(1, np.uint64)
        for value in words.hash_W[words.bounds_D1[d] : words.bounds_D1[d + 1]]:
            h = h * _Q + value
        extra.append(h + np.uint64(count_D[d]))
    if extra:
        first_G = np.concatenate([first_G, words.bounds_D1[:-1][(count_D > 0) & (count_D < n)]])
        hash_G = np.concatenate([hash_G, *extra])
        order = np.argsort(first_G, kind="stable")
        first_G, hash_G = first_G[order], hash_G[order]
    return mix64(hash_G), first_G
