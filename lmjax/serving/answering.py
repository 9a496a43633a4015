"""From the engine's thread to a response: the answers to one request, as they grow."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, NamedTuple

from lmjax.data.tokenizers import NamedIds
from lmjax.serving.errors import ApiError
from lmjax.serving.growing_text import GrowingText
from lmjax.serving.requests import Finished, Piece, Request, Sink, Ticket


class Mailbox:
    """Carries what the engine says into the event loop, with one wake-up for many tokens."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: deque[tuple[Answer, Piece | Finished]] = deque()
        self._woken = False

    def sink(self, answer: "Answer") -> Sink:
        """What the engine calls in its thread."""
        def post(item: Piece | Finished) -> None:
            self._items.append((answer, item))
            if not self._woken:
                self._woken = True
                with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the client
                    self._loop.call_soon_threadsafe(self._deliver)
        return post

    def _deliver(self) -> None:
        self._woken = False  # first: what comes from now on wakes the loop again
        touched: dict[Answer, None] = {}
        while self._items:
            answer, item = self._items.popleft()
            answer.receive(item)
            touched[answer] = None
        for answer in touched:
            answer.settle()


class Delta(NamedTuple):
    """A further part of one answer."""

    number: int  # of the answer
    text: str
    pieces: list[Piece]  # the tokens whose text ends in this part
    starts: list[int]  # where the text of each of them begins in the answer
    finish_reason: Literal["stop", "length"] | None = None


class Wanted(NamedTuple):
    """What is wanted of an answer."""

    request: Request  # what the engine is asked
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    streamed: bool = False  # whether parts are asked for before the end
    scored: bool = False  # whether the place of each token in the text is asked for


class Answer:
    """One answer: what the engine sent, decoded, up to its end."""

    def __init__(self, number: int, names: NamedIds, wanted: Wanted, changed: Callable[[], None]):
        """
        Args:
          number: among the answers to the request.
          names: the tokenizer.
          wanted: what is wanted.
          changed: called when there is a further part.
        """
        self.number, self.wanted, self.request = number, wanted, wanted.request
        self.pieces = list[Piece]()
        self.text = GrowingText(names, self.request.prompt, wanted.stop)
        self.finished: Finished | None = None
        self.reason = ""  # why the answer ended; "" while it grows
        self.ticket: Ticket | None = None
        self.first_at = 0.0  # of `time.monotonic`: when the first token came
        self._changed = changed
        self._decoded = 0  # pieces that are in the text

    def receive(self, item: Piece | Finished) -> None:
        """Takes what the engine sent."""
        if self.reason:  # what the engine made until it heard of the end
            self.finished = self.finished or (item if isinstance(item, Finished) else None)
        elif isinstance(item, Finished):
            self.finished, self.reason = item, item.reason
        else:
            self.first_at = self.first_at or time.monotonic()
            self.pieces.append(item)

    def settle(self) -> None:
        """Decodes what came, and says so if somebody waits for it."""
        if not (self.wanted.streamed or self.wanted.stop or self.reason):
            return  # decoding all at once costs less
        new = [piece.token for piece in self.pieces[self._decoded:]]
        for tokens in ([[token] for token in new] if self.wanted.scored else [new]):
            self.text.add(tokens)
        self._decoded = len(self.pieces)
        if self.text.stopped and not self.reason:
            self.reason = "stop"
        if self.reason:
            self.text.finish()
        self._changed()

    def end(self, reason: str) -> None:
        """Ends the answer from outside, unless the engine has ended it."""
        if self.finished is None:
            self.reason = reason
            self.settle()

    def take(self) -> Delta | None:
        """The next part; None if there is nothing new."""
        shown = self.text.take(last=bool(self.reason))
        if not shown.text and not self.reason:
            return None
        starts = [0, *self.text.ends][shown.first : shown.end]
        reason: Literal["stop", "length"] = "length" if self.reason == "length" else "stop"
        return Delta(self.number, shown.text, self.pieces[shown.first : shown.end], starts,
                     reason if self.reason else None)


class Answers:
    """All answers to one request of a client. Leaving the block cancels those that still grow."""

    def __init__(self, submit: Callable[[Request, Sink], Ticket],
                 cancel: Callable[[Ticket], None], mailbox: Mailbox, seconds: float):
        """
        Args:
          submit, cancel: of the engine.
          mailbox: of the event loop.
          seconds: until answers that still grow are given up.
        """
        self.all: list[Answer] = []
        self._submit, self._cancel, self._mailbox = submit, cancel, mailbox
        self._seconds = seconds
        self._news = asyncio.Event()
        self._clock: asyncio.TimerHandle | None = None

    def changed(self) -> None:
        """Says that an answer has a further part."""
        self._news.set()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Hands all of them to the engine, or none.

        Raises:
          UserError, Busy: see `Engine.submit`.
        """
        self.all = list(answers)
        self._clock = asyncio.get_running_loop().call_later(self._seconds, self.stop, "timeout")
        for answer in answers:
            answer.ticket = self._submit(answer.request, self._mailbox.sink(answer))

    def stop(self, reason: str = "cancelled") -> None:
        """Ends all answers and frees their places in the engine."""
        for answer in self.all:
            answer.end(reason)
            self._free(answer)

    async def parts(self, *, whole: bool = False) -> AsyncIterator[Delta]:
        """The parts of all answers as they come; the last one of each says why it ended.

        Args:
          whole: each answer is one part.
        Raises:
          ApiError: the time is over, or the engine failed.
        """
        growing = list(self.all)
        while growing:
            await self._news.wait()
            self._news.clear()
            for answer in list(growing):
                self._check(answer)
                if answer.reason and answer.finished is None:
                    self._free(answer)  # what it took of the prefix cache comes with its end
                    continue
                if whole and not answer.reason:
                    continue
                if delta := answer.take():
                    if delta.finish_reason:
                        growing.remove(answer)
                    yield delta

    async def whole(self) -> list[Delta]:
        """Every answer as one part, in order; raises as `parts` does."""
        return sorted([part async for part in self.parts(whole=True)],
                      key=lambda part: part.number)

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._clock:
            self._clock.cancel()
        self.stop()

    def _free(self, answer: Answer) -> None:
        """Tells the engine that nobody waits for the answer any more."""
        ticket, answer.ticket = answer.ticket, None
        if ticket is not None and answer.finished is None:
            self._cancel(ticket)

    def _check(self, answer: Answer) -> None:
        if answer.reason == "timeout":
            raise ApiError(504, "The answer took longer than this server allows "
                           f"({self._seconds:g} s). Ask for fewer tokens.", code="timeout")
        if answer.reason == "fault":
            raise ApiError(500, "The engine failed; the server's log says why.", code="fault")
        if answer.reason == "gone":
            raise ApiError(499, "The client has gone.", code="gone")
        if answer.reason == "cancelled":
            raise ApiError(503, "The server is shutting down.", code="cancelled",
                           headers={"Retry-After": "5"})
