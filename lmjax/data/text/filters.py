"""Published filters: a text is dropped if one of its features is out of bounds.

A filter is a dataclass. Its field `min_x` is the least value of feature `x`, `max_x` the greatest;
the defaults are the published ones. lmjax/data/text/features.py computes the features. Where words
are not separated by spaces, the features of `SPACED_ONLY` mean nothing and are not checked.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lmjax.data.text.features import FEATURES, SPACED_ONLY, TextBatch


@dataclass(frozen=True)
class GopherQuality:
    """Rae et al., "Scaling Language Models", 2021, appendix A.1.1.

    The stop words are those of the text's language.
    """

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


# By the name of the config key.
FILTERS = {
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "c4": C4,
    "fineweb": FineWeb,
}


def reject(batch: TextBatch, filters: dict[str, Any]) -> list[tuple[str, float] | None]:
    """Decides which texts the filters drop.

    Args:
      batch: the texts.
      filters: name in `FILTERS` -> its thresholds.
    Returns:
      for each text the first rule that it breaks (`filter.field`) and the feature's value, or None.
    """
    out: list[tuple[str, float] | None] = [None] * batch.size
    for name, thresholds in filters.items():
        for field in fields(thresholds):
            side, _, feature = field.name.partition("_")
            value_D, limit = FEATURES[feature](batch), getattr(thresholds, field.name)
            bad_D = value_D < limit if side == "min" else value_D > limit
            if feature in SPACED_ONLY:
                bad_D = bad_D & ~batch.unspaced
            for d in np.flatnonzero(bad_D):
                out[d] = out[d] or (f"{name}.{field.name}", float(value_D[d]))
    return out
