"""Speculative decoding against brute force and the exact distribution."""

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
    exact_probabilities,
    greedy_answer,
    next_logits,
    tiny_decoder,
    until,
)

from lmjax.decoding.generate import Generator
from lmjax.decoding.sampling import Sampling
from lmjax.decoding.speculative import Draft, speculate, verify


def test_speculation_does_not_change_greedy_answers():
    model, params = tiny_decoder()
    draft = Draft(*tiny_decoder(num_layers=1, embed_dim=8), 3)
    expected = [greedy_answer(model, params, prompt, 9) for prompt in PROMPTS]
    eos = expected[1][4]
    assert any(eos not in answer for answer in expected)  # some rows end, some go on
    answers, gained = speculate(Generator(model, end_ids=[eos]), params, draft, PROMPTS,
                                max_tokens=9, sampling=GREEDY)
    assert answers == until(eos, expected) and 1 <= gained < 4


@pytest.mark.long
def test_a_model_that_is_its_own_draft_keeps_every_proposal():
    model, params = tiny_decoder()
    answers, gained = speculate(Generator(model), params, Draft(model, params, 3), PROMPTS,
                                max_tokens=8, sampling=GREEDY)
    assert answers == [greedy_answer(model, params, prompt, 8) for prompt in PROMPTS]
    assert gained == 4  # 3 proposals and the token after them


@pytest.mark.long
def test_speculation_takes_back_tokens_that_a_window_would_have_forgotten():
    """The answers are longer than the windows of both models, which disagree all the time."""
    model, params = tiny_decoder(sliding_window=4, layer_pattern=("local", "global"))
    draft = Draft(*tiny_decoder(num_layers=1, embed_dim=8, sliding_window=3), 3)
    answers, gained = speculate(Generator(model), params, draft, PROMPTS, max_tokens=12,
                                sampling=GREEDY)
    assert answers == [greedy_answer(model, params, prompt, 12) for prompt in PROMPTS]
    assert gained < 4


@pytest.mark.long
def test_speculation_does_not_change_the_distribution():
    """Pairs of tokens in 4096 rows follow p(a) p(b | a) of the large model."""
    model, params = tiny_decoder()
    small, small_params = tiny_decoder(num_layers=1, embed_dim=8)
    setting, rows = Sampling(0.6, top_k=5), 4096
    pairs = exact_pairs(model, params, [5, 6], setting)
    answers, _ = speculate(Generator(model), params, Draft(small, small_params, 2),
                           [[5, 6]] * rows, max_tokens=2, sampling=setting, seed=3)
    counts = count_pairs(answers)
    assert counts[pairs == 0].sum() == 0
    assert chi_square(counts.ravel(), pairs.ravel()) < 4
    # The small model alone would never give some of these pairs.
    draft_pairs = pairs.sum(1, keepdims=True) * np.array([
        exact_probabilities(next_logits(small, small_params, [5, 6, a]), setting)
        for a in range(V)])
    assert counts[draft_pairs == 0].sum() > 0


def test_verification_follows_the_exact_distribution():
    rng, rows = np.random.default_rng(0), 20_000
    p, q = (rng.dirichlet(np.full(6, 0.7), size=(1, n)) for n in (2, 1))
    keys = jax.random.split(jax.random.key(0), rows)
    proposed = rng.choice(6, size=(rows, 1), p=q[0, 0])

    def in_every_row(x):
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32), (rows, *x.shape[1:]))

    count, after = verify(in_every_row(p), in_every_row(q), jnp.asarray(proposed, jnp.int32), keys)
    kept, after = np.asarray(count) > 0, np.asarray(after)
    first = np.bincount(np.where(kept, proposed[:, 0], after), minlength=6)
    assert chi_square(first, p[0, 0]) < 4 < chi_square(first, q[0, 0])
    assert chi_square(np.bincount(after[kept], minlength=6), p[0, 1]) < 4


def test_a_repetition_penalty_is_refused():
    model, params = tiny_decoder()
    refusal = "repetition_penalty: expected 1 with a draft model, got 2"
    with pytest.raises(ValueError, match=refusal):
        speculate(Generator(model), params, Draft(model, params), [[1]], max_tokens=2,
                  sampling=Sampling(repetition_penalty=2.0))
