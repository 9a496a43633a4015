"""A server's engine answers with packed weights as `lm.generate` does."""

import numpy as np
import pytest
from tiny_lm import ask, tiny_lm

from lmjax.compression.quantize import quantize
from lmjax.decoding.sampling import Sampling
from lmjax.nn.packed import Quantization
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Request


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=pytest.mark.slow),
                                     pytest.param("int4", marks=pytest.mark.long)])
def test_answers_are_those_of_one_prompt_at_a_time(weights: str) -> None:
    lm = quantize(tiny_lm(embed_dim=64, mlp_dim=96), Quantization(weights, 32))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 290, rng.integers(3, 30)).tolist() for _ in range(12)]
    engine = Engine(lm, slots=4)
    engine.start()
    greedy = Sampling(0.0)
    got = [answer.ids for answer in ask(engine, [Request(tuple(prompt), 12, greedy)
                                                 for prompt in prompts])]
    engine.close()
    assert got == [lm._generator(lm.params, [prompt], max_tokens=12, sampling=greedy)[0]
                   for prompt in prompts]
