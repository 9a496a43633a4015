"""Objectives: what a row of a batch is, made from the pieces of documents that it holds.

    causal_lm        predicts the next token (with `augment`, from a text with mistakes in it)
    prefix_lm        the same after a prefix, which its whole document sees and nothing predicts
    masked_lm        BERT's (arXiv:1810.04805): some tokens are hidden and predicted in their place
    span_corruption  T5's (arXiv:1910.10683): see lmjax/data/denoising.py
    ul2              a mixture of denoisers, each announced by a token (arXiv:2205.05131)
    text_infilling   BART's (arXiv:1910.13461): one mask hides a span, and the text is written anew

A row is a pure function of its pieces and of one key per piece, which is itself a function of
(seed, row of the run): the row is the same whenever and wherever it is made. An objective may need
ids for a mask, sentinels or modes: the tokenizer's own, and where it has none, further ids.

Shape legend: P pieces, T tokens of all pieces, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.augmentation import AugmentConfig, augment
from lmjax.data.denoising import INFILLING, UL2, Denoiser, Denoising
from lmjax.data.hashing import fold, uniform
from lmjax.data.rows import DECODER, Draw, Pieces, Rows, empty, fill_rows, ramps, segments, starts
from lmjax.data.tokenizers import SPACE, Tokenizer
from lmjax.errors import UserError

# An encoder-decoder's objective -> its denoisers.
MIXTURES = {"span_corruption": (Denoiser(),), "ul2": UL2, "text_infilling": (INFILLING,)}
MASK = "[MASK]"  # the name of the id that hides a token, if the tokenizer has no such token
Specials = tuple[int, int]  # the ids of BOS and EOS
# Whether each token begins outside a word, and whether it ends outside one; bool [V] each.
WordTables = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    name: str = "causal_lm"            # a row of OBJECTIVES
    mask_rate: float = 0.15            # masked_lm: share of the tokens that are predicted
    mask_share: float = 0.8            # masked_lm: share of those that the model sees as [MASK]
    random_share: float = 0.1          # masked_lm: share of those that it sees as a random token
    whole_word: bool = False           # masked_lm: all tokens of a word are predicted, or none
    denoisers: tuple[Denoiser, ...] = ()  # of an encoder-decoder; (): those of its objective
    sentinels: int = 100               # span_corruption, ul2: number of ids for hidden spans
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # causal_lm, prefix_lm
    # Whether the tokenizer's own mask, sentinels and modes are used. Version 0.1.0 never used them;
    # its runs go on with false. The fingerprint of the data names the ids, not this switch.
    own_ids: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        choice("name", self.name, OBJECTIVES)
        at_least(0, mask_share=self.mask_share, random_share=self.random_share)
        at_least(1, sentinels=self.sentinels)
        if not 0 < self.mask_rate < 1 or self.mask_share + self.random_share > 1:
            raise UserError("a share in (0, 1) and at most 1",
                            f"{self.mask_rate}, {self.mask_share + self.random_share:g}",
                            "BERT has 0.15, 0.8 and 0.1",
                            where="mask_rate, mask_share + random_share")
        if self.name == "text_infilling" and any(d.mode for d in self.denoisers):
            raise UserError("no mode for text_infilling", self.denoisers[0].mode,
                            "leave it out, or take ul2", where="denoisers.mode")
        if self.augment.share and self.architecture != "decoder":
            raise UserError(f"0 for {self.name}, which makes noise of its own", self.augment.share,
                            "set it to 0", where="augment.share")

    @property
    def architecture(self) -> str:
        """The model that the batches are for: decoder, encoder or encdec."""
        return OBJECTIVES[self.name].architecture

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """The denoisers, by default those of the objective."""
        return self.denoisers or MIXTURES.get(self.name, ())

    @property
    def masks(self) -> bool:
        """Whether rows hold a token that hides another."""
        return (self.name in ("masked_lm", "text_infilling")
                or bool(self.augment.share * self.augment.mask))

    @property
    def marks(self) -> bool:
        """Whether rows hold ids that are no text: a mask, or modes and sentinels."""
        return self.masks or self.architecture == "encdec"

    @property
    def modes(self) -> tuple[str, ...]:
        """The names of the tokens that announce a denoiser."""
        encdec = self.architecture == "encdec"
        return tuple(dict.fromkeys(d.mode for d in self.mixture if d.mode and encdec))

    @property
    def sentinel_names(self) -> tuple[str, ...]:
        """The names of the tokens that hide the spans of a piece, in their order."""
        count = self.sentinels if self.architecture == "encdec" and not self.masks else 0
        return tuple(f"<extra_id_{i}>" for i in range(count))

    @property
    def joins(self) -> bool:
        """Whether a row is as long as its pieces, so that a stream of text can be cut into rows."""
        return self.architecture != "encdec" and not self.augment.share


class Objective:
    """Makes rows from pieces, and says how long pieces and rows may be.

    Args:
      config: which objective.
      seq_len: length of a row that the model (or its encoder) reads.
      vocab_size: number of ids of the tokenizer.
      tokenizer: of the data; None: none of the ids that the objective needs are its own.
    Attributes:
      fields: row length of each array of a batch; all are int32 but loss_mask, which is float32.
      ids: the id of each name that the objective uses: of the mask, or of modes and sentinels.
      own: the part of them that is the tokenizer's. The others come after its ids.
      mask_id: the id that hides a token; no row has it if the objective hides none.
      vocab_size: number of ids, with those after the tokenizer's.
      longest: tokens of the longest piece.
      cost: room that a piece of n tokens takes in a row of seq_len, int64 [longest + 1].
    Raises:
      UserError: seq_len is too short, or a piece has more spans than there are sentinels.
    """

    def __init__(self, config: ObjectiveConfig, *, seq_len: int, vocab_size: int,
                 tokenizer: Tokenizer | None = None):
        self.config, self.seq_len, self.base = config, seq_len, vocab_size
        self.kind = OBJECTIVES[config.name]
        self.longest, self.cost = seq_len, np.arange(seq_len + 1)
        self.fields = dict.fromkeys(DECODER, seq_len)
        self.own, new = mark_ids(config, vocab_size, tokenizer)
        self.ids = self.own | new
        self.mask_id = next(iter(self.ids.values())) if config.masks else vocab_size
        self.denoising: Denoising | None = None
        if self.kind.architecture == "encdec":
            made = self.denoising = Denoising(
                config.mixture, name=config.name, seq_len=seq_len,
                sentinels=[self.ids[name] for name in config.sentinel_names],
                modes={name: self.ids[name] for name in config.modes},
                mask=self.mask_id if config.masks else None)
            self.longest, self.cost, self.fields = made.longest, made.cost, made.fields
        if config.name == "prefix_lm":
            self.fields["bidirectional"] = seq_len
        if config.augment.share:
            cost = self.cost + np.ceil(self.cost * config.augment.insert).astype(np.int64)
            self.longest = int(np.searchsorted(cost, seq_len, side="right")) - 1
            self.cost = cost[: self.longest + 1]
        self.vocab_size = vocab_size + len(new)

    def rows(self, pieces: Pieces, rows: int, specials: Specials,
             words: WordTables | None = None) -> Rows:
        """The batch of `rows` rows that hold these pieces.

        Args:
          pieces: at most `longest` tokens each; the pieces of a row fit into it by `cost`.
          rows: number of rows.
          specials: the ids of BOS and EOS.
          words: for whole_word, of `tokenizers.word_tables`.
        Returns:
          [rows, length] for each of `fields`. segment_ids number the pieces of a row from 1 (0 is
          padding), and encoder_segment_ids match them; positions count from 0 in each piece.
        """
        return self.kind.rows(self, pieces, rows, specials, words)


def mark_ids(config: ObjectiveConfig, vocab_size: int,
             tokenizer: Tokenizer | None) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of an objective that are no text: of its mask, or of its modes and sentinels.

    Args:
      config: the objective.
      vocab_size: number of ids of the tokenizer.
      tokenizer: None: it has none of them.
    Returns:
      (those that are the tokenizer's own, the new ones after its ids), by name.
    """
    names = (*config.modes, *reversed(config.sentinel_names))  # T5's order: <extra_id_0> is last
    found: dict[str, int | None] = {}
    if tokenizer and config.own_ids:
        # A mode may be called as a piece of text is, so only a special token counts for it.
        found = {name: tokenizer.id_of(name, special=True) for name in config.modes}
        for name in config.sentinel_names:
            i = tokenizer.id_of(name)
            found[name] = tokenizer.id_of(SPACE + name) if i is None else i  # as mT5 has them
        if config.masks and tokenizer.mask_name:
            found[tokenizer.mask_name] = tokenizer.id_of(tokenizer.mask_name)
    own = {name: i for name, i in found.items() if i is not None}
    names = (next(iter(own), MASK),) if config.masks else names
    new = [name for name in names if name not in own]
    return own, {name: vocab_size + i for i, name in enumerate(new)}


