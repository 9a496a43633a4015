"""Mistakes made in the text that a decoder reads, for corpora that are read many times.

After "Data Noising as Smoothing in Neural Network Language Models" (arXiv:1703.02573) and "EDA"
(arXiv:1901.11196). The decoder still predicts the original text.

Shape legend: P pieces, T tokens of all pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmjax.config import at_least
from lmjax.data.hashing import fold, uniform
from lmjax.data.rows import Draw, Pieces, ramps
from lmjax.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """Mistakes in the text that a decoder reads. No target ever holds an invented token."""

    share: float = 0.0     # of the documents that get mistakes; the others stay as they are
    mask: float = 0.03     # of their tokens: hidden
    replace: float = 0.03  # of their tokens: replaced by a random token
    insert: float = 0.03   # of their tokens: preceded by an inserted random token
    delete: float = 0.03   # of their tokens: deleted

    def __post_init__(self) -> None:
        rates = {"mask": self.mask, "replace": self.replace, "insert": self.insert,
                 "delete": self.delete}
        at_least(0, share=self.share, **rates)
        if self.share > 1 or sum(rates.values()) > 1:
            raise UserError("at most 1", f"{self.share}, {sum(rates.values()):g}", "lower them",
                            where="share, mask + replace + insert + delete")


class Augmented(NamedTuple):
    """Pieces with mistakes, and what the decoder predicts at each of their tokens."""

    pieces: Pieces
    target_T: np.ndarray  # the original token at this place
    real_T: np.ndarray    # 1.0, or 0.0 for an inserted token, which is no target


def augment(p: Pieces, config: AugmentConfig, *, mask_id: int, vocab_size: int) -> Augmented:
    """Makes mistakes in pieces of n predictions, n + 1 tokens. The first and the last token stay.

    Args:
      p: pieces of a decoder.
      config: how many mistakes of each kind.
      mask_id: the id of a hidden token.
      vocab_size: random tokens are drawn from so many ids.
    """
    count_P = p.length_P + 1
    piece_T = np.repeat(np.arange(len(count_P)), count_P)
    within_T = ramps(np.zeros_like(count_P), count_P)
    token_T, key_T = p.flat[ramps(p.at_P, count_P)].astype(np.int64), p.key_P[piece_T]
    free_T = (uniform(fold(p.key_P, Draw.AUGMENTED)) < config.share)[piece_T]
    free_T = free_T & (within_T > 0) & (within_T < p.length_P[piece_T])
    random_T = np.where(free_T, uniform(fold(key_T, within_T, Draw.EDIT)), 1.0)
    bounds = np.cumsum([config.delete, config.mask, config.replace, config.insert])
    edit_T = np.searchsorted(bounds, random_T, side="right")  # 4 is no edit
    delete_T, mask_T, replace_T, insert_T = (edit_T == edit for edit in range(4))
    # The plan of the rows reserved room for so many insertions; deletions make more.
    room_P = np.ceil(p.length_P * config.insert) + np.bincount(piece_T, delete_T, len(count_P))
    before_T = np.cumsum(insert_T) - insert_T
    insert_T &= before_T - before_T[np.cumsum(count_P) - count_P][piece_T] < room_P[piece_T]
    new_T = (fold(key_T, within_T, Draw.RANDOM_TOKEN) % np.uint64(vocab_size)).astype(np.int64)
    seen_T = np.select([mask_T, replace_T], [mask_id, new_T], token_T)
    # An insertion repeats its token's index; the first of the two is the inserted token.
    index = np.repeat(np.arange(len(token_T)), 1 + insert_T.astype(np.int64) - delete_T)
    inserted = insert_T[index] & (np.diff(index, prepend=-1) > 0)
    count_P = np.bincount(piece_T[index], minlength=len(count_P))
    pieces = Pieces(np.where(inserted, new_T[index], seen_T[index]), np.cumsum(count_P) - count_P,
                    count_P - 1, p.place_P, p.key_P)
    return Augmented(pieces, token_T[index], (~inserted).astype(np.float32))
