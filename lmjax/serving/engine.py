"""The engine: one thread that answers many requests in one running batch.

Requests join and leave the batch at every step. The thread dispatches a step before it reads the
tokens of the step before: the device itself knows which rows have ended.
"""

import collections
import itertools
import math
import sys
import threading
import time
import traceback
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lmjax.config import at_least
from lmjax.data.reading import check_told
from lmjax.decoding.generate import size
from lmjax.decoding.reading import generator_of
from lmjax.errors import UserError
from lmjax.lm import LM
from lmjax.serving.programs import Drawn, State, compiled, settings_of
from lmjax.serving.requests import Busy, Finished, Piece, Request, Sink, Ticket

DEFAULT_LENGTH = 2048  # tokens of prompt and answer together, where a model could take more
CHUNKS = 8  # chunks of prompts between two steps, at most

Reason = Literal["stop", "length", "cancelled", "timeout", "fault"]


class _Running:
    """A request on its way: waiting, being fed, or being answered."""

    def __init__(self, request: Request, sink: Sink, ticket: Ticket):
        self.request, self.sink, self.ticket = request, sink, ticket
        self.row = -1
        self.fed = 0  # tokens of the prompt that were fed
        self.reused = 0
        self.to_draw = request.max_tokens  # tokens that no dispatched program draws yet
        self.produced = 0  # tokens that were passed on
        self.cancelled = self.finished = False
        self.began = time.monotonic()

    def emit(self, piece: Piece | Finished) -> None:
        try:
            self.sink(piece)
        except Exception:  # a broken sink must not end the answers of others
            traceback.print_exc(file=sys.stderr)
            self.cancelled = True

    def finish(self, reason: Reason) -> None:
        self.finished = True
        self.emit(Finished(reason, len(self.request.prompt), self.reused))


class _Flight(NamedTuple):
    """A dispatched program, and the request in each of its rows."""

    drawn: Drawn
    rows: list[_Running | None]


