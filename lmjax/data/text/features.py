"""Features of texts that the filters bound, computed for many texts at once.

Features count words. Chinese and Japanese put no spaces between words, so each of their characters
counts as a word.

Shape legend: C characters, W words, G n-grams, D texts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.data.hashing import mix64
from lmjax.data.text import language
from lmjax.data.text.words import LETTER, UNSPACED, Words, classes, split

BULLETS = ("\u2022", "\u2023", "\u25e6", "\u25cf", "\u25cb", "\u25a0", "\u30fb", "\u00b7", "-", "*")
ELLIPSES = ("...", "\u2026")
SENTENCE_END = re.compile(r"[.!?](?=[\s\"'\u201d)]|\Z)|[\u3002\uff01\uff1f]")
PUNCTUATION = tuple(".!?,;:\"'\u201d\u2019)"
                    "\u3002\uff01\uff1f\u3001\uff0c\uff1b\uff1a\u300d\u300f\uff09\u2026")
SHORT_LINE = 30  # characters; half as many in unspaced text, whose characters say twice as much
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
# Features that mean nothing without spaces between words.
SPACED_ONLY = {"mean_word_chars", "stop_words"}


class Repeats(NamedTuple):
    """The n-grams that occur more than once in their text."""

    first: np.ndarray  # the n-gram's first word
    hash: np.ndarray   # its hash, which also depends on its text
    often: np.ndarray  # how often it occurs in the text
    again: np.ndarray  # whether it occurred before in the text


class TextBatch:
    """Texts, and what their features have in common, each computed at its first use."""

    def __init__(self, texts: Sequence[str]):
        self.texts, self.size = texts, len(texts)
        self._repeats: dict[int, Repeats] = {}

    @functools.cached_property
    def tokens(self) -> Words:
        """The strings between spaces, with their punctuation."""
        return split(self.texts, "tokens")

    @functools.cached_property
    def words(self) -> Words:
        """The runs of letters and digits."""
        return split(self.texts)

    @functools.cached_property
    def languages(self) -> list[str]:
        """ISO 639-1 code of each text, or `und`."""
        return language.identify(self.words)

    @functools.cached_property
    def count(self) -> np.ndarray:
        """Number of tokens of each text, int64 [D]."""
        return np.diff(self.tokens.bounds_D1)

    @functools.cached_property
    def chars_W(self) -> np.ndarray:
        """Characters of each token, int64 [W]."""
        return self.tokens.end_W - self.tokens.start_W

    @functools.cached_property
    def chars(self) -> np.ndarray:
        """Characters in the tokens of each text, [D]."""
        return self.per_text(self.chars_W)

    @functools.cached_property
    def unspaced(self) -> np.ndarray:
        """Whether over 0.3 of a text's letters are Chinese or Japanese, bool [D]."""
        class_C = classes()[self.tokens.codes_C]
        east = self._count(class_C == UNSPACED)
        return east > 0.3 * np.maximum(east + self._count(class_C == LETTER), 1)

    @functools.cached_property
    def lines(self) -> list[list[str]]:
        """The lines of each text, stripped of spaces, without empty lines."""
        return [list(filter(None, map(str.strip, text.split("\n")))) for text in self.texts]

    @functools.cached_property
    def paragraphs(self) -> list[list[str]]:
        """The non-empty parts of each text between blank lines."""
        return [[part for part in text.split("\n\n") if part.strip()] for text in self.texts]

    def per_text(self, value_W: np.ndarray) -> np.ndarray:
        """Sums over the tokens of each text, [D]."""
        return np.bincount(self.tokens.doc_W, value_W, self.size)

    def repeats(self, n: int) -> Repeats:
        """The n-grams of tokens that a text has more than once."""
        if n not in self._repeats:
            self._repeats[n] = self._find_repeats(n)
        return self._repeats[n]

    def _count(self, flag_C: np.ndarray) -> np.ndarray:
        """Number of characters of each text with a flag, [D]."""
        sums = np.concatenate([[0], np.cumsum(flag_C)])
        return np.diff(sums[np.append(self.tokens.offset_D, len(flag_C))])

    def _find_repeats(self, n: int) -> Repeats:
        hash_W, doc_W = self.tokens.hash_W, self.tokens.doc_W
        if n == 1:
            first_G = np.arange(len(hash_W))
            return Repeats(first_G, hash_W + mix64(doc_W), first_G, first_G > 0)
        shorter = self.repeats(n - 1)  # a repeated n-gram begins with a repeated (n-1)-gram
        inside_G = shorter.first + n - 1 < len(doc_W)
        first_G, hash_G = shorter.first[inside_G], shorter.hash[inside_G]
        inside_G = doc_W[first_G] == doc_W[first_G + n - 1]
        first_G, hash_G = first_G[inside_G], hash_G[inside_G]
        hash_G = mix64(hash_G + hash_W[first_G + n - 1])
        order = np.argsort(hash_G)
        ordered = hash_G[order]
        new = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
        starts = np.flatnonzero(new)
        times = np.diff(starts, append=len(ordered))
        earliest = np.minimum.reduceat(first_G[order], starts) if len(starts) else first_G
        repeated = np.repeat(times > 1, times)
        chosen = order[repeated]
        again = first_G[chosen] != np.repeat(earliest, times)[repeated]
        return Repeats(first_G[chosen], hash_G[chosen], np.repeat(times, times)[repeated], again)


Feature = Callable[[TextBatch], np.ndarray]  # one value per text, [D]


