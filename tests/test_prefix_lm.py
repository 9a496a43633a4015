"""A decoder that reads a prefix in both directions: who sees whom, packed as alone, and a run of the real command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, lines

from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.pipeline import DataConfig, open_splits
from lmjax.data.sources import SourceConfig
from lmjax.data.tokenizer import TokenizerConfig
from lmjax.models import build_model
from lmjax.models.decoder import DecoderConfig
from lmjax.nn.attention import Visibility
from lmjax.train_step import next_token_loss


@pytest.fixture(scope="module")
def batch():
    config = DataConfig(sources=(SourceConfig("s", "synthetic:20"),), tokenizer=TokenizerConfig(40), seq_len=48,
                        objective=ObjectiveConfig("prefix_lm"))
    return open_splits(config)[0].rows(np.arange(3))


@pytest.mark.parametrize("window", [0, 5])
def test_who_sees_whom(batch, window):
    position, segment, prefix = batch["positions"], batch["segment_ids"], batch["bidirectional"]
    got = Visibility(*map(jnp.asarray, (position, position, segment, segment)), window=window,
                     kv_prefix=jnp.asarray(prefix)).mask()
    want = np.zeros(got.shape, bool)
    for b, q, k in np.ndindex(*got.shape):
        near = not window or position[b, q] - position[b, k] < window
        order = position[b, k] <= position[b, q] or prefix[b, k]
        want[b, q, k] = segment[b, q] == segment[b, k] > 0 and order and near
    np.testing.assert_array_equal(got, want)
    assert (want & (position[:, :, None] < position[:, None, :])).any()


def test_packed_is_as_alone(batch):
    """Loss and gradients, document by document, to 1e-5."""
    model = build_model(DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32), vocab_size=40,
                        platform="cpu", dtype=jnp.float32)
    params, loss_fn = model.init(jax.random.key(0)), next_token_loss(model)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, batch, None).total))
    apart = []
    for row in range(3):
        for s in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == s
            alone = {name: np.zeros_like(values[:1]) for name, values in batch.items()}
            for name, values in batch.items():
                alone[name][0, : inside.sum()] = np.where(name == "segment_ids", 1, values[row][inside])
            apart.append(alone)
    assert len(apart) > 3
    documents = {name: np.concatenate([a[name] for a in apart]) for name in batch}
    losses, gradients = zip(*(gradient(params, b) for b in (batch, documents)), strict=True)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_the_suffix_is_not_seen_by_what_predicts_it(batch):
    model = build_model(DecoderConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32), vocab_size=40,
                        platform="cpu", dtype=jnp.float32)
    params, logits = model.init(jax.random.key(0)), jax.jit(model.logits)
    base = np.asarray(logits(params, batch))
    at = int(np.flatnonzero((batch["loss_mask"][0] > 0) & (batch["positions"][0] > 2))[0])  # the prefix's last token
    later, earlier = ({**batch, "tokens": batch["tokens"].copy()} for _ in range(2))
    later["tokens"][0, at + 1] ^= 1
    earlier["tokens"][0, at] ^= 1
    assert batch["bidirectional"][0, at] == 1 and batch["bidirectional"][0, at + 1] == 0
    np.testing.assert_array_equal(np.asarray(logits(params, later))[0, : at + 1], base[0, : at + 1])
    assert (np.asarray(logits(params, earlier))[0, at - 1] != base[0, at - 1]).any()


def test_a_run_of_the_command(tmp_path):
    finish(tmp_path / "run", "data.objective.name=prefix_lm", "data.objective.augment.share=0.5", "train.steps=20",
           "optimizer.warmup_steps=2", "eval.every=20", "model.num_layers=1")
    losses = [r["loss"] for r in lines(tmp_path / "run") if "loss" in r]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    wrong = finish(tmp_path / "other", "data.objective.name=masked_lm", expect=2)
    assert "got masked_lm, which needs the family encoder; change one of them" in wrong
