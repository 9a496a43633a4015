"""Sampling against the exact distribution and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import (
    GREEDY,
    MISSING,
    PROMPTS,
    V,
    chi_square,
    exact_probabilities,
    next_logits,
    tiny_decoder,
)

from lmjax.decoding.generate import Generator
from lmjax.decoding.sampling import Sampling, adjust, penalise, sample

DRAWS = 20_000
draw = jax.jit(sample)


@pytest.mark.parametrize("setting", [
    Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.7),
    Sampling(0.8, top_k=8, top_p=0.8), Sampling(1.5, top_k=100, top_p=0.95)], ids=str)
def test_samples_follow_the_exact_distribution(setting):
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
    keys = jax.random.split(jax.random.key(1), DRAWS)
    traced = jax.tree.map(np.asarray, setting)
    drawn = draw(jnp.broadcast_to(logits[None], (DRAWS, V)), keys, traced)
    counts, probability = np.bincount(drawn, minlength=V), exact_probabilities(logits, setting)
    assert drawn.dtype == jnp.int32 and counts[probability == 0].sum() == 0
    assert chi_square(counts, probability) < 4
    for factor in (0.9, 1.1):  # the test notices a temperature that is 10% off
        wrong = setting._replace(temperature=setting.temperature * factor)
        assert chi_square(counts, exact_probabilities(logits, wrong)) > 4


def test_extreme_settings_take_the_likeliest_token():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, V)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    best = np.argmax(logits, -1)
    for setting in (Sampling(0.0), Sampling(0.0, 3, 0.1), Sampling(1.0, 1), Sampling(1.0, 0, 1e-6),
                    Sampling(1e-4)):
        traced = jax.tree.map(np.asarray, setting)
        np.testing.assert_array_equal(draw(logits, keys, traced), best)


def test_min_p_and_the_repetition_penalty_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, V)).astype(np.float32) * 2
    seen, mask = rng.integers(0, V, (3, 7)), np.zeros((3, V), bool)
    np.put_along_axis(mask, seen, True, axis=1)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor(seen), torch.tensor(logits)).numpy()
    penalised = penalise(jnp.asarray(logits), jnp.asarray(mask), 1.7)
    np.testing.assert_allclose(penalised, expected, rtol=1e-6)
    for sampling in (Sampling(0.7, min_p=0.1), Sampling(0.7, 9, 0.8, 0.05)):
        warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            warpers += [transformers.TopKLogitsWarper(sampling.top_k),
                        transformers.TopPLogitsWarper(sampling.top_p)]
        wanted = torch.tensor(logits)
        for warper in [*warpers, transformers.MinPLogitsWarper(sampling.min_p)]:
            wanted = warper(None, wanted)
        got = adjust(jnp.asarray(logits), sampling)
        kept = np.isfinite(got).sum(1)
        assert 1 < kept.min() and kept.max() < V
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-6)


def test_a_penalty_counts_the_prompt_and_the_answer():
    model, params = tiny_decoder()
    generator = Generator(model)
    answers = generator(params, PROMPTS, max_tokens=6,
                        sampling=Sampling(0.0, repetition_penalty=1.8))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = list(prompt)
        for token in answer:
            logits = np.array(next_logits(model, params, tokens))
            for t in set(tokens):
                logits[t] = logits[t] * 1.8 if logits[t] < 0 else logits[t] / 1.8
            assert token == logits.argmax()
            tokens.append(token)
    assert answers != generator(params, PROMPTS, max_tokens=6, sampling=GREEDY)


@pytest.mark.parametrize("setting, name", [
    (Sampling(min_p=1.0), "min_p"), (Sampling(repetition_penalty=0.0), "repetition_penalty")])
def test_settings_out_of_range_are_refused(setting, name):
    model, params = tiny_decoder()
    with pytest.raises(ValueError, match=name):
        Generator(model)(params, [[1]], max_tokens=1, sampling=setting)
