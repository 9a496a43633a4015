"""Objectives: what a row of a batch is, from the pieces of documents that it holds.

Each is a pure function of the pieces and of one key a piece, itself a function of (seed, row of the run), so a row
is the same whenever and wherever it is made. NumPy, without a Python loop over tokens or documents.

    causal_lm        tokens -> next tokens (with `augment`, of a text with made-up mistakes in it)
    prefix_lm        the same; `bidirectional` marks a prefix that all of its document sees and none of it predicts
    masked_lm        BERT's (arXiv:1810.04805): some tokens hidden, each predicted in its place
    span_corruption  T5's (arXiv:1910.10683): runs of tokens replaced by sentinels; the decoder writes what they hide
    ul2              the same by a mixture of denoisers, each announced by a token (arXiv:2205.05131)

The ids that they need come after the tokenizer's: `Objective.extra` names them in that order.

Shape legend: P pieces, Q noise spans, W tokens of all pieces, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.hashing import fold, permute
from lmjax.data.packing import DECODER, Rows, empty, fill_rows, ramps, segments, starts

START_ID = 0  # what a decoder reads first: the id that also pads, as T5 has it
# What each random decision is keyed by, besides the piece.
PREFIX, HIDE, HOW, CHOICE, KEPT, NOISE, EDITED, EDIT, NEW = range(9)
ENCODER = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")


@dataclass(frozen=True)
class Denoiser:
    """A way to hide spans. density: share of the tokens that is hidden. mean_span: their mean length; 0: one span, at
    the end. mode: a token in front of the input that names the task; "" for none. weight: share of the documents."""

    density: float = 0.15
    mean_span: float = 3.0
    mode: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"density: expected a share in (0, 1), got {self.density}; T5 has 0.15")
        if self.mean_span and self.mean_span < 1:
            raise ValueError(f"mean_span: expected at least 1, or 0, got {self.mean_span}; T5 has 3")
        if self.weight <= 0:
            raise ValueError(f"weight: expected more than 0, got {self.weight}; raise it or drop the denoiser")


UL2 = tuple(Denoiser(density, span, mode) for density, span, mode in (  # table 1 of arXiv:2205.05131
    (0.15, 3.0, "[NLU]"), (0.15, 8.0, "[NLU]"), (0.25, 0.0, "[S2S]"), (0.5, 3.0, "[NLG]"), (0.5, 8.0, "[NLG]"),
    (0.15, 64.0, "[NLG]"), (0.5, 64.0, "[NLG]")))


@dataclass(frozen=True)
class AugmentConfig:
    """Mistakes made in the text that a decoder reads, for corpora that are read many times over (after arXiv:1703.02573
    and arXiv:1901.11196). It still predicts the text itself: what was made up is in no target.

    share: of the documents that get any; the others stay as they are. mask, replace, insert, delete: share of their
    tokens that are hidden, made another, get another in front, or go.
    """

    share: float = 0.0
    mask: float = 0.03
    replace: float = 0.03
    insert: float = 0.03
    delete: float = 0.03

    def __post_init__(self) -> None:
        rates = {"mask": self.mask, "replace": self.replace, "insert": self.insert, "delete": self.delete}
        at_least(0, share=self.share, **rates)
        if self.share > 1 or sum(rates.values()) > 1:
            raise ValueError(f"share, mask + replace + insert + delete: expected at most 1, got {self.share}, "
                             f"{sum(rates.values()):g}; lower them")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict.

    name: causal_lm, prefix_lm, masked_lm, span_corruption or ul2.
    mask_rate: masked_lm: share of the tokens that are predicted. mask_share, random_share: of those, how many the
      model sees as [MASK] and as a random token; it sees the others as they are.
    whole_word: masked_lm: all tokens of a word are predicted, or none.
    denoisers: span_corruption, ul2: the mixture; () for T5's one and UL2's seven.
    sentinels: span_corruption, ul2: how many ids there are for hidden spans.
    augment: causal_lm, prefix_lm.
    """

    name: str = "causal_lm"
    mask_rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_word: bool = False
    denoisers: tuple[Denoiser, ...] = ()
    sentinels: int = 100
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        choice("name", self.name, KINDS)
        at_least(0, mask_share=self.mask_share, random_share=self.random_share)
        at_least(1, sentinels=self.sentinels)
        if not 0 < self.mask_rate < 1 or self.mask_share + self.random_share > 1:
            raise ValueError("mask_rate, mask_share + random_share: expected a share in (0, 1) and at most 1, got "
                             f"{self.mask_rate}, {self.mask_share + self.random_share:g}; BERT has 0.15, 0.8 and 0.1")
        if self.augment.share and self.architecture != "decoder":
            raise ValueError(f"augment.share: expected 0 for {self.name}, which makes noise of its own, got "
                             f"{self.augment.share}; set it to 0")

    @property
    def architecture(self) -> str:
        """The kind of model that the batches are for: decoder, encoder or encdec."""
        return KINDS[self.name].architecture

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        return self.denoisers or {"span_corruption": (Denoiser(),), "ul2": UL2}.get(self.name, ())

    @property
    def joins(self) -> bool:
        """Whether a row is as long as its pieces together, so that a stream of text can be cut into rows."""
        return self.architecture != "encdec" and not self.augment.share


