"""Entities of IOB2 tags: B-X begins an X, I-X goes on with it, O is outside.

Tags that break the rule are read as seqeval reads them by default: I-X after anything but a tag of
X begins an X. https://github.com/chakki-works/seqeval
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_IOB2 = re.compile(r"O|[BI]-.+", re.DOTALL)


class Entity(NamedTuple):
    """Some words that are one thing."""

    label: str
    start: int  # its first word
    end: int  # one past its last word


def is_iob2(tags: Iterable[str]) -> bool:
    """Whether all of these tags are of IOB2."""
    return all(map(_IOB2.fullmatch, tags))


def entities(tags: Sequence[str | None]) -> list[Entity]:
    """The entities of a text, in order; a word without a tag (None) is outside of all."""
    found: list[Entity] = []
    inside = ""  # the label of the entity that the word before belongs to
    for at, tag in enumerate(tags):
        sign, _, label = (tag or "O").partition("-")
        if label and sign == "I" and label == inside:
            found[-1] = found[-1]._replace(end=at + 1)
        elif label:
            found.append(Entity(label, at, at + 1))
        inside = label
    return found


def entity_scores(predicted: Iterable[Sequence[str | None]],
                  truth: Iterable[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all texts together (micro); 0 where undefined."""
    right = answered = there = 0
    for its, wanted in zip(predicted, truth, strict=True):
        a, b = set(entities(its)), set(entities(wanted))
        right, answered, there = right + len(a & b), answered + len(a), there + len(b)
    return {"precision": right / max(answered, 1), "recall": right / max(there, 1),
            "f1": 2 * right / max(answered + there, 1)}
