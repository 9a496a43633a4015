"""A decoder that reads a prefix in both directions, from its mask to a run of the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, lines

import lmjax
from lmjax.data.config import DataConfig
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.pipeline import open_splits
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig
from lmjax.decoding.beam import beam_search
from lmjax.decoding.generate import Generator
from lmjax.decoding.sampling import Sampling
from lmjax.decoding.speculative import Draft, speculate
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn.attention import AttentionMask
from lmjax.nn.routing import MoEConfig
from lmjax.tasks.losses import next_token_loss

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def batch():
    config = DataConfig(sources=(SourceConfig("s", "synthetic:20"),),
                        tokenizer=TokenizerConfig(40), seq_len=48,
                        objective=ObjectiveConfig("prefix_lm"))
    return open_splits(config)[0].rows(np.arange(3))


@pytest.mark.parametrize("window", [0, 5])
def test_who_sees_whom(batch, window):
    position, segment, prefix = batch["positions"], batch["segment_ids"], batch["bidirectional"]
    got = AttentionMask(*map(jnp.asarray, (position, position, segment, segment)), window=window,
                     kv_prefix=jnp.asarray(prefix)).to_dense()
    want = np.zeros(got.shape, bool)
    for b, q, k in np.ndindex(*got.shape):
        near = not window or position[b, q] - position[b, k] < window
        order = position[b, k] <= position[b, q] or prefix[b, k]
        want[b, q, k] = segment[b, q] == segment[b, k] > 0 and order and near
    np.testing.assert_array_equal(got, want)
    assert (want & (position[:, :, None] < position[:, None, :])).any()


@pytest.mark.long
def test_packed_is_as_alone(batch):
    """Loss and gradients, document by document, to 1e-5."""
    model = build_model(DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32),
                        vocab_size=40,
                        platform="cpu", dtype=jnp.float32)
    params, loss_fn = model.init(jax.random.key(0)), next_token_loss(model)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, batch, None).total))
    apart = []
    for row in range(3):
        for s in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == s
            alone = {name: np.zeros_like(values[:1]) for name, values in batch.items()}
            for name, values in batch.items():
                alone[name][0, : inside.sum()] = np.where(name == "segment_ids", 1,
                                                          values[row][inside])
            apart.append(alone)
    assert len(apart) > 3
    documents = {name: np.concatenate([a[name] for a in apart]) for name in batch}
    losses, gradients = zip(*(gradient(params, b) for b in (batch, documents)), strict=True)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_the_suffix_is_not_seen_by_what_predicts_it(batch):
    model = build_model(DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32),
                        vocab_size=40,
                        platform="cpu", dtype=jnp.float32)
    params, logits = model.init(jax.random.key(0)), jax.jit(model.logits)
    base = np.asarray(logits(params, batch))
    counts, position = batch["loss_mask"][0] > 0, batch["positions"][0]
    at = int(np.flatnonzero(counts & (position > 2))[0])  # the last token of the prefix
    later, earlier = ({**batch, "tokens": batch["tokens"].copy()} for _ in range(2))
    later["tokens"][0, at + 1] ^= 1
    earlier["tokens"][0, at] ^= 1
    assert batch["bidirectional"][0, at] == 1 and batch["bidirectional"][0, at + 1] == 0
    np.testing.assert_array_equal(np.asarray(logits(params, later))[0, : at + 1], base[0, : at + 1])
    assert (np.asarray(logits(params, earlier))[0, at - 1] != base[0, at - 1]).any()


def full(model, params, row, prompt):
    """Returns float32 [length, V]: the logits of a row whose first `prompt` tokens are its prefix.

    Computed in one forward pass, as in training.
    """
    at = np.arange(LENGTH, dtype=np.int32)[None]
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(row)] = row
    batch = {"tokens": tokens, "positions": at, "segment_ids": (at < len(row)).astype(np.int32),
             "bidirectional": (at < prompt).astype(np.int32)}
    return np.asarray(jax.jit(model.logits)(params, batch))[0, : len(row)]


LENGTH, PROMPTS = 32, [[5, 9, 7, 3, 11, 2, 8, 1, 30, 22, 17], [7, 1, 3]]


@pytest.mark.parametrize("keys", [
    pytest.param(dict(sliding_window=4, layer_pattern=("local", "global")), marks=pytest.mark.long),
    pytest.param(dict(sliding_window=4, layer_pattern=("local", "global"), num_layers=3),
                 marks=pytest.mark.slow),
    pytest.param(dict(), marks=pytest.mark.slow),
    pytest.param(dict(sliding_window=4), marks=pytest.mark.slow),
    pytest.param(dict(positions="learned", max_positions=LENGTH,
                      moe=MoEConfig(experts=4, per_token=2)), marks=pytest.mark.long)],
    ids=["pattern", "part of a pattern", "global", "window", "experts"])
def test_an_answer_follows_a_prompt_that_was_read_in_both_directions(keys):
    """Prompts of 11 and 3 tokens in one batch: every answer is the argmax of full forwards."""
    config = DecoderConfig(**dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32,
                                  init_std=0.4) | keys)
    model, causal = (build_model(config, vocab_size=40, platform="cpu", dtype=jnp.float32,
                                 prefix_lm=prefix)
                     for prefix in (True, False))
    params = jax.jit(model.init)(jax.random.key(0))
    answers = Generator(model)(params, PROMPTS, max_tokens=9, sampling=GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = full(model, params, prompt + answer, len(prompt))
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert answers != Generator(causal)(params, PROMPTS, max_tokens=9, sampling=GREEDY)
    if "layer_pattern" in keys:
        assert beam_search(Generator(model), params, PROMPTS, max_tokens=9, num_beams=1) == answers
        assert speculate(Generator(model), params, Draft(causal, params, 3), PROMPTS, max_tokens=9,
                         sampling=GREEDY)[0] == answers


@pytest.mark.slow
def test_a_run_of_the_command(tmp_path):
    finish(tmp_path / "run", "data.objective.name=prefix_lm",
           "data.objective.augment.share=0.5", "train.steps=20",
           "optimizer.warmup_steps=2", "eval.every=20", "model.num_layers=1")
    losses = [r["loss"] for r in lines(tmp_path / "run") if "loss" in r]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    lm = lmjax.load(tmp_path / "run")  # what is given of a text is its prefix
    scored = lm.continuations([(row, 2) for row in PROMPTS])
    for (value, _), prompt in zip(scored, PROMPTS, strict=True):
        given = len(prompt) - 2
        logits = full(lm.model, lm.params, prompt[:-1], given).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(log_p[given - 1 + i, prompt[given + i]] for i in range(2))
        assert value == pytest.approx(expected, rel=1e-4)
    wrong = finish(tmp_path / "other", "data.objective.name=masked_lm", expect=2)
    assert "got masked_lm, which needs the family encoder; change one of them" in wrong
