"""A BERT of transformers with the head of a task, and the same weights in a model of ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import huggingface
from lmjax.models.heads import HeadConfig
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.table import make_optimizer
from lmjax.training.state import state_spec
from lmjax.training.step import make_train_step
from lmjax.tree import named_leaves

MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
SETTINGS = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=40, initializer_range=0.3,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
# AdamW divides a gradient by its size, which would blow up the rounding of a gradient that is 0,
# such as that of the keys' biases; a larger epsilon does not.
RATE, DECAY, EPSILON = 1e-3, 0.1, 1e-4


class Twins:
    """Both models.

    Args:
      folder: an empty directory.
      cls: the class in transformers, such as BertForTokenClassification.
      head: the name of its last layer.
      outputs: of that layer.
    """

    def __init__(self, folder, cls, head, outputs):
        torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
        transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
        torch.manual_seed(0)
        config = transformers.BertConfig(**SETTINGS, num_labels=outputs)
        self._folder, self._mlm, self._head = folder, transformers.BertForMaskedLM(config), head
        self.theirs = getattr(transformers, cls)(config).eval()
        for parameter in self.theirs.parameters():  # new biases and norms are all alike
            torch.nn.init.normal_(parameter, std=0.3)
        self._names = [name for name, _ in self.theirs.named_parameters()]
        self._mlm.save_pretrained(folder)
        self._found = huggingface.read_directory(folder)
        self.model = self._build(HeadConfig(outputs))
        self.params = self.as_ours([p.data for p in self.theirs.parameters()])

    def _build(self, head):
        return build_model(dataclasses.replace(self._found.config, head=head), vocab_size=0,
                           platform="cpu", dtype=jnp.float32)

    def as_ours(self, tensors):
        """Tensors in the order of their parameters, as a tree of our model's parameters."""
        import torch
        given = dict(zip(self._names, tensors, strict=True))
        with torch.no_grad():
            for name, parameter in self._mlm.bert.named_parameters():
                parameter.copy_(given[f"bert.{name}"])
        self._mlm.save_pretrained(self._folder)
        trunk = self._build(HeadConfig())
        layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
        found = huggingface.read_directory(self._folder)
        read = dict(named_leaves(huggingface.read_params(
            found, trunk, layout.tree(trunk.axes, trunk.shapes))))
        read |= {f"task_head/{ours}": jnp.asarray(given[f"{self._head}.{theirs}"].numpy())
                 for ours, theirs in (("table", "weight"), ("bias", "bias"))}
        return jax.tree.unflatten(jax.tree.structure(self.model.shapes), [
            read[name] for name, _ in named_leaves(self.model.shapes)])

    def check_step(self, loss_fn, batch, *, theirs):
        """Asserts that loss, gradients and parameters after a step of AdamW are the same.

        theirs: gives the loss of their model on the same batch.
        """
        import torch
        tables = ("embeddings", self._head)
        groups = [{"params": [], "weight_decay": decay} for decay in (DECAY, 0.0)]
        for name, parameter in self.theirs.named_parameters():
            vector = parameter.ndim < 2 or any(part in name for part in tables)
            groups[vector]["params"].append(parameter)
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=EPSILON)
        loss = theirs(self.theirs)
        loss.backward()
        wanted = loss.item()
        parameters = list(self.theirs.parameters())
        gradients = self.as_ours([p.grad for p in parameters])
        optimizer.step()
        updated = self.as_ours([p.data for p in parameters])

        grad_fn = jax.value_and_grad(lambda params: (lambda loss: loss.total / loss.weight)(
            loss_fn(params, batch, jax.random.key(0))))
        loss, got = jax.jit(grad_fn)(self.params)
        assert float(loss) == pytest.approx(wanted, rel=1e-5)
        largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients))
        close(got, gradients, 1e-5 * largest)
        layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
        config = OptimizerConfig(peak_lr=RATE, schedule="constant", warmup_steps=0, clip_norm=0.0,
                                 weight_decay=DECAY, eps=EPSILON)
        tx = make_optimizer(config, 9, self.model.axes)
        spec = state_spec(self.model, tx, layout, ema=False)
        step = make_train_step(loss_fn, spec, layout, lambda step: RATE, seed=0)
        state, metrics = step(spec.start(self.params, 0), batch)
        assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)
        close(state.params, updated, 2e-5)


def close(ours, theirs, limit):
    for (name, a), (_, b) in zip(named_leaves(ours), named_leaves(theirs), strict=True):
        assert float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) <= limit, name
