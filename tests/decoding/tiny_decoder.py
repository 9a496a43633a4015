"""A tiny decoder with random weights, its answers by brute force, and statistics of samples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.decoding.sampling import Sampling
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model

V = 24
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9, 2], [20, 3, 11, 7]]
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"


@functools.cache
def tiny_decoder(**keys):
    """(model, parameters)."""
    config = dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=24,
                  vocab_size=V, init_std=0.4)
    model = build_model(DecoderConfig(**(config | keys)), vocab_size=V, platform="cpu",
                        dtype=jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0))


@functools.cache
def forward(model):
    return jax.jit(model.logits)


def next_logits(model, params, tokens):
    """The logits after the last of `tokens`, by a forward pass over the whole, padded row."""
    length = len(tokens)
    row = np.zeros((1, 32), np.int32)
    row[0, :length] = tokens
    at = np.arange(32, dtype=np.int32)[None]
    batch = {"tokens": row, "positions": at, "segment_ids": (at < length).astype(np.int32)}
    return np.asarray(forward(model)(params, batch))[0, length - 1]


def greedy_answer(model, params, prompt, count):
    """The likeliest `count` tokens after a prompt, one forward pass per token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(model, params, tokens).argmax()))
    return tokens[len(prompt):]


def until(eos, answers):
    """Each answer up to its first `eos`, which is left out."""
    return [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]


def exact_probabilities(logits, sampling):
    """In float64: temperature, then the top_k likeliest tokens, then the fewest with top_p."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)
    kept = order[: sampling.top_k or len(order)]
    p = np.exp(scaled[kept] - scaled[kept].max())
    p /= p.sum()
    count = len(p)
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
    out = np.zeros(len(scaled))
    out[kept[:count]] = p[:count] / p[:count].sum()
    return out


def exact_pairs(model, params, prompt, sampling):
    """float64 [V, V]: the probability of each pair of tokens after a prompt."""
    first = exact_probabilities(next_logits(model, params, prompt), sampling)
    pairs = np.zeros((V, V))
    for token in np.flatnonzero(first):
        logits = next_logits(model, params, [*prompt, token])
        pairs[token] = first[token] * exact_probabilities(logits, sampling)
    return pairs


def count_pairs(answers):
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.array(answers).T), 1)
    return counts


def chi_square(counts, probability):
    """How many standard deviations the chi-square statistic lies above its mean.

    Wilson and Hilferty 1931; outcomes expected fewer than 10 times count as one.
    """
    expected = counts.sum() * probability
    many = expected >= 10
    counts = np.append(counts[many], counts[~many].sum())
    expected = np.append(expected[many], expected[~many].sum())
    free = len(counts) - 1 - (expected[-1] == 0)
    use = expected > 0
    ratio = ((counts[use] - expected[use]) ** 2 / expected[use]).sum() / free
    return (ratio ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