def causal_rows(objective: Objective, p: Pieces, rows: int, specials: Specials,
                words: WordTables | None) -> Rows:
    """Rows of causal_lm and prefix_lm: each position predicts the next token."""
    c, seq_len = objective.config, objective.seq_len
    augmented = augment(p, c.augment, mask_id=objective.mask_id,
                        vocab_size=objective.base) if c.augment.share else None
    p = augmented.pieces if augmented else p
    out = fill_rows(p.flat, p.at_P, p.length_P, p.place_P, rows, seq_len)
    slot_T = ramps(starts(p.length_P, p.place_P, seq_len), p.length_P)
    if augmented:
        next_T = ramps(p.at_P + 1, p.length_P)
        out["targets"].reshape(-1)[slot_T] = augmented.target_T[next_T]
        out["loss_mask"].reshape(-1)[slot_T] = augmented.real_T[next_T]
    if "bidirectional" in objective.fields:
        prefix_P = fold(p.key_P, Draw.PREFIX) % p.length_P.astype(np.uint64)
        after_T = ramps(-1 - prefix_P.astype(np.int64), p.length_P)  # below 0: in the prefix
        out["bidirectional"] = np.zeros((rows, seq_len), np.int32)
        out["bidirectional"].reshape(-1)[slot_T] = after_T < 0
        # The last token of the prefix predicts the first token after it.
        out["loss_mask"].reshape(-1)[slot_T] *= after_T >= -1
    return out


