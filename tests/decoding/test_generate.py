"""Generation against full forward passes and against the exact distribution."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import (
    GREEDY,
    PROMPTS,
    V,
    chi_square,
    count_pairs,
    exact_pairs,
    greedy_answer,
    tiny_decoder,
    until,
)

from lmjax.decoding.generate import Generator, padded, prefill
from lmjax.decoding.sampling import Sampling
from lmjax.decoding.scoring import likelihoods
from lmjax.models.encdec import EncDecConfig
from lmjax.models.model import Model, build_model
from lmjax.nn.routing import MoEConfig
from lmjax.sharding import MeshConfig, make_layout


@pytest.mark.parametrize("keys", [
    pytest.param({}, id="rope", marks=pytest.mark.long),
    pytest.param(dict(positions="learned", max_positions=32, use_bias=True), id="learned",
                 marks=pytest.mark.long),
    pytest.param(dict(sliding_window=3), id="window", marks=pytest.mark.long),
    pytest.param(dict(num_layers=3, layer_pattern=("local", "global"), sliding_window=3,
                      moe=MoEConfig(experts=4)), id="pattern-experts")])
def test_greedy_takes_the_argmax_of_full_forwards(keys):
    model, params = tiny_decoder(**keys)
    answers = Generator(model)(params, PROMPTS, max_tokens=9, sampling=GREEDY)
    assert answers == [greedy_answer(model, params, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(a) for a in answers}) == 4


def test_rows_do_not_depend_on_each_other():
    """In the same row and with the same seed, a prompt has one answer whatever else is asked."""
    model, params = tiny_decoder()
    generator = Generator(model)
    for sampling in (GREEDY, Sampling(1.0), Sampling(0.7, 5, 0.9)):
        together = generator(params, PROMPTS, max_tokens=6, sampling=sampling, seed=3)
        alone = generator(params, PROMPTS[:1], max_tokens=6, sampling=sampling, seed=3)
        assert alone == together[:1]
        others = [PROMPTS[0], [4], PROMPTS[2], [1] * 7]
        mixed = generator(params, others, max_tokens=6, sampling=sampling, seed=3)
        assert mixed[0] == together[0] and mixed[2] == together[2]
        longer = generator(params, PROMPTS[:3], max_tokens=12, sampling=sampling, seed=3)
        assert [a[:6] for a in longer] == together[:3]


def test_seeds_and_rows_draw_differently():
    model, params = tiny_decoder()
    generator = Generator(model)

    def answers(seed):
        return generator(params, [[5]] * 4, max_tokens=9, sampling=Sampling(1.0), seed=seed)

    assert len({tuple(answer) for answer in answers(0)}) == 4
    assert answers(0) != answers(1)


def test_the_end_of_text_token_ends_a_row_and_is_left_out():
    model, params = tiny_decoder()
    free = Generator(model)(params, PROMPTS, max_tokens=9, sampling=GREEDY)
    eos = free[1][4]
    expected = until(eos, free)
    assert len({len(answer) for answer in expected}) > 1  # rows end at different times
    ended = Generator(model, end_ids=[eos])
    assert ended(params, PROMPTS, max_tokens=9, sampling=GREEDY) == expected
    first = Generator(model, end_ids=[free[0][0]])
    assert first(params, PROMPTS[:1], max_tokens=9, sampling=GREEDY) == [[]]


def test_the_loop_stops_when_all_rows_have_ended(monkeypatch):
    """Three prompts are in a bucket of four rows: the unused row does not keep the loop going."""
    model, params = tiny_decoder()
    steps, step = [], Model.step

    def counted(self, params, tokens, cache, at=None):
        jax.debug.callback(lambda: steps.append(1))
        return step(self, params, tokens, cache, at)

    monkeypatch.setattr(Model, "step", counted)
    unused = greedy_answer(model, params, [0], 15)  # the answer of a row of padding
    twos = ((first, greedy_answer(model, params, [first], 2)) for first in range(1, V))
    prompt, eos = next(([first], answer[1]) for first, answer in twos if answer[1] not in unused)
    answers = Generator(model, end_ids=[eos])(params, [prompt] * 3, max_tokens=15, sampling=GREEDY)
    jax.effects_barrier()
    assert max(map(len, answers)) <= 1 and len(steps) <= 4 < 15


@pytest.mark.long
def test_compiles_once_for_every_bucket(monkeypatch):
    """Within the same sizes, all prompts, seeds and sampling settings share a program."""
    model, params = tiny_decoder(num_layers=1)
    traces, step = [], Model.step

    def counted(self, params, tokens, cache, at=None):
        if at is not None:  # the prefill, once per trace
            traces.append(tokens.shape)
        return step(self, params, tokens, cache, at)

    monkeypatch.setattr(Model, "step", counted)
    generator = Generator(model)
    for prompts, count, sampling, seed in (
            ([[1], [2, 3]], 5, GREEDY, 0), ([[1] * 16, [2]], 16, Sampling(0.5), 1),
            ([[4], [5]], 1, Sampling(1.0, 3), 2), ([[4], [5]], 7, Sampling(1.0, 3, 0.5), 9)):
        generator(params, prompts, max_tokens=count, sampling=sampling, seed=seed)
    assert traces == [(2, 16)]
    generator(params, [[1]] * 9, max_tokens=4, sampling=GREEDY)  # ten rows: one is padding
    generator(params, [[1]] * 10, max_tokens=8, sampling=GREEDY)
    assert traces == [(2, 16), (10, 16)]
    generator(params, [[1] * 17] * 2, max_tokens=4, sampling=GREEDY)  # 32 prompt tokens
    generator(params, [[1], [2]], max_tokens=17, sampling=GREEDY)  # 64 slots
    assert traces[2:] == [(2, 32), (2, 16)]


@pytest.mark.long
def test_a_sharded_model_generates_the_same_from_any_number_of_prompts():
    model, params = tiny_decoder(num_kv_heads=2)
    expected = Generator(model)(params, PROMPTS[:3], max_tokens=4, sampling=GREEDY)
    layout = make_layout(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    placed = jax.device_put(params, layout.tree(model.axes, model.shapes))
    assert Generator(model, layout)(placed, PROMPTS[:3], max_tokens=4, sampling=GREEDY) == expected


def test_refusals():
    model, params = tiny_decoder(positions="learned", max_positions=32, use_bias=True)
    refusal = r"prompts\[1\]: expected at least one token id, got none; "
    with pytest.raises(ValueError, match=refusal):
        Generator(model)(params, [[1], []], max_tokens=2)
    with pytest.raises(ValueError, match=r"max_tokens: expected .*max_positions=32, got 4 \+ 29; "):
        Generator(model)(params, [[1, 2, 3, 4]], max_tokens=29)


@pytest.mark.long
def test_generation_follows_the_exact_distribution():
    """Pairs of tokens in 4096 rows of one prompt follow p(a) p(b | a)."""
    model, params = tiny_decoder()
    setting, rows = Sampling(0.5, top_k=4), 4096
    pairs = exact_pairs(model, params, [5, 6], setting)
    answers = Generator(model)(params, [[5, 6]] * rows, max_tokens=2, sampling=setting, seed=4)
    counts = count_pairs(answers)
    assert counts[pairs == 0].sum() == 0
    assert chi_square(counts.ravel(), pairs.ravel()) < 4


def most_logits(run, *args):
    """The largest number of positions whose float32 logits a program holds, by its trace."""
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(run)(*args)))
    found = [[*map(int, shape.split(","))] for shape in shapes]
    return max(math.prod(shape[:-1]) for shape in found if shape[-1] == V and len(shape) > 2)


def test_logits_are_held_of_the_positions_that_are_wanted():
    """Of a prompt the last one's; of a text that is scored some at a time."""
    model, params = tiny_decoder(mlp_dim=20)
    prompts = padded([[1] * 200] * 4)
    start = functools.partial(prefill, prompts=prompts, slots=300, start_id=0)
    assert most_logits(lambda params: start(model, params)[0], params) == 4
    both = build_model(EncDecConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=20,
                                    vocab_size=V), vocab_size=V, platform="cpu", dtype=jnp.float32)
    assert most_logits(lambda params: start(both, params)[0], both.shapes) == 4
    whole = np.ones((4, 200), np.int32)
    batch = {"tokens": whole, "positions": whole, "segment_ids": whole}
    at_KC = np.zeros((50, 16), np.int32)
    assert most_logits(functools.partial(likelihoods, model), params, batch, np.int32(4), at_KC,
                       at_KC, np.int32(800)) == 16
    assert most_logits(model.logits, params, batch) == 800, "what the others would hold"
