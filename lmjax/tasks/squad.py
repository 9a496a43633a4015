"""Exact match and F1 of answers as SQuAD 2.0 counts them (Rajpurkar et al. 2018, arXiv:1806.03822).

Letters count in lower case. Punctuation, articles and the number of spaces do not count.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(answer: str) -> list[str]:
    """The words of an answer that count."""
    return _ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split()


def exact_match(answer: str, truth: Sequence[str]) -> float:
    """1 if the answer has the words of one of the right ones; the answer to an empty list is ""."""
    return float(any(words_of(answer) == wanted for wanted in _wanted(truth)))


def f1(answer: str, truth: Sequence[str]) -> float:
    """The overlap with the right answer that is nearest: the harmonic mean of its two shares."""
    return max(_overlap(words_of(answer), wanted) for wanted in _wanted(truth))


def _wanted(truth: Sequence[str]) -> list[list[str]]:
    """The words of the right answers that have some; of a question without any, no words."""
    return [words for words in map(words_of, truth) if words] or [[]]


def _overlap(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))
