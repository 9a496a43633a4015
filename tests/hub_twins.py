"""A model of transformers with random weights and ours with the same, and what has to be equal."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_fuzz import filled, save
from config_values import V

from lmjax import huggingface
from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.stored import rows_for
from lmjax.huggingface.weights import tensor_getter, tensor_shapes
from lmjax.models.model import build_model

T, LENGTHS = 14, (8, 6)  # of the documents, which are a padded row each, and one row together
# Parts of the names of keys' biases: these shift all scores of a query alike, so that their
# gradients are 0 but for rounding.
OF_KEYS = ("k_proj", "k_lin", ".key.", "query_key_value")


def documents(seed, pad=0):
    """Two documents as padded rows, and both in one row: tokens, segment_ids and positions."""
    tokens = np.random.default_rng(seed).integers(5, V, (2, T), dtype=np.int32)
    at = np.arange(T, dtype=np.int32)
    real = (at < np.array(LENGTHS)[:, None]).astype(np.int32)
    first, second = (tokens[i, :n] for i, n in enumerate(LENGTHS))
    return {
        "tokens": np.stack([*np.where(real, tokens, np.int32(pad)),
                            np.concatenate([first, second])]),
        "segment_ids": np.stack([*real, 1 + (at >= LENGTHS[0])]).astype(np.int32),
        "positions": np.stack([at, at, np.concatenate([np.arange(n) for n in LENGTHS])]).astype(
            np.int32)}


def random_model(settings):
    """(a model of transformers with random weights, its tensors)."""
    import torch
    import transformers

    cls = getattr(transformers, MODEL_TYPES[settings["model_type"]].architecture)
    config = cls.config_class.from_dict(json.loads(json.dumps(settings)))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).float().eval()
    return model, filled(model)


def as_ours(settings, tensors):
    """(model, parameters, rows of the table) of these tensors; a router has no loss of its own."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), settings, tensors)
        found = huggingface.read_directory(Path(folder))
        config = dataclasses.replace(
            found.config, moe=dataclasses.replace(found.config.moe, balance_loss=0.0))
        model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = huggingface.read_params(found, model,
                                         jax.tree.map(lambda x: sharding, model.shapes))
    return model, params, rows_for(MODEL_TYPES[settings["model_type"]], model.config)


def assert_same_logits(ours, theirs):
    """Ours of the rows of `documents`, padded and packed, are theirs of the padded ones."""
    start = 0
    for i, n in enumerate(LENGTHS):
        for row in (ours[i, :n], ours[2, start:start + n]):
            np.testing.assert_allclose(row, theirs[i, :n], atol=2e-5 * np.abs(theirs).max(),
                                       rtol=0)
        start += n


def assert_same_gradients(grads, table, theirs):
    """Ours, written under their names, are theirs, a dict by name."""
    get = tensor_getter(grads, table)
    assert tensor_shapes(grads, table).keys() == theirs.keys()
    largest = max(np.abs(g).max() for g in theirs.values())
    for key, grad in theirs.items():
        is_zero = "bias" in key and any(part in key for part in OF_KEYS)
        size = largest if is_zero else np.abs(grad).max()
        np.testing.assert_allclose(get(key), grad, atol=1e-4 * size, rtol=0, err_msg=key)


def assert_as_on_one_device(found, alone):
    """(logits, loss, gradients) of a mesh are those of one device; the mesh may have more rows."""
    logits, loss, grads = alone
    np.testing.assert_allclose(found[0][:len(logits)], logits, rtol=0,
                               atol=2e-5 * np.abs(logits).max())
    assert float(found[1]) == pytest.approx(float(loss), rel=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
                 found[2], grads)
