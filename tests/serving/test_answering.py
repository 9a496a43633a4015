"""Answers between the engine's thread and a response: ends, errors, time-outs, cancellation."""

import asyncio
import threading

import pytest

from lmjax.data.tokenizers import NamedIds, TokenizerConfig, train_tokenizer
from lmjax.serving.answering import Answer, Answers, Mailbox, Wanted
from lmjax.serving.errors import ApiError
from lmjax.serving.requests import Busy, Finished, Piece, Request, Ticket

DONE = Finished("length", 1, 0)


class Script:
    """An engine that says what it is told to, from a thread of its own."""

    def __init__(self, *, places=9, says=()):
        self.places, self.says, self.cancelled, self.sinks = places, says, [], {}

    def submit(self, request, sink):
        if len(self.sinks) == self.places:
            raise Busy("the queue is full", 3)
        ticket = Ticket(len(self.sinks))
        self.sinks[ticket.number] = sink
        threading.Thread(target=lambda: [sink(item) for item in self.says]).start()
        return ticket

    def cancel(self, ticket):
        self.cancelled.append(ticket.number)
        threading.Thread(target=self.sinks[ticket.number],
                         args=(Finished("cancelled", 1, 0),)).start()


@pytest.fixture(scope="module")
def names():
    return NamedIds(train_tokenizer(TokenizerConfig(vocab_size=275), ["the cat sat"] * 30))


def run(engine, names, *, count=1, seconds=20.0, streamed=False, stop=()):
    """The parts of `count` answers of a scripted engine."""
    async def inside():
        answers = Answers(engine.submit, engine.cancel, Mailbox(asyncio.get_running_loop()),
                          seconds)
        async with answers:
            answers.submit([Answer(i, names, Wanted(Request((5,), 9), stop, streamed),
                                   answers.changed) for i in range(count)])
            return [part async for part in answers.parts()]
    return asyncio.run(inside())


def said(names, text):
    return [Piece(i, -1.0) for i in names.encode(text)]


@pytest.mark.parametrize("streamed", [False, True])
def test_every_answer_comes_to_its_end(names, streamed):
    engine = Script(says=[*said(names, "the cat"), DONE])
    parts = run(engine, names, count=3, streamed=streamed)
    for number in range(3):
        own = [part for part in parts if part.number == number]
        assert "".join(part.text for part in own) == "the cat"
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + ["length"]
    assert engine.cancelled == []


def test_a_stop_string_frees_the_place_at_once(names):
    engine = Script(says=said(names, "the cat sat"))  # and would go on
    parts = run(engine, names, stop=(" cat",))
    assert "".join(part.text for part in parts) == "the" and parts[-1].finish_reason == "stop"
    assert engine.cancelled == [0]


@pytest.mark.parametrize("says, seconds, status", [
    ([Finished("fault", 1, 0)], 20.0, 500), ([Finished("cancelled", 1, 0)], 20.0, 503),
    ([], 0.05, 504)])
def test_what_goes_wrong_is_an_error(names, says, seconds, status):
    engine = Script(says=says)
    with pytest.raises(ApiError) as caught:
        run(engine, names, seconds=seconds)
    assert caught.value.status == status
    assert engine.cancelled == ([] if says else [0])


def test_a_request_that_finds_no_room_leaves_nothing_behind(names):
    engine = Script(places=2)
    with pytest.raises(Busy):
        run(engine, names, count=3)
    assert engine.cancelled == [0, 1]


def test_leaving_cancels_what_grows(names):
    engine = Script(says=said(names, "the"))

    async def leave():
        answers = Answers(engine.submit, engine.cancel, Mailbox(asyncio.get_running_loop()), 20.0)
        async with answers:
            answers.submit([Answer(0, names, Wanted(Request((5,), 9), streamed=True),
                                   answers.changed)])
            async for _ in answers.parts():
                raise ConnectionError
    with pytest.raises(ConnectionError):
        asyncio.run(leave())
    assert engine.cancelled == [0]