def masked_rows(objective: Objective, p: Pieces, rows: int, specials: Specials,
                words: WordTables | None) -> Rows:
    """Rows of masked_lm: hidden tokens are predicted in their place."""
    c, out = objective.config, empty(objective.fields, rows)
    slot_T = ramps(starts(p.length_P, p.place_P, objective.seq_len), p.length_P)
    within_T = ramps(np.zeros_like(p.length_P), p.length_P)
    token_T = p.flat[ramps(p.at_P, p.length_P)].astype(np.int32)
    key_T, unit_T = np.repeat(p.key_P, p.length_P), within_T
    if c.whole_word:  # a word is hidden if its first token is
        assert words is not None, "whole_word needs the tokenizer's word tables"
        begins_T, ends_T = (table[token_T] for table in words)
        begins_T = begins_T | np.concatenate([[True], ends_T[:-1]]) | (within_T == 0)
        unit_T = within_T[np.maximum.accumulate(np.where(begins_T, np.arange(len(token_T)), 0))]
    hidden_T = uniform(fold(key_T, unit_T, Draw.HIDE)) < c.mask_rate
    hidden_T &= (token_T != specials[0]) & (token_T != specials[1])
    at = np.flatnonzero(hidden_T)
    how = uniform(fold(key_T[at], within_T[at], Draw.HOW))
    random = fold(key_T[at], within_T[at], Draw.RANDOM_TOKEN) % np.uint64(objective.base)
    is_random = how < c.mask_share + c.random_share
    seen_T = token_T.copy()
    seen_T[at] = np.where(how < c.mask_share, objective.mask_id,
                          np.where(is_random, random.astype(np.int32), token_T[at]))
    columns = {"tokens": seen_T, "targets": token_T, "positions": within_T, "loss_mask": hidden_T,
               "segment_ids": np.repeat(segments(p.place_P), p.length_P)}
    for name, values in columns.items():
        out[name].reshape(-1)[slot_T] = values
    return out


def denoising_rows(objective: Objective, p: Pieces, rows: int, specials: Specials,
                   words: WordTables | None) -> Rows:
    """Rows of span_corruption, ul2 and text_infilling: see `Denoising.rows`."""
    assert objective.denoising is not None
    return objective.denoising.rows(p, rows, specials[1])


class ObjectiveKind(NamedTuple):
    """The model that an objective trains, and how it uses a stored document (BOS + text + EOS)."""

    architecture: str  # decoder, encoder or encdec
    skipped: int       # tokens left out at the beginning of a document
    uncounted: int     # tokens of a document that its length does not count
    lookahead: int     # tokens read after the end of a piece
    # Makes a batch: the objective, then the arguments of `Objective.rows`.
    rows: Callable[[Objective, Pieces, int, Specials, WordTables | None], Rows]


# Decoders count predictions: a piece of n predictions reads n + 1 tokens. Encoder-decoders count
# the text without BOS and EOS, since each side gets an EOS of its own.
OBJECTIVES = {
    "causal_lm": ObjectiveKind("decoder", 0, 1, 1, causal_rows),
    "prefix_lm": ObjectiveKind("decoder", 0, 1, 1, causal_rows),
    "masked_lm": ObjectiveKind("encoder", 0, 0, 0, masked_rows),
    "span_corruption": ObjectiveKind("encdec", 1, 2, 0, denoising_rows),
    "ul2": ObjectiveKind("encdec", 1, 2, 0, denoising_rows),
    "text_infilling": ObjectiveKind("encdec", 1, 2, 0, denoising_rows),
}
