"""The engine against `lm.generate_ids`, under random load."""

import random

import pytest
from tiny_lm import ask, tiny_lm

from lmjax.decoding.sampling import Sampling
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Request

GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def engine(lm):
    made = Engine(lm, slots=4, max_length=64, chunk=16)
    made.start()
    yield made
    made.close()


@pytest.mark.long
def test_greedy_answers_are_those_of_generate(lm, engine):
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 200) for _ in range(rng.randrange(1, 40))] for _ in range(12)]
    answers = ask(engine, [Request(tuple(prompt), 20, GREEDY) for prompt in prompts])
    texts = [lm.reader.names.continuation(prompt, answer.ids)
             for prompt, answer in zip(prompts, answers, strict=True)]
    assert texts == lm.generate_ids(prompts, max_tokens=20, temperature=0.0)
