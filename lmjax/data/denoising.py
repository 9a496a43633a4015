"""Denoising objectives: spans of a text are hidden, and the decoder writes them or the whole text.

Span corruption is T5's (arXiv:1910.10683); UL2 mixes several denoisers (arXiv:2205.05131); text
infilling is BART's (arXiv:1910.13461).

Shape legend: P pieces, Q hidden spans of all pieces, N lengths of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmjax.data.hashing import fold, permute, uniform
from lmjax.data.rows import (
    DECODER,
    ENCODER,
    START_ID,
    Draw,
    Pieces,
    Rows,
    empty,
    ramps,
    segments,
    starts,
)
from lmjax.errors import UserError


@dataclass(frozen=True)
class Denoiser:
    """One way to hide spans."""

    density: float = 0.15   # share of the tokens that is hidden
    mean_span: float = 3.0  # mean length of the hidden spans; 0: one span, at the end
    mode: str = ""          # a token before the input that names the task; "" for none
    weight: float = 1.0     # share of the documents, relative to the other denoisers

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise UserError("a share in (0, 1)", self.density, "T5 has 0.15", where="density")
        if self.mean_span and self.mean_span < 1:
            raise UserError("at least 1, or 0", self.mean_span, "T5 has 3", where="mean_span")
        if self.weight <= 0:
            raise UserError("more than 0", self.weight, "raise it or drop the denoiser",
                            where="weight")


INFILLING = Denoiser(0.3, 3.0)  # section 3 of arXiv:1910.13461; spans of no tokens are left out
UL2 = (  # table 1 of arXiv:2205.05131
    Denoiser(0.15, 3.0, "[NLU]"),
    Denoiser(0.15, 8.0, "[NLU]"),
    Denoiser(0.25, 0.0, "[S2S]"),
    Denoiser(0.5, 3.0, "[NLG]"),
    Denoiser(0.5, 8.0, "[NLG]"),
    Denoiser(0.15, 64.0, "[NLG]"),
    Denoiser(0.5, 64.0, "[NLG]"),
)


class Denoising:
    """Makes the rows of an encoder-decoder from pieces of text, by a mixture of denoisers.

    Args:
      mixture: the denoisers.
      name: of the objective, for messages.
      seq_len: length of the encoder's rows.
      sentinels: the ids for the hidden spans of a piece, in their order.
      modes: the id of each mode.
      mask: the id that hides every span, in which case the decoder writes the whole text; None:
        spans have sentinels, and the decoder writes the spans.
    Attributes:
      longest: tokens of the longest piece.
      cost: room that a piece of n tokens takes in a row of seq_len, int64 [longest + 1].
      fields: row length of each array of a batch.
    Raises:
      UserError: seq_len is too short, or a piece has more spans than there are sentinels.
    """

    def __init__(self, mixture: Sequence[Denoiser], *, name: str, seq_len: int,
                 sentinels: Sequence[int], modes: Mapping[str, int], mask: int | None = None):
        self.mixture, self.modes, self.mask = mixture, modes, mask
        self.sentinels = np.array(sentinels)
        length_N = np.arange(1, int(seq_len / (1 - min(d.density for d in mixture))) + 2)
        inputs_N, targets_N, spans_N = (np.zeros_like(length_N) for _ in range(3))
        for d in mixture:  # a row must have room for the denoiser that takes the most
            noise_N, parts_N = noise_counts(length_N, d.density, d.mean_span)
            inputs_N = np.maximum(inputs_N, length_N - noise_N + parts_N + 1 + bool(d.mode))
            targets_N = np.maximum(
                targets_N, 1 + (noise_N + parts_N if mask is None else length_N))
            spans_N = np.maximum(spans_N, parts_N)
        inputs_N, targets_N = np.maximum.accumulate(inputs_N), np.maximum.accumulate(targets_N)
        self.longest = int(np.searchsorted(inputs_N, seq_len, side="right"))
        if not self.longest:
            raise UserError(f"at least {inputs_N[0]} for {name}", seq_len, "raise it",
                            where="data.seq_len")
        most = int(spans_N[: self.longest].max())
        if mask is None and most > len(sentinels):
            raise UserError(f"at least {most}, the spans of a row", len(sentinels), "raise it",
                            where="data.objective.sentinels")
        decoder_len = int(targets_N[self.longest - 1])
        # A row is full when either side is: the decoder's share is scaled to the encoder's length.
        cost_N = np.maximum(inputs_N, -(-targets_N * seq_len // decoder_len))
        self.cost = np.concatenate([[0], cost_N[: self.longest]])
        self.fields = dict.fromkeys(ENCODER, seq_len) | dict.fromkeys(DECODER, decoder_len)

    def rows(self, p: Pieces, rows: int, eos_id: int) -> Rows:
        """The batch of `rows` rows that hold these pieces.

        The encoder reads (mode) kept_1 sentinel_1 kept_2 sentinel_2 ... EOS; the decoder writes
        sentinel_1 hidden_1 sentinel_2 hidden_2 ... EOS. With a mask in place of the sentinels, it
        writes the text and EOS.
        """
        density_P, mean_P, mode_P = self._choose(p.key_P)
        hidden_P, spans_P = noise_counts(p.length_P, density_P, mean_P)
        kept_Q = random_parts(p.length_P - hidden_P, spans_P, fold(p.key_P, Draw.KEPT_SPANS))
        hidden_Q = random_parts(hidden_P, spans_P, fold(p.key_P, Draw.HIDDEN_SPANS))
        sentinel_Q = (self.sentinels[ramps(np.zeros_like(spans_P), spans_P)]
                      if self.mask is None else np.full(len(hidden_Q), self.mask))
        source_Q = _spans_from(p.at_P, kept_Q + hidden_Q, spans_P)
        out = empty(self.fields, rows)

        head_P = (mode_P >= 0).astype(np.int64)
        size_P = head_P + p.length_P - hidden_P + spans_P + 1
        start_P = _place(out, "encoder_", size_P, p.place_P)
        flat = out["encoder_tokens"].reshape(-1)
        flat[start_P + size_P - 1] = eos_id
        flat[start_P[head_P > 0]] = mode_P[head_P > 0]
        to_Q = _spans_from(start_P + head_P, kept_Q + 1, spans_P)
        flat[ramps(to_Q, kept_Q)] = p.flat[ramps(source_Q, kept_Q)]
        flat[to_Q + kept_Q] = sentinel_Q

        size_P = 1 + (hidden_P + spans_P if self.mask is None else p.length_P)
        start_P = _place(out, "", size_P, p.place_P)
        flat = out["targets"].reshape(-1)
        flat[start_P + size_P - 1] = eos_id
        if self.mask is None:
            to_Q = _spans_from(start_P, hidden_Q + 1, spans_P)
            flat[to_Q] = sentinel_Q
            flat[ramps(to_Q + 1, hidden_Q)] = p.flat[ramps(source_Q + kept_Q, hidden_Q)]
        else:
            flat[ramps(start_P, p.length_P)] = p.flat[ramps(p.at_P, p.length_P)]
        out["tokens"][:, 1:] = np.where(out["positions"][:, 1:] > 0, out["targets"][:, :-1],
                                        START_ID)
        out["loss_mask"][...] = out["segment_ids"] > 0
        return out

    def _choose(self, key_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Density, mean span and mode (its id, -1 for none) of the denoiser of each piece."""
        shares = np.cumsum([d.weight for d in self.mixture])
        random_P = uniform(fold(key_P, Draw.DENOISER))
        which_P = np.searchsorted(shares[:-1] / shares[-1], random_P, side="right")
        table = [(d.density, d.mean_span, self.modes.get(d.mode, -1)) for d in self.mixture]
        density_P, mean_P, mode_P = (np.array(column)[which_P]
                                     for column in zip(*table, strict=True))
        return density_P, mean_P, mode_P


