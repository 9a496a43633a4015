"""The engine's memory does not grow with what it has answered."""

import gc
import os
import random
import threading

import pytest
from tiny_lm import tiny_lm

from lmjax.decoding.sampling import Sampling
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Finished, Request


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests():
    """Of all kinds, some cancelled; the first 2,000 fill the allocator's and Python's pools."""
    engine = Engine(tiny_lm(), slots=16, max_length=64, chunk=16)
    engine.start()
    rng, free = random.Random(0), threading.Semaphore(64)

    def ask(count):
        for i in range(count):
            free.acquire()
            prompt = tuple(rng.randrange(3, 250) for _ in range(rng.randrange(1, 40)))
            ticket = engine.submit(
                Request(prompt, rng.randrange(1, 12), rng.choice((Sampling(0.0), Sampling(1.0))),
                        seed=i, alternatives=rng.choice((0, 5)), echo_scores=i % 10 == 0),
                lambda item: free.release() if isinstance(item, Finished) else None)
            if i % 17 == 0:
                engine.cancel(ticket)

    ask(2_000)
    before = resident_bytes()
    ask(8_000)
    grown = resident_bytes() - before
    assert engine.drain(60) and engine.stats()["requests"] == 10_000
    assert grown < 8e6, f"{grown / 1e6:.1f} MB"
