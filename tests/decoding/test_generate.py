"""Generation against full forward passes, and sampling against the exact distribution."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.decoding.generate import Generator
from lmjax.decoding.sampling import Sampling, sample
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import Model, build_model
from lmjax.nn.moe import MoEConfig
from lmjax.sharding import MeshConfig, make_layout

V = 24
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9, 2], [20, 3, 11, 7]]


@functools.cache
def made(**keys):
    config = dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=24, vocab_size=V, init_std=0.4)
    model = build_model(DecoderConfig(**(config | keys)), vocab_size=V, platform="cpu", dtype=jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0))


@functools.cache
def forward(model):
    return jax.jit(model.logits)


def next_logits(model, params, tokens):
    """Logits behind the last of `tokens`, by a whole forward pass over a padded row."""
    length = len(tokens)
    row = np.zeros((1, 32), np.int32)
    row[0, :length] = tokens
    at = np.arange(32, dtype=np.int32)[None]
    batch = {"tokens": row, "positions": at, "segment_ids": (at < length).astype(np.int32)}
    return np.asarray(forward(model)(params, batch))[0, length - 1]


def greedy(model, params, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(model, params, tokens).argmax()))
    return tokens[len(prompt):]


@pytest.mark.parametrize("keys", [
    {}, dict(positions="learned", max_positions=32, use_bias=True), dict(sliding_window=3),
    dict(num_layers=3, layer_pattern=("local", "global"), sliding_window=3, moe=MoEConfig(experts=4))],
    ids=["rope", "learned", "window", "pattern-experts"])
def test_greedy_takes_the_argmax_of_full_forwards(keys):
    model, params = made(**keys)
    answers = Generator(model)(params, PROMPTS, max_tokens=9, sampling=GREEDY)
    assert answers == [greedy(model, params, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(a) for a in answers}) == 4


def test_rows_do_not_depend_on_each_other():
    """A prompt's answer is the same alone, among others, and among other others (same row, same seed)."""
    model, params = made()
    generator = Generator(model)
    for sampling in (GREEDY, Sampling(1.0), Sampling(0.7, 5, 0.9)):
        together = generator(params, PROMPTS, max_tokens=6, sampling=sampling, seed=3)
        assert generator(params, PROMPTS[:1], max_tokens=6, sampling=sampling, seed=3) == together[:1]
        others = [PROMPTS[0], [4], PROMPTS[2], [1] * 7]
        mixed = generator(params, others, max_tokens=6, sampling=sampling, seed=3)
        assert mixed[0] == together[0] and mixed[2] == together[2]
        longer = generator(params, PROMPTS[:3], max_tokens=12, sampling=sampling, seed=3)
        assert [a[:6] for a in longer] == together[:3]


def test_seeds_and_rows_draw_differently():
    model, params = made()
    generator = Generator(model)
    same_prompt = generator(params, [[5]] * 4, max_tokens=9, sampling=Sampling(1.0), seed=0)
    assert len({tuple(a) for a in same_prompt}) == 4
    assert generator(params, [[5]] * 4, max_tokens=9, sampling=Sampling(1.0), seed=0) == same_prompt
    assert generator(params, [[5]] * 4, max_tokens=9, sampling=Sampling(1.0), seed=1) != same_prompt


def test_the_end_of_text_token_ends_a_row_and_is_left_out():
    model, params = made()
    free = Generator(model)(params, PROMPTS, max_tokens=9, sampling=GREEDY)
    eos = free[1][4]
    expected = [a[: a.index(eos)] if eos in a else a for a in free]
    assert len({len(a) for a in expected}) > 1  # rows that end at different times
    assert Generator(model, eos_id=eos)(params, PROMPTS, max_tokens=9, sampling=GREEDY) == expected
    first = Generator(model, eos_id=free[0][0])
    assert first(params, PROMPTS[:1], max_tokens=9, sampling=GREEDY) == [[]]


def test_the_loop_stops_when_all_rows_have_ended(monkeypatch):
    """Three prompts in a bucket of four: the fourth row, which is nobody's, must not keep the loop going."""
    model, params = made()
    steps, step = [], Model.step

    def counted(self, params, tokens, cache, at=None):
        jax.debug.callback(lambda: steps.append(1))
        return step(self, params, tokens, cache, at)

    monkeypatch.setattr(Model, "step", counted)
    unused = greedy(model, params, [0], 15)  # what a row of padding would go on with
    prompt, eos = next(([first], answer[1]) for first in range(1, V)
                       if (answer := greedy(model, params, [first], 2))[1] not in unused)
    answers = Generator(model, eos_id=eos)(params, [prompt] * 3, max_tokens=15, sampling=GREEDY)
    jax.effects_barrier()
    assert max(map(len, answers)) <= 1 and len(steps) <= 4 < 15


