"""Published filters, by name: a text is dropped when a feature of it is out of its bounds.

A family is a dataclass. A field `min_x` is the least that feature `x` may be, `max_x` the most; the defaults are the
published ones. Features count words. Chinese and Japanese put no spaces between theirs: each character counts as one,
and features that mean nothing then (`SPACED_ONLY`) are not looked at.

Shape legend: C characters, W words, G n-grams, D texts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.hashing import mix64
from lmjax.data.text import language
from lmjax.data.text.words import LETTER, UNSPACED, Words, classes, split

BULLETS = ("\u2022", "\u2023", "\u25e6", "\u25cf", "\u25cb", "\u25a0", "\u30fb", "\u00b7", "-", "*")
ELLIPSES = ("...", "\u2026")
SENTENCE_END = re.compile(r"[.!?](?=[\s\"'\u201d)]|\Z)|[\u3002\uff01\uff1f]")
PUNCTUATION = tuple(".!?,;:\"'\u201d\u2019)\u3002\uff01\uff1f\u3001\uff0c\uff1b\uff1a\u300d\u300f\uff09\u2026")
SHORT_LINE = 30  # characters; half as many where a character says as much as two letters
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass(frozen=True)
class GopherQuality:
    """Rae et al., "Scaling Language Models", 2021, appendix A.1.1. Stop words are those of the text's language."""

    min_words: float = 50
    max_words: float = 100_000
    min_mean_word_chars: float = 3
    max_mean_word_chars: float = 10
    max_hashes_per_word: float = 0.1
    max_ellipses_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: float = 2


@dataclass(frozen=True)
class GopherRepetition:
    """Rae et al., 2021, table A1: shares of lines, paragraphs and characters that are repeated."""

    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_chars: float = 0.20
    max_duplicate_paragraph_chars: float = 0.20
    max_top_2gram_chars: float = 0.20
    max_top_3gram_chars: float = 0.18
    max_top_4gram_chars: float = 0.16
    max_duplicate_5gram_chars: float = 0.15
    max_duplicate_6gram_chars: float = 0.14
    max_duplicate_7gram_chars: float = 0.13
    max_duplicate_8gram_chars: float = 0.12
    max_duplicate_9gram_chars: float = 0.11
    max_duplicate_10gram_chars: float = 0.10


@dataclass(frozen=True)
class C4:
    """Raffel et al., 2020, section 2.2; its rules for lines are the cleaning rule `c4_lines`."""

    min_sentences: float = 3
    max_braces: float = 0
    max_lorem_ipsum: float = 0


@dataclass(frozen=True)
class FineWeb:
    """Penedo et al., "The FineWeb Datasets", 2024, section 3.6."""

    min_punctuated_lines: float = 0.12
    max_duplicate_line_chars: float = 0.10
    max_short_lines: float = 0.67


FAMILIES = {"gopher_quality": GopherQuality, "gopher_repetition": GopherRepetition, "c4": C4, "fineweb": FineWeb}
SPACED_ONLY = {"mean_word_chars", "stop_words"}


class Repeats(NamedTuple):
    """N-grams: the first word of each, its hash (of its text, too), how often it is there, whether seen before."""

    first: np.ndarray
    hash: np.ndarray
    often: np.ndarray
    again: np.ndarray


