"""Experts: losses that tasks compute themselves have those of the routers, once, and their load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.heads import HeadConfig
from lmjax.models.model import build_model
from lmjax.nn.routing import MoEConfig
from lmjax.tasks.classification import Classification
from lmjax.tasks.embeddings import Embeddings
from lmjax.tasks.grpo import Grpo
from lmjax.tasks.preferences import Preferences

SIZES = dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, vocab_size=32, init_std=0.5)
MOE = MoEConfig(experts=4, balance_loss=0.3, z_loss=0.1)
ROWS, LENGTH, CLASSES = 4, 6, 3
# Each loss of a task: the outputs of the head, and the prefixes of the texts that it reads.
TASKS = {"multi": (Classification(kind="multi"), CLASSES, ("",)),
         "regression": (Classification(kind="regression"), 1, ("",)),
         "embeddings": (Embeddings(), 0, ("", "second_")),
         "grpo": (Grpo(input="{a}", target="{b}"), 0, ("",)),
         "dpo": (Preferences(), 0, ("", "rejected_")),
         "reward": (Preferences(kind="reward"), 1, ("", "rejected_"))}
ENCODERS = ("multi", "regression", "embeddings")


def batch_of(prefixes, outputs):
    """Rows of random lengths, of which the last is padding; some of their tokens count."""
    rng = np.random.default_rng(0)
    batch = {"label_values": rng.random((ROWS, outputs or 2)).astype(np.float32)}
    for prefix in prefixes:
        lengths = np.array([*rng.integers(3, LENGTH + 1, ROWS - 1), 0])
        real = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
        batch |= {f"{prefix}{name}": values for name, values in {
            "tokens": rng.integers(3, 32, real.shape).astype(np.int32) * real,
            "targets": rng.integers(0, outputs or 32, real.shape).astype(np.int32) * real,
            "positions": np.arange(LENGTH, dtype=np.int32) * real, "segment_ids": real,
            "loss_mask": np.eye(1, LENGTH, 1, dtype=np.float32) * real,
            "values": rng.normal(size=real.shape).astype(np.float32)}.items()}
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_loss_of_a_task_has_those_of_the_routers(name):
    task, outputs, prefixes = TASKS[name]
    config = (EncoderConfig if name in ENCODERS else DecoderConfig)(
        **SIZES, head=HeadConfig(outputs, "linear"), moe=MOE)
    facts = {"labels": list("abc"), "counts": [1, 1, 1], "scheme": "none"}
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    without = dataclasses.replace(model, config=dataclasses.replace(config, moe=dataclasses.replace(
        MOE, balance_loss=0.0, z_loss=0.0)))
    params, key = jax.jit(model.init)(jax.random.key(0)), jax.random.key(1)
    batch = batch_of(prefixes, outputs)
    ours, plain = (task.loss(m, facts)(params, batch, key) for m in (model, without))
    rows = {name: np.concatenate([batch[prefix + name] for prefix in prefixes])
            for name in ("tokens", "positions", "segment_ids")}
    routing = model.states(params, rows)[1]
    each = 0.3 * float(routing.balance[0]) + 0.1 * float(routing.z[0])
    assert float(ours.weight) == ROWS - 1  # examples, or tokens of which each has one that counts
    assert float(ours.total - plain.total) == pytest.approx((ROWS - 1) * each, rel=1e-3)
    assert float(ours.nats) == float(plain.nats)
    np.testing.assert_array_equal(ours.extra["expert_counts"], routing.counts)
    assert ("reward" in ours.extra) == (name == "grpo")
    evaluated = task.eval_loss(model, facts)(params, batch, None).extra
    assert "expert_counts" not in evaluated  # only what an answer is read from