def test_compiles_once_for_every_bucket(monkeypatch):
    """Prompts, lengths, seeds and sampling settings that fall into the same powers of two share one program."""
    model, params = made(num_layers=1)
    traces, step = [], Model.step

    def counted(self, params, tokens, cache, at=None):
        if at is not None:  # prefill: once a trace
            traces.append(tokens.shape)
        return step(self, params, tokens, cache, at)

    monkeypatch.setattr(Model, "step", counted)
    generator = Generator(model)
    for prompts, count, sampling, seed in (
            ([[1], [2, 3]], 5, GREEDY, 0), ([[1] * 16, [2]], 16, Sampling(0.5), 1),
            ([[4], [5]], 1, Sampling(1.0, 3), 2), ([[4], [5]], 7, Sampling(1.0, 3, 0.5), 9)):
        generator(params, prompts, max_tokens=count, sampling=sampling, seed=seed)
    assert traces == [(2, 16)]
    generator(params, [[1]] * 3, max_tokens=4, sampling=GREEDY)  # four rows
    generator(params, [[1]] * 4, max_tokens=8, sampling=GREEDY)
    assert traces == [(2, 16), (4, 16)]
    generator(params, [[1] * 17] * 2, max_tokens=4, sampling=GREEDY)  # 32 prompt tokens
    generator(params, [[1], [2]], max_tokens=17, sampling=GREEDY)  # 64 slots
    assert traces[2:] == [(2, 32), (2, 16)]


def test_a_sharded_model_generates_the_same_from_any_number_of_prompts():
    model, params = made(num_kv_heads=2)
    expected = Generator(model)(params, PROMPTS[:3], max_tokens=4, sampling=GREEDY)
    layout = make_layout(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    placed = jax.device_put(params, layout.tree(model.axes, model.shapes))
    assert Generator(model, layout)(placed, PROMPTS[:3], max_tokens=4, sampling=GREEDY) == expected


def test_refusals():
    model, params = made(positions="learned", max_positions=32, use_bias=True)
    with pytest.raises(ValueError, match="prompts: expected one or more, each of at least one token, "):
        Generator(model)(params, [[1], []], max_tokens=2)
    with pytest.raises(ValueError, match=r"max_tokens: expected .*max_positions=32, got 4 \+ 29; "):
        Generator(model)(params, [[1, 2, 3, 4]], max_tokens=29)


# --- the distribution


def exact(logits, sampling):
    """Token probabilities in float64: temperature, then the top_k likeliest, then the fewest with top_p."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)
    kept = order[: sampling.top_k or len(order)]
    p = np.exp(scaled[kept] - scaled[kept].max())
    p /= p.sum()
    count = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1 if sampling.top_p < 1 else len(p)
    out = np.zeros(len(scaled))
    out[kept[:count]] = p[:count] / p[:count].sum()
    return out


def chi_square(counts, probability):
    """How many standard deviations the chi-square statistic lies above its mean (Wilson and Hilferty 1931)."""
    expected = counts.sum() * probability
    many = expected >= 10
    counts, expected = np.append(counts[many], counts[~many].sum()), np.append(expected[many], expected[~many].sum())
    free = len(counts) - 1 - (expected[-1] == 0)
    use = expected > 0
    ratio = ((counts[use] - expected[use]) ** 2 / expected[use]).sum() / free
    return (ratio ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))


SETTINGS = [Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.7),
            Sampling(0.8, top_k=8, top_p=0.8), Sampling(1.5, top_k=100, top_p=0.95)]
DRAWS = 20_000


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_samples_follow_the_exact_distribution(setting):
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
    keys = jax.random.split(jax.random.key(1), DRAWS)
    traced = Sampling(*(np.asarray(v) for v in setting))
    drawn = jax.jit(sample)(jnp.broadcast_to(logits[None], (DRAWS, V)), keys, traced)
    counts, probability = np.bincount(drawn, minlength=V), exact(logits, setting)
    assert drawn.dtype == jnp.int32 and counts[probability == 0].sum() == 0  # nothing that was cut
    assert chi_square(counts, probability) < 4
    for other in (0.9, 1.1):  # the test would notice a temperature that is a tenth off
        wrong = exact(logits, setting._replace(temperature=setting.temperature * other))
        assert chi_square(counts, wrong) > 4


def test_generation_follows_the_exact_distribution():
    """Two tokens from the model itself, one prompt in many rows: their pairs follow p(a) p(b | a)."""
    model, params = made()
    setting, rows = Sampling(0.5, top_k=4), 4096
    first = exact(next_logits(model, params, [5, 6]), setting)
    pairs = np.zeros((V, V))
    for a in np.flatnonzero(first):
        pairs[a] = first[a] * exact(next_logits(model, params, [5, 6, a]), setting)
    answers = Generator(model)(params, [[5, 6]] * rows, max_tokens=2, sampling=setting, seed=4)
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.array(answers).T), 1)
    assert counts[pairs == 0].sum() == 0
    assert chi_square(counts.ravel(), pairs.ravel()) < 4


def test_extremes():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, V)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    best = np.argmax(logits, -1)
    for setting in (Sampling(0.0), Sampling(0.0, 3, 0.1), Sampling(1.0, 1), Sampling(1.0, 0, 1e-6), Sampling(1e-4)):
        np.testing.assert_array_equal(sample(logits, keys, setting), best)