class Pieces(NamedTuple):
    """Runs of stored tokens: piece p begins at flat[at_P[p]], is length_P[p] long and lies in row place_P[p].

    flat: any unsigned integers. at_P, length_P, place_P: int64; pieces of a row are neighbours. key_P: uint64.
    """

    flat: np.ndarray
    at_P: np.ndarray
    length_P: np.ndarray
    place_P: np.ndarray
    key_P: np.ndarray


class Kind(NamedTuple):
    """How an objective looks at a stored document, BOS + text + EOS.

    begin: tokens left out in front. fewer: tokens that it does not count. beyond: tokens that it reads behind a piece.
    """

    architecture: str
    begin: int
    fewer: int
    beyond: int


KINDS = {
    "causal_lm": Kind("decoder", 0, 1, 1),  # counts predictions: a piece of n reads n + 1 tokens
    "prefix_lm": Kind("decoder", 0, 1, 1),
    "masked_lm": Kind("encoder", 0, 0, 0),
    "span_corruption": Kind("encdec", 1, 2, 0),  # the text; both sides get an EOS of their own
    "ul2": Kind("encdec", 1, 2, 0),
}


class Objective:
    """Makes rows of pieces, and says how long pieces and rows may be.

    Args:
      config: which one.
      seq_len: length of a row that the model (or its encoder) reads.
      vocab_size: of the tokenizer.
    Attributes:
      fields: length of a row of each array of a batch; all int32 but loss_mask, which is float32.
      extra: names of the ids vocab_size, vocab_size + 1, ... that the objective adds.
      vocab_size: with those.
      longest: tokens of the longest piece.
      cost: what a piece of n tokens takes of a row of seq_len, int64 [longest + 1].
    Raises:
      ValueError: seq_len is too short, or there are fewer sentinels than spans.
    """

    def __init__(self, config: ObjectiveConfig, *, seq_len: int, vocab_size: int):
        self.config, self.seq_len, self.base = config, seq_len, vocab_size
        self.kind = KINDS[config.name]
        self.longest, self.cost = seq_len, np.arange(seq_len + 1)
        self.fields = dict.fromkeys(DECODER, seq_len)
        self.extra: tuple[str, ...] = ()
        if self.kind.architecture == "encdec":
            self._plan_spans()
        elif config.name == "masked_lm" or config.augment.share * config.augment.mask:
            self.extra = ("[MASK]",)
        if config.name == "prefix_lm":
            self.fields["bidirectional"] = seq_len
        if config.augment.share:
            cost = self.cost + np.ceil(self.cost * config.augment.insert).astype(np.int64)
            self.longest = int(np.searchsorted(cost, seq_len, side="right")) - 1
            self.cost = cost[: self.longest + 1]
        self.vocab_size = vocab_size + len(self.extra)

    def id_of(self, name: str) -> int:
        """The id of one of the `extra` names."""
        return self.base + self.extra.index(name)

    def rows(self, pieces: Pieces, rows: int, specials: tuple[int, int],
             words: tuple[np.ndarray, np.ndarray] | None = None) -> Rows:
        """The batch of `rows` rows that hold these pieces.

        Args:
          specials: the ids of BOS and EOS.
          words: for whole_word, bool [V] each: whether a token begins, and ends, outside a word.
        Returns:
          the arrays of `fields`, [rows, length] each. segment_ids count a row's pieces from 1 (0: padding) and tie
          encoder_segment_ids to them; positions count from 0 in each.
        """
        if self.kind.architecture == "encdec":
            return self._spans(pieces, rows, specials[1])
        if self.config.name == "masked_lm":
            return self._masked(pieces, rows, specials, words)
        return self._causal(pieces, rows)

    def _causal(self, p: Pieces, rows: int) -> Rows:
        edited = _augment(p, self.config.augment, self.base) if self.config.augment.share else None
        p = edited.seen if edited else p
        out = fill_rows(p.flat, p.at_P, p.length_P, p.place_P, rows, self.seq_len)
        if edited or "bidirectional" in self.fields:
            slot_W = ramps(starts(p.length_P, p.place_P, self.seq_len), p.length_P)
        if edited:
            target_W = ramps(p.at_P + 1, p.length_P)
            out["targets"].reshape(-1)[slot_W] = edited.wanted[target_W]
            out["loss_mask"].reshape(-1)[slot_W] = edited.real[target_W]
        if "bidirectional" in self.fields:
            prefix_P = 1 + (fold(p.key_P, PREFIX) % p.length_P.astype(np.uint64)).astype(np.int64)
            inside_W = ramps(-prefix_P, p.length_P)  # below 0: in the prefix
            out["bidirectional"] = np.zeros((rows, self.seq_len), np.int32)
            out["bidirectional"].reshape(-1)[slot_W] = inside_W < 0
            out["loss_mask"].reshape(-1)[slot_W] *= inside_W >= -1  # the prefix's last token predicts the first behind
        return out

    def _masked(self, p: Pieces, rows: int, specials: tuple[int, int],
                words: tuple[np.ndarray, np.ndarray] | None) -> Rows:
        c, out = self.config, empty(self.fields, rows)
        start_P = starts(p.length_P, p.place_P, self.seq_len)
        slot_W, within_W = ramps(start_P, p.length_P), ramps(np.zeros_like(p.length_P), p.length_P)
        token_W = p.flat[ramps(p.at_P, p.length_P)].astype(np.int32)
        key_W, unit_W = np.repeat(p.key_P, p.length_P), within_W
        if c.whole_word:  # a word is hidden as its first token is
            begins_W, ends_W = (table[token_W] for table in words)
            begins_W = begins_W | np.concatenate([[True], ends_W[:-1]]) | (within_W == 0)
            unit_W = within_W[np.maximum.accumulate(np.where(begins_W, np.arange(len(token_W)), 0))]
        hidden_W = _uniform(fold(key_W, unit_W, HIDE)) < c.mask_rate
        hidden_W &= (token_W != specials[0]) & (token_W != specials[1])
        at = np.flatnonzero(hidden_W)
        how = _uniform(fold(key_W[at], within_W[at], HOW))
        new = (fold(key_W[at], within_W[at], NEW) % np.uint64(self.base)).astype(np.int32)
        seen_W = token_W.copy()
        seen_W[at] = np.where(how < c.mask_share, self.id_of("[MASK]"),
                              np.where(how < c.mask_share + c.random_share, new, token_W[at]))
        for name, values in (("tokens", seen_W), ("targets", token_W), ("positions", within_W), ("loss_mask", hidden_W),
                             ("segment_ids", np.repeat(segments(p.place_P), p.length_P))):
            out[name].reshape(-1)[slot_W] = values
        return out

    def _plan_spans(self) -> None:
        c = self.config
        n = np.arange(1, int(self.seq_len / (1 - min(d.density for d in c.mixture))) + 2)
        inputs, targets, spans = np.zeros_like(n), np.zeros_like(n), np.zeros_like(n)
        for d in c.mixture:
            noise, parts = noise_counts(n, d.density, d.mean_span)
            inputs, spans = np.maximum(inputs, n - noise + parts + 1 + bool(d.mode)), np.maximum(spans, parts)
            targets = np.maximum(targets, noise + parts + 1)
        inputs, targets = np.maximum.accumulate(inputs), np.maximum.accumulate(targets)
        self.longest = int(np.searchsorted(inputs, self.seq_len, side="right"))
        if not self.longest:
            raise ValueError(f"data.seq_len: expected at least {inputs[0]} for {c.name}, got {self.seq_len}; raise it")
        most, decoder_len = int(spans[: self.longest].max()), int(targets[self.longest - 1])
        if most > c.sentinels:
            raise ValueError(f"data.objective.sentinels: expected at least {most}, the spans of a row, got "
                             f"{c.sentinels}; raise it")
        # A row is full when either side is; what a piece takes of the decoder's is counted in the encoder's.
        cost = np.maximum(inputs, -(-targets * self.seq_len // decoder_len))[: self.longest]
        self.cost = np.concatenate([[0], cost])
        self.fields = dict.fromkeys(ENCODER, self.seq_len) | dict.fromkeys(DECODER, decoder_len)
        modes = dict.fromkeys(d.mode for d in c.mixture if d.mode)
        self.extra = (*modes, *(f"<extra_id_{i}>" for i in reversed(range(c.sentinels))))  # T5's order: 0 comes last

    def _spans(self, p: Pieces, rows: int, eos: int) -> Rows:
        mixture = self.config.mixture
        shares = np.cumsum([d.weight for d in mixture])
        which_P = np.searchsorted(shares[:-1] / shares[-1], _uniform(fold(p.key_P, CHOICE)), side="right")
        density, mean = (np.array([getattr(d, name) for d in mixture])[which_P] for name in ("density", "mean_span"))
        mode_P = np.array([self.id_of(d.mode) if d.mode else -1 for d in mixture])[which_P]
        noise_P, spans_P = noise_counts(p.length_P, density, mean)
        kept_Q = random_parts(p.length_P - noise_P, spans_P, fold(p.key_P, KEPT))
        noise_Q = random_parts(noise_P, spans_P, fold(p.key_P, NOISE))
        rank_Q = ramps(np.zeros_like(spans_P), spans_P)
        sentinel_Q = self.id_of("<extra_id_0>") - rank_Q
        source_Q = _runs(p.at_P, kept_Q + noise_Q, spans_P)
        out, segment_P = empty(self.fields, rows), segments(p.place_P)

        def side(prefix: str, head_P: np.ndarray, size_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Lays out one side's pieces; returns where each begins behind its head, and the side's tokens."""
            name = f"{prefix}tokens" if prefix else "targets"
            flat, width = out[name].reshape(-1), out[name].shape[1]
            start_P = starts(size_P, p.place_P, width)
            slot_W = ramps(start_P, size_P)
            out[f"{prefix}segment_ids"].reshape(-1)[slot_W] = np.repeat(segment_P, size_P)
            out[f"{prefix}positions"].reshape(-1)[slot_W] = ramps(np.zeros_like(size_P), size_P)
            flat[start_P + size_P - 1] = eos
            return start_P + head_P, flat

        head_P = (mode_P >= 0).astype(np.int64)
        start_P, flat = side("encoder_", head_P, head_P + p.length_P - noise_P + spans_P + 1)
        flat[(start_P - 1)[head_P > 0]] = mode_P[head_P > 0]
        to_Q = _runs(start_P, kept_Q + 1, spans_P)
        flat[ramps(to_Q, kept_Q)] = p.flat[ramps(source_Q, kept_Q)]
        flat[to_Q + kept_Q] = sentinel_Q
        start_P, flat = side("", np.zeros_like(noise_P), noise_P + spans_P + 1)
        to_Q = _runs(start_P, noise_Q + 1, spans_P)
        flat[to_Q] = sentinel_Q
        flat[ramps(to_Q + 1, noise_Q)] = p.flat[ramps(source_Q + kept_Q, noise_Q)]
        used = out["segment_ids"] > 0
        out["tokens"][:, 1:] = np.where(out["positions"][:, 1:] > 0, out["targets"][:, :-1], START_ID)
        out["loss_mask"][...] = used
        return out


def noise_counts(length: np.ndarray, density: float | np.ndarray,
                 mean_span: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to hide, spans to hide them in) for int64 lengths of 1 or more, rounded as T5 does it.

    One span or more, no two of them side by side, none at the beginning; a text of one token stays whole.
    """
    noise = np.clip(np.rint(length * density), 1, length - 1).astype(np.int64)
    wanted = np.where(np.asarray(mean_span) > 0, np.rint(noise / np.maximum(mean_span, 1.0)), 1)
    return noise, np.clip(wanted, 1, np.maximum(np.minimum(noise, length - noise), 1)).astype(np.int64)


def random_parts(total_P: np.ndarray, parts_P: np.ndarray, key_P: np.ndarray) -> np.ndarray:
    """Cuts each total into parts of at least 1, all ways equally likely: int64, the parts of all, one after the other.

    A total of 0 is one part of 0.
    """
    base_P, inner_P = np.cumsum(total_P) - total_P, parts_P - 1
    piece = np.repeat(np.arange(len(total_P)), inner_P)
    # Distinct places inside each total: the first few of a random permutation of them.
    place = permute(ramps(np.zeros_like(inner_P), inner_P), (total_P - 1)[piece], key_P[piece]) + 1
    ends = np.sort(np.concatenate([base_P[piece] + place, base_P + total_P]))
    return np.diff(ends, prepend=0)


class _Edited(NamedTuple):
    """seen: pieces with mistakes in them. wanted: the token that stood there; real: 0.0 where none did."""

    seen: Pieces
    wanted: np.ndarray
    real: np.ndarray


def _augment(p: Pieces, c: AugmentConfig, mask_id: int) -> _Edited:
    """Makes mistakes in the tokens of pieces of n predictions, n + 1 tokens; the first and the last stay."""
    count_P = p.length_P + 1
    piece_W, within_W = np.repeat(np.arange(len(count_P)), count_P), ramps(np.zeros_like(count_P), count_P)
    token_W, key_W = p.flat[ramps(p.at_P, count_P)].astype(np.int64), p.key_P[piece_W]
    free_W = (_uniform(fold(p.key_P, EDITED)) < c.share)[piece_W] & (within_W > 0) & (within_W < p.length_P[piece_W])
    how_W = np.where(free_W, _uniform(fold(key_W, within_W, EDIT)), 1.0)
    kind_W = np.searchsorted(np.cumsum([c.delete, c.mask, c.replace, c.insert]), how_W, side="right")
    delete_W, insert_W = kind_W == 0, kind_W == 3
    # No more grows in than the plan left room for.
    room_P = np.ceil(p.length_P * c.insert) + np.bincount(piece_W, delete_W, len(count_P))
    before_W = np.cumsum(insert_W) - insert_W
    insert_W &= before_W - before_W[np.cumsum(count_P) - count_P][piece_W] < room_P[piece_W]
    random_W = (fold(key_W, within_W, NEW) % np.uint64(mask_id)).astype(np.int64)
    seen_W = np.select([kind_W == 1, kind_W == 2], [mask_id, random_W], token_W)
    index = np.repeat(np.arange(len(token_W)), 1 + insert_W.astype(np.int64) - delete_W)
    made_up = insert_W[index] & (np.diff(index, prepend=-1) > 0)  # the first of the two
    count_P = np.bincount(piece_W[index], minlength=len(count_P))
    seen = Pieces(np.where(made_up, random_W[index], seen_W[index]), np.cumsum(count_P) - count_P, count_P - 1,
                  p.place_P, p.key_P)
    return _Edited(seen, token_W[index], (~made_up).astype(np.float32))


def _uniform(random: np.ndarray) -> np.ndarray:
    """Random 64 bits to float64 in [0, 1)."""
    return (random >> np.uint64(11)) * 2.0**-53


def _runs(start_P: np.ndarray, size_Q: np.ndarray, spans_P: np.ndarray) -> np.ndarray:
    """Where each span begins, when the spans of a piece lie side by side from its start on."""
    before_Q = np.cumsum(size_Q) - size_Q
    return before_Q + np.repeat(start_P - before_Q[np.cumsum(spans_P) - spans_P], spans_P)
