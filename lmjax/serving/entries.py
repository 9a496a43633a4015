"""Requests on their way through the engine, and the programs that are on their way for them."""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.serving.requests import Finished, Piece, Request, Sink, Ticket
from lmjax.serving.row_sampling import END, Told


class Entry:
    """A request on its way: it waits, its prompt is read, or it is answered in a row."""

    def __init__(self, request: Request, sink: Sink, ticket: Ticket):
        self.request, self.sink, self.ticket = request, sink, ticket
        self.row = -1
        self.read = 0  # tokens of the prompt that are in the cache
        self.reused = 0  # of these, those that the prefix cache had
        self.names: list[bytes] = []  # of its prompt's blocks
        self.logits: Any = None  # after the prompt, once it is read
        self.prompt_pieces = [Piece(request.prompt[0], math.nan)] if request.echo_scores else []
        self.steps = 0  # dispatched programs that draw a token for it
        self.tokens = 0  # of its answer, passed on
        self.stopped = False  # whether the model has ended its answer
        self.cancelled = self.finished = False
        self.began = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether its answer has all its tokens."""
        return self.stopped or self.tokens == self.request.max_tokens

    @property
    def draws(self) -> bool:
        """Whether its answer may need more steps than were dispatched: each draws a token."""
        return self.steps < self.request.max_tokens

    def emit(self, piece: Piece | Finished) -> None:
        try:
            self.sink(piece)
        except Exception:  # a broken sink must not end the answers of others
            traceback.print_exc(file=sys.stderr)
            self.cancelled = True

    def take_scores(self, tokens: Sequence[int], scores: Any) -> None:
        """Takes in the scores of tokens of the prompt, and of padding after them."""
        self.prompt_pieces += (Piece(token, float(logprob), self._likeliest(likeliest, theirs))
                               for token, logprob, likeliest, theirs in zip(
                                   tokens, *map(np.asarray, scores), strict=False))

    def take_token(self, token: int, logprob: float, told: Told, at: tuple[int, int]) -> Piece:
        """Counts a token of the answer, which is at index `at` of `told`."""
        self.tokens += 1
        if not self.request.alternatives:
            return Piece(token, logprob)
        return Piece(token, logprob, self._likeliest(told.likeliest[at], told.their_logprobs[at]))

    def _likeliest(self, tokens: Any, logprobs: Any) -> tuple[tuple[int, float], ...]:
        n = self.request.alternatives
        return tuple(zip(tokens[:n].tolist(), logprobs[:n].tolist(), strict=True)) if n else ()


class Flight(NamedTuple):
    """A dispatched program: its results, and what they are for."""

    results: Any
    land: Callable[[Any], None]


def pieces_of(rows: Sequence[Entry | None], told: Told) -> Iterator[tuple[Entry, list[Piece]]]:
    """What each request that goes on gets of a program's tokens, [rows, tokens]."""
    packed = np.asarray(told.packed)
    logprobs = packed[..., 2].view(np.float32).tolist()
    if any(entry and entry.request.alternatives for entry in rows):
        told = Told(packed, np.asarray(told.likeliest), np.asarray(told.their_logprobs))
    for i, (entry, row) in enumerate(zip(rows, packed[..., :2].tolist(), strict=True)):
        if entry is None or entry.finished:
            continue
        pieces = []
        for t, (flags, token) in enumerate(row):
            if not flags:
                break
            if flags & END:
                entry.stopped = True
                break
            pieces.append(entry.take_token(token, logprobs[i][t], told, (i, t)))
        yield entry, pieces