class Batch:
    """Texts, and what the features have in common, worked out when it is first asked for."""

    def __init__(self, texts: Sequence[str]):
        self.texts, self.size = texts, len(texts)
        self._repeats: dict[int, Repeats] = {}

    @functools.cached_property
    def tokens(self) -> Words:
        """What lies between spaces, punctuation and all."""
        return split(self.texts, "tokens")

    @functools.cached_property
    def words(self) -> Words:
        return split(self.texts)

    @functools.cached_property
    def languages(self) -> list[str]:
        return language.identify(self.words)

    @functools.cached_property
    def count(self) -> np.ndarray:
        return np.diff(self.tokens.bounds_D1)

    @functools.cached_property
    def chars_W(self) -> np.ndarray:
        return self.tokens.end_W - self.tokens.start_W

    @functools.cached_property
    def chars(self) -> np.ndarray:
        return self.per_text(self.chars_W)

    @functools.cached_property
    def unspaced(self) -> np.ndarray:
        """Whether most of a text's letters are Chinese or Japanese ones."""
        class_C = classes()[self.tokens.codes_C]
        def total(flag_C: np.ndarray) -> np.ndarray:
            sums = np.concatenate([[0], np.cumsum(flag_C)])
            return np.diff(sums[np.append(self.tokens.offset_D, len(flag_C))])
        east = total(class_C == UNSPACED)
        return east > 0.3 * np.maximum(east + total(class_C == LETTER), 1)

    @functools.cached_property
    def lines(self) -> list[list[str]]:
        """Each text's lines, without the spaces around them and without empty ones."""
        return [list(filter(None, map(str.strip, text.split("\n")))) for text in self.texts]

    @functools.cached_property
    def paragraphs(self) -> list[list[str]]:
        return [[part for part in text.split("\n\n") if part.strip()] for text in self.texts]

    def per_text(self, value_W: np.ndarray) -> np.ndarray:
        """Sums over each text's words."""
        return np.bincount(self.tokens.doc_W, value_W, self.size)

    def repeats(self, n: int) -> Repeats:
        """The n-grams that a text has more than once."""
        if n not in self._repeats:
            self._repeats[n] = self._find_repeats(n)
        return self._repeats[n]

    def _find_repeats(self, n: int) -> Repeats:
        hash_W, doc_W = self.tokens.hash_W, self.tokens.doc_W
        if n == 1:
            first_G = np.arange(len(hash_W))
            return Repeats(first_G, hash_W + mix64(doc_W), first_G, first_G > 0)
        shorter = self.repeats(n - 1)  # an n-gram that is repeated begins with an (n-1)-gram that is
        inside_G = shorter.first + n - 1 < len(doc_W)
        first_G, hash_G = shorter.first[inside_G], shorter.hash[inside_G]
        inside_G = doc_W[first_G] == doc_W[first_G + n - 1]
        first_G, hash_G = first_G[inside_G], hash_G[inside_G]
        hash_G = mix64(hash_G + hash_W[first_G + n - 1])
        order = np.argsort(hash_G)
        ordered = hash_G[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
        times = np.diff(starts, append=len(ordered))
        earliest = np.minimum.reduceat(first_G[order], starts) if len(starts) else first_G
        repeated = np.repeat(times > 1, times)
        chosen = order[repeated]
        again = first_G[chosen] != np.repeat(earliest, times)[repeated]
        return Repeats(first_G[chosen], hash_G[chosen], np.repeat(times, times)[repeated], again)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.asarray(part, float) / np.maximum(whole, 1)


def _per_word(signs: Sequence[str]) -> Callable[[Batch], np.ndarray]:
    return lambda batch: _share([sum(map(text.count, signs)) for text in batch.texts], batch.count)


def _lines_that(test: Callable[[str, tuple[str, ...]], bool], signs: tuple[str, ...]) -> Callable[[Batch], np.ndarray]:
    return lambda batch: np.array([sum([test(line, signs) for line in lines]) / max(len(lines), 1)
                                   for lines in batch.lines])


def _short_lines(batch: Batch) -> np.ndarray:
    limit_D = np.where(batch.unspaced, SHORT_LINE // 2, SHORT_LINE)
    return np.array([sum([len(line) < limit for line in lines]) / max(len(lines), 1)
                     for lines, limit in zip(batch.lines, limit_D.tolist(), strict=True)])


def _alphabetic(batch: Batch) -> np.ndarray:
    alphabetic_C = _is_alpha()[batch.tokens.codes_C]
    sums = np.concatenate([[0], np.cumsum(alphabetic_C)])
    base_W = batch.tokens.offset_D[batch.tokens.doc_W]
    return _share(batch.per_text(sums[base_W + batch.tokens.end_W] > sums[base_W + batch.tokens.start_W]), batch.count)


@functools.cache
def _is_alpha() -> np.ndarray:
    table = np.zeros(0x110000, bool)
    table[:0x20000] = [chr(code).isalpha() for code in range(0x20000)]
    table[0x20000:0x40000] = True
    return table


@functools.cache
def _stop_words(name: str) -> np.ndarray:
    words = " ".join(STOP_WORDS) if name in ("en", language.UNDETERMINED) else language.WORDS.get(name, "")
    return np.unique(split([words]).hash_W)


def _stop_word_count(batch: Batch) -> np.ndarray:
    """Different stop words; languages that have none in the table are taken to have enough."""
    out = np.full(batch.size, np.inf)
    words = batch.words
    for d, name in enumerate(batch.languages):
        stops = _stop_words(name)
        if len(stops):
            out[d] = np.isin(stops, words.hash_W[words.bounds_D1[d] : words.bounds_D1[d + 1]]).sum()
    return out


def _duplicates(parts: Sequence[Sequence[str]], chars: bool) -> np.ndarray:
    """The share of parts, or of their characters, that have come before in the same text."""
    def one(items: Sequence[str]) -> float:
        if len(set(items)) == len(items):
            return 0.0
        size: Callable[[str], int] = len if chars else lambda item: 1
        return 1 - sum(map(size, set(items))) / sum(map(size, items))
    return np.array([one(items) for items in parts])


def _top_ngram(n: int) -> Callable[[Batch], np.ndarray]:
    """The share of characters in the most frequent n-gram, the longest of these if there are several."""
    def feature(batch: Batch) -> np.ndarray:
        first, _, often, _ = batch.repeats(n)
        sums = np.concatenate([[0], np.cumsum(batch.chars_W)])
        chars = sums[first + n] - sums[first]
        best = np.zeros(batch.size, np.int64)
        np.maximum.at(best, batch.tokens.doc_W[first], (often << 32) + chars)
        return _share((best >> 32) * (best & 0xFFFFFFFF), batch.chars)
    return feature


def _duplicate_ngrams(n: int) -> Callable[[Batch], np.ndarray]:
    """The share of characters in n-grams that have come before, each character counted once."""
    def feature(batch: Batch) -> np.ndarray:
        first, _, _, again = batch.repeats(n)
        edge = np.zeros(len(batch.chars_W) + 1, np.int64)
        np.add.at(edge, first[again], 1)
        np.add.at(edge, first[again] + n, -1)
        return _share(batch.per_text(batch.chars_W * (np.cumsum(edge)[:-1] > 0)), batch.chars)
    return feature


FEATURES: dict[str, Callable[[Batch], np.ndarray]] = {
    "words": lambda batch: batch.count,
    "mean_word_chars": lambda batch: _share(batch.chars, batch.count),
    "hashes_per_word": _per_word("#"),
    "ellipses_per_word": _per_word(ELLIPSES),
    "bullet_lines": _lines_that(str.startswith, BULLETS),
    "ellipsis_lines": _lines_that(str.endswith, ELLIPSES),
    "alphabetic_words": _alphabetic,
    "stop_words": _stop_word_count,
    "duplicate_lines": lambda batch: _duplicates(batch.lines, False),
    "duplicate_line_chars": lambda batch: _duplicates(batch.lines, True),
    "duplicate_paragraphs": lambda batch: _duplicates(batch.paragraphs, False),
    "duplicate_paragraph_chars": lambda batch: _duplicates(batch.paragraphs, True),
    **{f"top_{n}gram_chars": _top_ngram(n) for n in (2, 3, 4)},
    **{f"duplicate_{n}gram_chars": _duplicate_ngrams(n) for n in range(5, 11)},
    "sentences": lambda batch: np.array([sum(1 for _ in SENTENCE_END.finditer(text)) for text in batch.texts]),
    "braces": lambda batch: np.array([text.count("{") for text in batch.texts]),
    "lorem_ipsum": lambda batch: np.array(["lorem ipsum" in text.lower() for text in batch.texts]),
    "punctuated_lines": _lines_that(str.endswith, PUNCTUATION),
    "short_lines": _short_lines,
}


def reject(batch: Batch, families: dict[str, Any]) -> list[tuple[str, float] | None]:
    """For each text the first rule that it breaks (`family.field`) and the feature's value, None if it breaks none.

    families: name in `FAMILIES` -> its thresholds.
    """
    out: list[tuple[str, float] | None] = [None] * batch.size
    for family, limits in families.items():
        for field in fields(limits):
            side, _, name = field.name.partition("_")
            value_D, limit = FEATURES[name](batch), getattr(limits, field.name)
            bad_D = value_D < limit if side == "min" else value_D > limit
            if name in SPACED_ONLY:
                bad_D = bad_D & ~batch.unspaced
            for d in np.flatnonzero(bad_D):
                out[d] = out[d] or (f"{family}.{field.name}", float(value_D[d]))
    return out
