"""The engine: one thread that answers many requests in one running batch.

Requests join and leave the batch at every step. The thread dispatches a step before it reads the
tokens of the step before: the device itself knows which rows have ended.
"""

import collections
import functools
import itertools
import math
import sys
import threading
import time
import traceback
from typing import Any

import jax
import numpy as np

from lmjax.lm import LM
from lmjax.serving.entries import Entry, Flight, pieces_of
from lmjax.serving.plan import Plan, fit
from lmjax.serving.prefixes import Prefixes
from lmjax.serving.requests import Busy, Finished, Reason, Request, Sink, Ticket
from lmjax.serving.row_sampling import Told, settings_of

CHUNKS = 8  # chunks of prompts that are read between two steps, at most
WARM_UP = Request((0,), 1)


class Engine:
    """Answers requests with a model, in a thread of its own.

    Attributes:
      max_length: the tokens that a prompt and its answer may have together.
    """

    def __init__(self, lm: LM, *, draft: LM | None = None, queue: int = 64, **settings: Any):
        """
        Args:
          lm: the model, a decoder.
          draft: a small model with the same tokenizer that proposes tokens.
          queue: requests that wait for a slot, at most.
          settings: fields of `Plan`: slots, max_length, chunk, prefix_tokens,
            kv_cache, propose.

        Raises:
          UserError: a setting is out of its range, the model is no decoder, or the draft has
            another tokenizer.
        """
        self._fitted = fit(Plan(**settings), lm, draft)
        self._plan, self._shapes = self._fitted.plan, self._fitted.shapes
        self.lm, self.max_length, self._queue_limit = lm, self._plan.max_length, queue
        self._programs = self._fitted.programs
        self._params = self._programs.lay_out([m.params for m in (lm, draft) if m is not None])
        self._prefixes = Prefixes(self._shapes.block, self._shapes.blocks)
        self._begin_anew()
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: collections.deque[Entry] = collections.deque()
        self._by_ticket: dict[int, Entry] = {}
        self._draining = self._closed = False
        self._thread: threading.Thread | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds_per_request = 1.0

    def _begin_anew(self) -> None:
        self._state, self._page, self._pool = self._programs.empty()
        self._prefixes.clear()
        self._rows: list[Entry | None] = [None] * self._shapes.rows
        self._reading: Entry | None = None  # whose prompt is in the page
        self._flights: collections.deque[Flight] = collections.deque()

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queues a request.

        Args:
          request: what is asked.
          sink: gets each token and the end, in the engine's thread. It must not block.

        Raises:
          UserError: it can never be answered.
          Busy: the queue is full, or the engine is being drained.
        """
        self._fitted.check(request)
        with self._changed:
            if self._draining or self._closed:
                raise Busy("the server is stopping", 10)
            if len(self._waiting) >= self._queue_limit + self._rows.count(None):
                wait = self._seconds_per_request * (len(self._waiting) + 1) / len(self._rows)
                raise Busy("the queue is full", max(1, math.ceil(wait)))
            entry = Entry(request, sink, Ticket(next(self._numbers)))
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
        """Counters since the start, and how full the engine is now."""
        with self._changed:
            rows = [row for row in self._rows if row is not None]
            counts: dict[str, float] = {name: self._counts[name] for name in (
                "requests", "tokens", "prompt_tokens", "reused_tokens", "steps", "chunks",
                "row_steps", "faults")}
            return counts | {
                "queued": len(self._waiting), "running": len(rows), "slots": len(self._rows),
                "cache_bytes": self._fitted.cache_bytes,
                "cache_tokens": len(self._rows) * self._shapes.slots,
                "cache_used": sum(row.read + row.tokens for row in rows),
                "prefix_tokens": self._shapes.blocks * self._shapes.block,
                "prefix_used": len(self._prefixes) * self._shapes.block}

    def start(self) -> None:
        """Compiles all programs and starts the thread."""
        self._warm_up()
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

    def _warm_up(self) -> None:
        """Runs every program once, so that no request waits for a compiler."""
        p, shapes, zero = self._programs, self._shapes, np.int32(0)
        for length in self._plan.chunk_sizes:
            tokens = np.zeros((1, length), np.int32)
            logits, self._page = p.read(self._params, self._page, tokens, zero, zero)
        blocks = np.zeros(shapes.slots // shapes.block, np.int32)
        self._page = p.load(self._page, self._pool, blocks, zero)
        self._pool = p.store(self._pool, self._page, zero, zero)
        self._state, _ = p.join(self._state, self._page, logits, zero,
                                np.zeros(shapes.slots, np.int32), zero, settings_of(WARM_UP))
        self._state = p.stop(self._state, zero)
        self._state, told = p.step(self._params, self._state)
        jax.block_until_ready(told)

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
        """Reads prompts and steps; then takes in what the turn before has dispatched."""
        before = len(self._flights)
        self._sweep()
        self._read_prompts()
        rows = list(self._rows)
        if any(rows):
            self._state, told = self._programs.step(self._params, self._state)
            with self._changed:
                self._counts["steps"] += 1
                self._counts["row_steps"] += len(rows) - rows.count(None)
            self._took_off(told, rows)
        for _ in range(before):
            flight = self._flights.popleft()
            flight.land(flight.results)

    def _sweep(self) -> None:
        """Takes cancelled requests out of the queue and out of their rows."""
        with self._changed:
            gone = [entry for entry in self._by_ticket.values() if entry.cancelled]
        for entry in gone:
            if entry.row >= 0 and self._rows[entry.row] is entry:
                self._state = self._programs.stop(self._state, np.int32(entry.row))
            self._end(entry, "cancelled")

    def _read_prompts(self) -> None:
        """Reads chunks of prompts, the oldest first: one for each that has a row to go to.

        So a single long prompt delays a step by one chunk, and many prompts fill free rows fast.
        While most rows run, they wait for at most `CHUNKS` chunks.
        """
        with self._changed:
            asking = len(self._waiting) + (self._reading is not None)
        free = self._rows.count(None)
        chunks = min(asking, max(free, 1))
        if free < len(self._rows) // 2:
            chunks = min(chunks, CHUNKS)
        while chunks:
            if self._reading is None and not self._next_prompt():
                return
            entry = self._reading
            assert entry is not None
            if entry.logits is None:
                self._read_chunk(entry)
                chunks -= 1
            if entry.logits is not None and not self._join(entry):
                return

    def _next_prompt(self) -> bool:
        """Begins to read the prompt of the request that has waited longest, if there is one."""
        with self._changed:
            if not self._waiting:
                return False
            entry = self._reading = self._waiting.popleft()
        if entry.request.echo_scores:  # all of its tokens have to be read, to be scored
            return True
        entry.names = self._prefixes.names(entry.request.prompt)
        if places := self._prefixes.find(entry.names):
            blocks = np.zeros(self._shapes.slots // self._shapes.block, np.int32)
            blocks[: len(places)] = places
            self._page = self._programs.load(self._page, self._pool, blocks,
                                             np.int32(len(places)))
            entry.read = entry.reused = len(places) * self._shapes.block
        return True

    def _read_chunk(self, entry: Entry) -> None:
        prompt, first = entry.request.prompt, entry.read
        new = prompt[first : first + self._plan.chunk]
        tokens = np.zeros((1, self._plan.chunk_size(len(new))), np.int32)
        tokens[0, : len(new)] = new
        place = self._page, tokens, np.int32(first), np.int32(len(new) - 1)
        entry.read += len(new)
        if entry.request.echo_scores:
            following = prompt[first + 1 : entry.read + 1]
            next_C = np.zeros(tokens.shape[1], np.int32)
            next_C[: len(following)] = following
            logits, self._page, scores = self._programs.read_scored(
                self._params, *place, next_C, np.bool_(entry.request.alternatives > 0))
            self._flights.append(Flight(scores, functools.partial(
                entry.take_scores, following)))
        else:
            logits, self._page = self._programs.read(self._params, *place)
            self._keep(entry, first)
        with self._changed:
            self._counts["chunks"] += 1
        if entry.read == len(prompt):
            entry.logits = logits

    def _keep(self, entry: Entry, first: int) -> None:
        """Puts what was read into the prefix cache, if it is a whole block."""
        block, size = first // self._shapes.block, self._shapes.block
        if block < len(entry.names) and entry.read == first + size:
            place = self._prefixes.add(entry.names[block])
            if place is not None:
                self._pool = self._programs.store(self._pool, self._page, np.int32(place),
                                                  np.int32(first))

    def _join(self, entry: Entry) -> bool:
        """Gives a row to a request whose prompt is read; False if no row is free."""
        request = entry.request
        if not request.max_tokens:
            self._flights.append(Flight((), lambda _: self._end(entry, "length")))
        elif None not in self._rows:
            return False
        else:
            entry.row = self._rows.index(None)
            prompt = np.zeros(self._shapes.slots, np.int32)
            prompt[: len(request.prompt)] = request.prompt
            self._state, told = self._programs.join(
                self._state, self._page, entry.logits, np.int32(entry.row), prompt,
                np.int32(len(request.prompt)), settings_of(request))
            self._rows[entry.row] = entry
            self._took_off(told, [entry])
        entry.logits = self._reading = None
        return True

    def _took_off(self, told: Told, rows: list[Entry | None]) -> None:
        """Notes a dispatched program. A row that has told its last token is free from now on."""
        for entry in filter(None, rows):
            entry.steps += 1
            if not entry.draws:
                self._rows[entry.row] = None
        self._flights.append(Flight(told, functools.partial(self._land_tokens, rows)))

    def _land_tokens(self, rows: list[Entry | None], told: Told) -> None:
        """Passes on what a program drew, [rows, tokens]."""
        passed = 0
        for entry, pieces in pieces_of(rows, told):
            passed += len(pieces)
            for piece in pieces:
                entry.emit(piece)
            if entry.is_done:
                self._end(entry, "stop" if entry.stopped else "length")
        with self._changed:
            self._counts["tokens"] += passed

    def _end(self, entry: Entry, reason: Reason) -> None:
        entry.finished = True
        with self._changed:
            if entry.row >= 0 and self._rows[entry.row] is entry:
                self._rows[entry.row] = None
            if self._reading is entry:
                self._reading = None
            if entry in self._waiting:
                self._waiting.remove(entry)
            del self._by_ticket[entry.ticket.number]
            self._counts.update(requests=1, prompt_tokens=entry.read,
                                reused_tokens=entry.reused)
            seconds = time.monotonic() - entry.began
            self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
            self._changed.notify_all()
        # Who hears of the end finds its slot free.
        entry.emit(Finished(reason, len(entry.request.prompt), entry.reused,
                            tuple(entry.prompt_pieces)))

    def _fault(self) -> None:
        """Ends every request after an error, and begins anew with an empty batch."""
        with self._changed:
            self._counts["faults"] += 1
            entries = list(self._by_ticket.values())
            # If there is no memory for a new batch either, nothing is taken any more.
            closed, self._closed = self._closed, True
        try:
            self._begin_anew()
            self._closed = closed
        finally:
            for entry in entries:
                self._end(entry, "fault")
