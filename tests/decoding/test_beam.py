"""Beam search against transformers and against brute force."""

import functools
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from tiny_decoder import (
    GREEDY,
    MISSING,
    PROMPTS,
    V,
    greedy_answer,
    next_logits,
    tiny_decoder,
    until,
)

import lmjax
from lmjax import huggingface
from lmjax.decoding.beam import beam_search
from lmjax.decoding.generate import Generator


@functools.cache
def exported():
    """The tiny decoder in transformers."""
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    model, params = tiny_decoder()
    out = pathlib.Path(tempfile.mkdtemp()) / "hf"
    huggingface.write_directory(out, model, params, None, log=lambda line: None)
    return transformers.AutoModelForCausalLM.from_pretrained(out).eval()


@pytest.mark.parametrize("penalty", [
    pytest.param(1.0, marks=pytest.mark.long), -1.0,
    pytest.param(0.0, marks=pytest.mark.long),
    pytest.param(2.5, marks=pytest.mark.long)])
def test_beams_are_those_of_transformers(penalty):
    model, params = tiny_decoder()
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    lengths = set()
    for eos, banned in ((3, []), (11, []), ([3, 11], [9, 20])):
        end_ids = eos if isinstance(eos, list) else [eos]
        got = beam_search(Generator(model, end_ids=end_ids, banned_ids=banned), params, PROMPTS,
                          max_tokens=7, num_beams=3, length_penalty=penalty)
        for prompt, answer in zip(PROMPTS, got, strict=True):
            out = exported().generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=7, num_beams=3, do_sample=False, length_penalty=penalty,
                pad_token_id=0, eos_token_id=eos, early_stopping=False,
                suppress_tokens=banned or None)
            expected = out[0, len(prompt):].tolist()
            for end in end_ids:
                [expected] = until(end, [expected])
            assert answer == expected
            lengths.add(len(answer))
    assert len(lengths) > 1 or penalty > 2


@pytest.mark.long
def test_an_encoder_decoder_answers_as_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2,
                                   num_heads=2, decoder_start_token_id=0, initializer_factor=3.0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    lm = lmjax.load(tmp_path / "t5")
    generator = Generator(lm.model, end_ids=[1])
    ids, mask = np.zeros((2, 4, 7), np.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    for beams, got in (
            (1, generator(lm.params, PROMPTS, max_tokens=8, sampling=GREEDY)),
            (3, beam_search(generator, lm.params, PROMPTS, max_tokens=8, num_beams=3))):
        out = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask),
                              max_new_tokens=8, num_beams=beams, do_sample=False)
        assert got == until(1, out[:, 1:].tolist())
        assert len({tuple(answer) for answer in got}) > 1


def test_many_beams_find_the_best_answer():
    """With as many beams as tokens no pair of tokens is lost: the best one is the answer."""
    model, params = tiny_decoder()

    def log_p(tokens):
        return jax.nn.log_softmax(next_logits(model, params, tokens))

    first = log_p([5])
    pairs = {(a, b): first[a] + second for a in range(V)
             for b, second in enumerate(log_p([5, a]))}
    best = list(max(pairs, key=pairs.get))
    assert beam_search(Generator(model), params, [[5]], max_tokens=2, num_beams=V) == [best]


@pytest.mark.long
def test_one_beam_is_greedy():
    model, params = tiny_decoder()
    answers = beam_search(Generator(model), params, PROMPTS, max_tokens=5, num_beams=1)
    assert answers == [greedy_answer(model, params, prompt, 5) for prompt in PROMPTS]