def noise_counts(length: np.ndarray, density: float | np.ndarray,
                 mean_span: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of a text is hidden, rounded as in T5.

    There is at least one span, no two spans touch, and none is at the beginning. A text of one
    token stays whole.

    Args:
      length: tokens of each text, int64, at least 1.
      density, mean_span: as in `Denoiser`; one for all or one per text.
    Returns:
      (number of tokens to hide, number of spans), int64 each.
    """
    noise = np.clip(np.rint(length * density), 1, length - 1).astype(np.int64)
    wanted = np.where(np.asarray(mean_span) > 0, np.rint(noise / np.maximum(mean_span, 1.0)), 1)
    most = np.maximum(np.minimum(noise, length - noise), 1)
    return noise, np.clip(wanted, 1, most).astype(np.int64)


def random_parts(total_P: np.ndarray, parts_P: np.ndarray, key_P: np.ndarray) -> np.ndarray:
    """Cuts each total into parts of at least 1, all ways equally likely.

    A total of 0 is one part of 0.

    Returns:
      int64, the parts of all totals, one total after the other.
    """
    base_P, inner_P = np.cumsum(total_P) - total_P, parts_P - 1
    piece = np.repeat(np.arange(len(total_P)), inner_P)
    # Distinct cuts inside each total: the first few of a random permutation of all its places.
    place = permute(ramps(np.zeros_like(inner_P), inner_P), (total_P - 1)[piece], key_P[piece]) + 1
    ends = np.sort(np.concatenate([base_P[piece] + place, base_P + total_P]))
    return np.diff(ends, prepend=0)


def _place(out: Rows, prefix: str, size_P: np.ndarray, place_P: np.ndarray) -> np.ndarray:
    """Writes segment ids and positions of one side; returns where each piece begins, flattened."""
    segment_ids = out[f"{prefix}segment_ids"]
    start_P = starts(size_P, place_P, segment_ids.shape[1])
    slots = ramps(start_P, size_P)
    segment_ids.reshape(-1)[slots] = np.repeat(segments(place_P), size_P)
    out[f"{prefix}positions"].reshape(-1)[slots] = ramps(np.zeros_like(size_P), size_P)
    return start_P


def _spans_from(start_P: np.ndarray, size_Q: np.ndarray, spans_P: np.ndarray) -> np.ndarray:
    """Where each span begins, if the spans of a piece lie side by side from its start."""
    before_Q = np.cumsum(size_Q) - size_Q
    return before_Q + np.repeat(start_P - before_Q[np.cumsum(spans_P) - spans_P], spans_P)
