"""Ways of decoding: penalties, beams and speculation against transformers, brute force and the exact distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import GREEDY, PROMPTS, V, chi_square, exact, greedy, made, next_logits

from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.decoding.beam import beam_search
from lmjax.decoding.generate import CHUNK, Generator
from lmjax.decoding.sampling import Sampling, adjust, penalise
from lmjax.decoding.speculative import Draft, speculate, verify
from lmjax.decoding.stopping import TextStream, cut

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"


@functools.cache
def theirs(name="llama"):
    """The model of test_generate as transformers' own, through an export."""
    import tempfile
    from pathlib import Path

    from lmjax import huggingface

    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    model, params = made()
    out = Path(tempfile.mkdtemp()) / "hf"
    huggingface.write_directory(out, model, params, None, log=lambda line: None)
    return transformers.AutoModelForCausalLM.from_pretrained(out).eval()


def test_min_p_and_the_repetition_penalty_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=(3, V)).astype(np.float32) * 2, rng.integers(0, V, (3, 7))
    mask = np.zeros((3, V), bool)
    np.put_along_axis(mask, seen, True, axis=1)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(seen), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(penalise(jnp.asarray(logits), jnp.asarray(mask), 1.7), expected, rtol=1e-6)
    for sampling in (Sampling(0.7, min_p=0.1), Sampling(0.7, 9, 0.8, 0.05)):
        chain = [transformers.TemperatureLogitsWarper(sampling.temperature),
                 *([transformers.TopKLogitsWarper(sampling.top_k), transformers.TopPLogitsWarper(sampling.top_p)]
                   if sampling.top_k else []), transformers.MinPLogitsWarper(sampling.min_p)]
        wanted = torch.tensor(logits)
        for warper in chain:
            wanted = warper(None, wanted)
        got = adjust(jnp.asarray(logits), sampling)
        assert 1 < np.isfinite(got).sum(1).min() and np.isfinite(got).sum(1).max() < V
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-6)


def test_a_penalty_counts_the_prompt_and_the_answer():
    model, params = made()
    answers = Generator(model)(params, PROMPTS, max_tokens=6, sampling=Sampling(0.0, repetition_penalty=1.8))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = list(prompt)
        for token in answer:
            logits = np.array(next_logits(model, params, tokens))
            for t in set(tokens):
                logits[t] = logits[t] * 1.8 if logits[t] < 0 else logits[t] / 1.8
            assert token == logits.argmax()
            tokens.append(token)
    assert answers != Generator(model)(params, PROMPTS, max_tokens=6, sampling=GREEDY)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
def test_beams_are_those_of_transformers(penalty):
    model, params = made()
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    lengths = set()
    for eos in (3, 11):
        got = beam_search(Generator(model, eos_id=eos), params, PROMPTS, max_tokens=7, num_beams=3,
                          length_penalty=penalty)
        for prompt, answer in zip(PROMPTS, got, strict=True):
            out = theirs().generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=7, num_beams=3,
                do_sample=False, length_penalty=penalty, pad_token_id=0, eos_token_id=eos,
                early_stopping=False)[0, len(prompt):].tolist()
            assert answer == (out[: out.index(eos)] if eos in out else out)
            lengths.add(len(answer))
    assert len(lengths) > 1 or penalty > 2


def test_an_encoder_decoder_answers_as_that_of_transformers(tmp_path):
    import lmjax

    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                                   decoder_start_token_id=0, initializer_factor=3.0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    lm = lmjax.load(tmp_path / "t5")
    generator = Generator(lm.model, eos_id=1)
    ids, mask = np.zeros((2, 4, 7), np.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    for beams, got in ((1, generator(lm.params, PROMPTS, max_tokens=8, sampling=GREEDY)),
                       (3, beam_search(generator, lm.params, PROMPTS, max_tokens=8, num_beams=3))):
        out = other.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=8, num_beams=beams,
                             do_sample=False)[:, 1:].tolist()
        assert got == [row[: row.index(1)] if 1 in row else row for row in out]
        assert len({tuple(answer) for answer in got}) > 1


def test_many_beams_find_the_best_answer():
    """As many beams as there are pairs of tokens: the best of all answers, by brute force."""
    model, params = made()
    log_p = lambda tokens: jax.nn.log_softmax(next_logits(model, params, tokens))  # noqa: E731
    first = log_p([5])
    best = max(((first[a] + log_p([5, a])[b], (a, b)) for a in range(V) for b in range(V)), key=lambda x: x[0])[1]
    assert beam_search(Generator(model), params, [[5]], max_tokens=2, num_beams=V) == [list(best)]
    assert beam_search(Generator(model), params, PROMPTS, max_tokens=5, num_beams=1) == [
        greedy(model, params, prompt, 5) for prompt in PROMPTS]


def test_speculation_does_not_change_greedy_answers():
    model, params = made()
    small, small_params = made(num_layers=1, embed_dim=8)
    answers, gained = speculate(Generator(model), params, Draft(small, small_params, 3), PROMPTS, max_tokens=9,
                                sampling=GREEDY)
    assert answers == [greedy(model, params, prompt, 9) for prompt in PROMPTS] and 1 <= gained < 4
    # A model that is its own draft is always right: each look gains all that was proposed, and one.
    same, gained = speculate(Generator(model), params, Draft(model, params, 3), PROMPTS, max_tokens=8, sampling=GREEDY)
    assert [a[:8] for a in answers] == same and gained == 4
    eos = answers[1][4]
    ended, _ = speculate(Generator(model, eos_id=eos), params, Draft(small, small_params, 3), PROMPTS, max_tokens=9,
                         sampling=GREEDY)
    assert ended == [a[: a.index(eos)] if eos in a else a for a in answers]