class Engine:
    """Answers requests with a model, in a thread of its own.

    Attributes:
      max_length: the tokens that a prompt and its answer may have together.
    """

    def __init__(self, lm: LM, *, slots: int = 16, max_length: int = 0, queue: int = 64,
                 chunk: int = 64):
        """
        Args:
          lm: the model, a decoder.
          slots: requests that are answered at the same time.
          max_length: of a prompt and its answer together, in tokens; 0: as in training, but at most
            `DEFAULT_LENGTH`.
          queue: requests that wait for a slot, at most.
          chunk: tokens of a prompt that are fed between two steps.

        Raises:
          UserError: a setting is out of its range, or the model is no decoder.
        """
        at_least(1, slots=slots, chunk=chunk)
        at_least(0, max_length=max_length, queue=queue)
        lm.need_vocabulary()
        lm.need_tokenizer()
        if "huggingface" in lm.about:
            check_told(lm.about["huggingface"])
        model = lm.model
        if model.config.family != "decoder":
            raise UserError("a decoder", f"an {model.config.family}",
                            "use lm.generate, which answers a batch at a time", "serve")
        self.lm, self._queue_limit = lm, queue
        self.max_length = max_length or min(lm.recipe.data.seq_len, DEFAULT_LENGTH)
        if model.config.positions == "learned" and self.max_length > model.config.max_positions:
            raise UserError(f"at most max_positions={model.config.max_positions}",
                            self.max_length, "lower it", where="max_length")
        # A prefix-LM's prompt sees itself in both directions, and experts with a capacity choose
        # among the tokens of a whole prompt.
        whole = model.prefix_lm or (model.config.moe.experts and model.config.moe.capacity)
        self._chunk = self.max_length if whole else min(chunk, size(self.max_length, 16))
        slots_per_row = -(-self.max_length // self._chunk) * self._chunk
        generator = generator_of(model, lm.layout, lm.reader)
        self._programs = compiled(model, generator.layout, generator.ids, slots, slots_per_row)
        self._params = self._programs.lay_out(lm.params)
        self._state: State = self._programs.empty()
        self._slots, self._slots_per_row = slots, slots_per_row
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: collections.deque[_Running] = collections.deque()
        self._by_ticket: dict[int, _Running] = {}
        self._rows: list[_Running | None] = [None] * slots
        self._flights: collections.deque[_Flight] = collections.deque()
        self._draining = self._closed = False
        self._thread: threading.Thread | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds_per_request = 1.0

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queues a request.

        Args:
          request: what is asked.
          sink: gets each token and the end, in the engine's thread. It must not block.

        Raises:
          UserError: it can never be answered.
          Busy: the queue is full, or the engine is being drained.
        """
        request.check(self.lm.model.config, self.max_length)
        with self._changed:
            if self._draining or self._closed:
                raise Busy("the server is stopping", 10)
            if len(self._waiting) >= self._queue_limit + self._free_rows():
                wait = self._seconds_per_request * (len(self._waiting) + 1) / self._slots
                raise Busy("the queue is full", max(1, math.ceil(wait)))
            entry = _Running(request, sink, Ticket(next(self._numbers)))
            self._by_ticket[entry.ticket.number] = entry
            self._waiting.append(entry)
            self._changed.notify_all()
            return entry.ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends an answer, whose slot is free at the next step; does nothing if it has ended."""
        with self._changed:
            if entry := self._by_ticket.get(ticket.number):
                entry.cancelled = True
                self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how full the engine is."""
        with self._changed:
            running = [row for row in self._rows if row is not None]
            used = sum(row.fed + row.request.max_tokens - row.to_draw for row in running)
            return {"queued": len(self._waiting), "running": len(running), "slots": self._slots,
                    "cache_tokens": self._slots * self._slots_per_row, "cache_used": used,
                    **{name: self._counts[name] for name in (
                        "requests", "tokens", "prompt_tokens", "reused_tokens", "steps",
                        "chunks", "faults")}}

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and finishes those that were accepted.

        Args:
          timeout: after so many seconds the rest is cancelled.

        Returns:
          Whether all were finished in time.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._by_ticket, timeout)
        self.close()
        return done

    def close(self) -> None:
        """Cancels what is left, and ends the thread."""
        with self._changed:
            self._closed = True
            for entry in self._by_ticket.values():
                entry.cancelled = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _free_rows(self) -> int:
        return sum(row is None for row in self._rows)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._by_ticket or self._flights or self._closed)
                if self._closed and not self._by_ticket:
                    return
            try:
                self._turn()
            except Exception:
                traceback.print_exc(file=sys.stderr)
                self._fault()

    def _turn(self) -> None:
        """Admits, feeds, steps; then reads what the turn before has dispatched."""
        before = len(self._flights)
        self._sweep()
        self._admit()
        self._feed()
        if any(row and row.fed == len(row.request.prompt) and row.to_draw for row in self._rows):
            self._state, drawn = self._programs.step(self._params, self._state)
            self._counts["steps"] += 1
            self._took_off(drawn, [row if row and row.fed == len(row.request.prompt)
                                   and row.to_draw else None for row in self._rows])
        for _ in range(before):
            self._land(self._flights.popleft())

    def _sweep(self) -> None:
        """Takes cancelled requests out of the queue and out of their rows."""
        with self._changed:
            gone = [entry for entry in self._by_ticket.values() if entry.cancelled]
            for entry in gone:
                if entry.row < 0:
                    self._waiting.remove(entry)
        for entry in gone:
            if entry.row >= 0 and self._rows[entry.row] is entry:
                self._state = self._programs.stop(self._state, np.int32(entry.row))
            self._end(entry, "cancelled")

    def _admit(self) -> None:
        """Gives free rows to the requests that have waited longest."""
        for row in range(self._slots):
            with self._changed:
                if self._rows[row] is not None or not self._waiting:
                    continue
                entry = self._waiting.popleft()
                entry.row, self._rows[row] = row, entry
            prompt = np.zeros(self._slots_per_row, np.int32)
            prompt[: len(entry.request.prompt)] = entry.request.prompt
            self._state = self._programs.begin(
                self._state, np.int32(row), prompt, np.int32(len(entry.request.prompt)),
                settings_of(entry.request))

    def _feed(self) -> None:
        """Feeds chunks of prompts: more of them where more rows wait than run."""
        unfed = [row for row in self._rows if row and row.fed < len(row.request.prompt)]
        unfed.sort(key=lambda row: row.ticket.number)
        answering = sum(row is not None for row in self._rows) - len(unfed)
        chunks = CHUNKS if not answering else min(CHUNKS, max(1, len(unfed) // answering))
        while chunks and unfed:
            self._feed_chunk(unfed[0])
            chunks -= 1
            if unfed[0].fed == len(unfed[0].request.prompt):
                unfed.pop(0)

    def _feed_chunk(self, entry: _Running) -> None:
        prompt, first, C = entry.request.prompt, entry.fed, self._chunk
        tokens = np.zeros((1, C), np.int32)
        new = prompt[first : first + C]
        tokens[0, : len(new)] = new
        entry.fed += len(new)
        is_last = entry.fed == len(prompt)
        self._state, drawn = self._programs.feed(
            self._params, self._state, np.int32(entry.row), tokens, np.int32(first),
            np.int32(len(new) - 1), np.bool_(is_last))
        self._counts["chunks"] += 1
        if is_last:
            self._took_off(drawn, [entry])

    def _took_off(self, drawn: Drawn, rows: list[_Running | None]) -> None:
        """Notes a dispatched program. A row that draws its last token there is free from now on."""
        for entry in filter(None, rows):
            entry.to_draw -= 1
            if not entry.to_draw:
                self._rows[entry.row] = None
        self._flights.append(_Flight(drawn, rows))

    def _land(self, flight: _Flight) -> None:
        """Reads what a program drew, and passes it on."""
        drawn: Any = jax.device_get(flight.drawn)
        for i, entry in enumerate(flight.rows):
            if entry is None or entry.finished or not drawn.real[i]:
                continue
            if drawn.is_end[i]:
                self._end(entry, "stop")
                continue
            count = entry.request.alternatives
            entry.emit(Piece(int(drawn.token[i]), float(drawn.logprob[i]), tuple(zip(
                drawn.likeliest[i, :count].tolist(), drawn.their_logprobs[i, :count].tolist(),
                strict=True))))
            entry.produced += 1
            self._counts["tokens"] += 1
            if entry.produced == entry.request.max_tokens:
                self._end(entry, "length")

    def _end(self, entry: _Running, reason: Reason) -> None:
        entry.finish(reason)
        with self._changed:
            if entry.row >= 0 and self._rows[entry.row] is entry:
                self._rows[entry.row] = None
            del self._by_ticket[entry.ticket.number]
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += entry.fed
            seconds = time.monotonic() - entry.began
            self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
            self._changed.notify_all()

    def _fault(self) -> None:
        """Ends every request after an error, and begins anew with an empty batch."""
        self._counts["faults"] += 1
        with self._changed:
            entries = list(self._by_ticket.values())
            self._waiting.clear()
            self._flights.clear()
            self._rows = [None] * self._slots
        for entry in entries:
            self._end(entry, "fault")
        state: Any = self._programs.empty()
        self._state = state