def _share(part: Sequence[int] | np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.asarray(part, float) / np.maximum(whole, 1)


def _per_word(signs: Sequence[str]) -> Feature:
    return lambda batch: _share([sum(map(text.count, signs)) for text in batch.texts], batch.count)


def _lines_that(test: Callable[[str, tuple[str, ...]], bool], signs: tuple[str, ...]) -> Feature:
    return lambda batch: np.array([sum([test(line, signs) for line in lines]) / max(len(lines), 1)
                                   for lines in batch.lines])


def _short_lines(batch: TextBatch) -> np.ndarray:
    limit_D = np.where(batch.unspaced, SHORT_LINE // 2, SHORT_LINE)
    return np.array([sum([len(line) < limit for line in lines]) / max(len(lines), 1)
                     for lines, limit in zip(batch.lines, limit_D.tolist(), strict=True)])


def _alphabetic_words(batch: TextBatch) -> np.ndarray:
    alphabetic_C = _is_alpha()[batch.tokens.codes_C]
    sums = np.concatenate([[0], np.cumsum(alphabetic_C)])
    base_W = batch.tokens.offset_D[batch.tokens.doc_W]
    has_letter_W = sums[base_W + batch.tokens.end_W] > sums[base_W + batch.tokens.start_W]
    return _share(batch.per_text(has_letter_W), batch.count)


@functools.cache
def _is_alpha() -> np.ndarray:
    """`str.isalpha` of every code point, bool [0x110000]."""
    table = np.zeros(0x110000, bool)
    table[:0x20000] = [chr(code).isalpha() for code in range(0x20000)]
    table[0x20000:0x40000] = True
    return table


@functools.cache
def _stop_words(code: str) -> np.ndarray:
    """Hashes of the stop words of a language, sorted."""
    if code in ("en", language.UNDETERMINED):
        words = " ".join(STOP_WORDS)
    else:
        words = language.FUNCTION_WORDS.get(code, "")
    return np.unique(split([words]).hash_W)


def _stop_word_count(batch: TextBatch) -> np.ndarray:
    """Number of different stop words; infinite for a language whose stop words are not known."""
    out = np.full(batch.size, np.inf)
    words = batch.words
    for d, code in enumerate(batch.languages):
        stops = _stop_words(code)
        if len(stops):
            out[d] = np.isin(stops, words.hash_W[words.bounds_D1[d] : words.bounds_D1[d + 1]]).sum()
    return out


def _duplicates(parts: Sequence[Sequence[str]], chars: bool) -> np.ndarray:
    """Share of the parts (or of their characters) that occurred before in the same text."""
    size: Callable[[str], int] = len if chars else lambda item: 1

    def share(items: Sequence[str]) -> float:
        if len(set(items)) == len(items):
            return 0.0
        return 1 - sum(map(size, set(items))) / sum(map(size, items))
    return np.array([share(items) for items in parts])


def _top_ngram(n: int) -> Feature:
    """Share of characters in the most frequent n-gram, the longest of equally frequent ones."""
    def feature(batch: TextBatch) -> np.ndarray:
        first, _, often, _ = batch.repeats(n)
        sums = np.concatenate([[0], np.cumsum(batch.chars_W)])
        chars = sums[first + n] - sums[first]
        best = np.zeros(batch.size, np.int64)
        np.maximum.at(best, batch.tokens.doc_W[first], (often << 32) + chars)
        return _share((best >> 32) * (best & 0xFFFFFFFF), batch.chars)
    return feature


def _duplicate_ngrams(n: int) -> Feature:
    """Share of characters in n-grams that occurred before, each character counted once."""
    def feature(batch: TextBatch) -> np.ndarray:
        first, _, _, again = batch.repeats(n)
        edge = np.zeros(len(batch.chars_W) + 1, np.int64)
        np.add.at(edge, first[again], 1)
        np.add.at(edge, first[again] + n, -1)
        return _share(batch.per_text(batch.chars_W * (np.cumsum(edge)[:-1] > 0)), batch.chars)
    return feature


FEATURES: dict[str, Feature] = {
    "words": lambda batch: batch.count,
    "mean_word_chars": lambda batch: _share(batch.chars, batch.count),
    "hashes_per_word": _per_word("#"),
    "ellipses_per_word": _per_word(ELLIPSES),
    "bullet_lines": _lines_that(str.startswith, BULLETS),
    "ellipsis_lines": _lines_that(str.endswith, ELLIPSES),
    "alphabetic_words": _alphabetic_words,
    "stop_words": _stop_word_count,
    "duplicate_lines": lambda batch: _duplicates(batch.lines, False),
    "duplicate_line_chars": lambda batch: _duplicates(batch.lines, True),
    "duplicate_paragraphs": lambda batch: _duplicates(batch.paragraphs, False),
    "duplicate_paragraph_chars": lambda batch: _duplicates(batch.paragraphs, True),
    **{f"top_{n}gram_chars": _top_ngram(n) for n in (2, 3, 4)},
    **{f"duplicate_{n}gram_chars": _duplicate_ngrams(n) for n in range(5, 11)},
    "sentences": lambda batch: np.array([sum(1 for _ in SENTENCE_END.finditer(t))
                                         for t in batch.texts]),
    "braces": lambda batch: np.array([text.count("{") for text in batch.texts]),
    "lorem_ipsum": lambda batch: np.array(["lorem ipsum" in text.lower() for text in batch.texts]),
    "punctuated_lines": _lines_that(str.endswith, PUNCTUATION),
    "short_lines": _short_lines,
}