def test_speculation_takes_back_what_a_window_would_have_forgotten():
    """Answers longer than the windows of both models, which disagree all the time."""
    model, params = made(sliding_window=4, layer_pattern=("local", "global"))
    small, small_params = made(num_layers=1, embed_dim=8, sliding_window=3)
    answers, gained = speculate(Generator(model), params, Draft(small, small_params, 3), PROMPTS, max_tokens=12,
                                sampling=GREEDY)
    assert answers == [greedy(model, params, prompt, 12) for prompt in PROMPTS] and gained < 4


def test_speculation_does_not_change_the_distribution():
    """Pairs of tokens from 4096 rows follow p(a) p(b | a) of the large model, whatever the small one proposes."""
    model, params = made()
    small, small_params = made(num_layers=1, embed_dim=8)
    setting, rows = Sampling(0.6, top_k=5), 4096
    first = exact(next_logits(model, params, [5, 6]), setting)
    pairs = np.zeros((V, V))
    for a in np.flatnonzero(first):
        pairs[a] = first[a] * exact(next_logits(model, params, [5, 6, a]), setting)
    third = [exact(next_logits(small, small_params, [5, 6, a]), setting) for a in range(V)]
    answers, _ = speculate(Generator(model), params, Draft(small, small_params, 2), [[5, 6]] * rows, max_tokens=2,
                           sampling=setting, seed=3)
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.array(answers).T), 1)
    assert counts[pairs == 0].sum() == 0
    assert chi_square(counts.ravel(), pairs.ravel()) < 4
    wrong = np.array([first[a] * third[a] for a in range(V)])  # what the small model alone would give
    assert counts[wrong == 0].sum() > 0


def test_verification_follows_the_exact_distribution():
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.full(6, 0.7), size=(1, n)) for n in (2, 1))
    keys = jax.random.split(jax.random.key(0), 20_000)
    proposed = rng.choice(6, size=(20_000, 1), p=q[0, 0])
    wide = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (20_000, *x.shape[1:]))  # noqa: E731
    count, after = verify(wide(p), wide(q), jnp.asarray(proposed, jnp.int32), keys)
    token = np.where(np.asarray(count) > 0, proposed[:, 0], np.asarray(after))
    assert chi_square(np.bincount(token, minlength=6), p[0, 0]) < 4
    assert chi_square(np.bincount(token, minlength=6), q[0, 0]) > 4
    kept = np.asarray(count) > 0
    assert chi_square(np.bincount(np.asarray(after)[kept], minlength=6), p[0, 1]) < 4


def test_refusals():
    model, params = made()
    with pytest.raises(ValueError, match="repetition_penalty: expected 1 with a draft model, got 2"):
        speculate(Generator(model), params, Draft(model, params), [[1]], max_tokens=2,
                  sampling=Sampling(repetition_penalty=2.0))
    for bad, name in ((Sampling(min_p=1.0), "min_p"), (Sampling(repetition_penalty=0.0), "repetition_penalty")):
        with pytest.raises(ValueError, match=name):
            Generator(model)(params, [[1]], max_tokens=1, sampling=bad)


# --- text as it comes


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=300), ["ab abc abcd é 日本 stop here\n"] * 50)


def test_streamed_pieces_are_the_answer_and_never_show_a_stop_string(tokenizer):
    text = "ab é日本 abcd stop here"
    ids = tokenizer.encode(text)
    for stop, expected in (((), text), (("stop",), "ab é日本 abcd "), (("zz", "日"), "ab é")):
        pieces, ended = [], False
        watch = TextStream(tokenizer, [[1]], stop, lambda row, piece, pieces=pieces: pieces.append(piece))
        for n in range(1, len(ids) + 1):
            ended = watch([ids[:n]])[0]
            if ended:
                break
        assert watch.finish([ids[:n]]) == ["".join(pieces)] == [expected]
        assert ended == bool(stop) and "\ufffd" not in "".join(pieces) and len(pieces) > 1
    assert cut("abcabc", ("c", "ab")) == ("", True) and cut("abc", ()) == ("abc", False)


def test_a_watched_answer_is_the_same_and_ends_when_told():
    model, params = made()
    setting, count = Sampling(0.9), 2 * CHUNK + 5
    free = Generator(model)(params, PROMPTS, max_tokens=count, sampling=setting, seed=2)
    seen = []

    def watch(answers):
        seen.append([len(a) for a in answers])
        return [False, len(seen) == 1, False, False]

    watched = Generator(model)(params, PROMPTS, max_tokens=count, sampling=setting, seed=2, watch=watch)
    assert watched[0] == free[0] and watched[2:] == free[2:]
    assert watched[1] == free[1][:CHUNK] and seen[0] == [CHUNK] * 4 and seen[-1] == [count, CHUNK, count, count]
