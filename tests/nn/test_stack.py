"""A stack computes the same however it is laid out and whatever it recomputes; packing changes nothing."""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn.stack import REMAT
from lmjax.training.step import next_token_loss

# What is compared to the last bits is compiled by the emitters that users' programs are; conftest.py takes others.
AS_USERS_DO = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
LENGTHS = (5, 3, 4)  # of the documents in a row of 14: two tokens are padding
ROW = 14
STYLES = {
    "modern": dict(num_kv_heads=1, qk_norm=True),
    "gpt2": dict(positions="learned", norm="layernorm", use_bias=True, mlp="gelu_tanh", tie_embeddings=True,
                 max_positions=ROW),
    "window": dict(sliding_window=3, attention_softcap=5.0, logit_softcap=8.0),
}


def model_of(**keys):
    config = dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=32, init_std=0.2)
    return build_model(DecoderConfig(**(config | keys)), vocab_size=32, platform="cpu", dtype=jnp.float32)


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 32, n + 1, dtype=np.int32) for n in LENGTHS]


def rows(parts, length=ROW):
    """The row dict of `parts`, each a list of documents that share a row."""
    names = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "positions": np.int32,
             "loss_mask": np.float32}
    out = {name: np.zeros((len(parts), length), dtype) for name, dtype in names.items()}
    for row, docs in enumerate(parts):
        at = 0
        for number, doc in enumerate(docs, 1):
            n = len(doc) - 1
            for name, value in zip(names, (doc[:-1], doc[1:], number, np.arange(n), 1.0), strict=True):
                out[name][row, at : at + n] = value
            at += n
    return out


def initial(config):
    """The parameters, which do not depend on how the layers are laid out."""
    return _initial(dataclasses.replace(config, scan_layers=True, remat="none"))


@functools.cache
def _initial(config):
    model = build_model(config, vocab_size=32, platform="cpu", dtype=jnp.float32)
    return jax.jit(model.init)(jax.random.key(0))


def run(model, batch):
    """Logits, and the loss's sum and gradients, in one compiled program."""
    loss_fn = next_token_loss(model, z_loss=1e-2)

    @functools.partial(jax.jit, compiler_options=AS_USERS_DO)
    def both(params):
        value, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, None).total)(params)
        return model.logits(params, batch), value, grads

    return both(initial(model.config))


def assert_close(a, b, tolerance=2e-5):
    """Relative to the largest element of each leaf; a key's bias has a gradient of 0, up to rounding."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(float(np.abs(x).max()), 1e-2)
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


LAYOUTS = {
    "modern": list(itertools.product((True, False), REMAT)),
    "gpt2": [(True, "full"), (False, "none")],
    "window": [(True, "dots"), (False, "full")],
}


@pytest.mark.parametrize("style", STYLES)
def test_scan_equals_unrolled_and_remat_changes_nothing(style):
    """Each layout and policy, against scanned layers that keep everything."""
    batch = rows([documents(0), documents(1)])
    reference = run(model_of(**STYLES[style]), batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(reference))
    for scan, remat in LAYOUTS[style]:
        assert_close(reference, run(model_of(**STYLES[style], scan_layers=scan, remat=remat), batch))


@pytest.mark.parametrize("remat", REMAT)
def test_dropout_is_the_same_when_recomputed(remat):
    """A backward pass that drew new masks would give other gradients than one that kept them."""
    batch = rows([documents(0)])

    def gradients(**keys):
        model = model_of(dropout=0.4, **keys)
        loss_fn = next_token_loss(model)
        params = initial(model.config)
        return jax.jit(jax.grad(lambda p: loss_fn(p, batch, jax.random.key(5)).total))(params)

    assert_close(gradients(), gradients(scan_layers=False, remat=remat))


def test_remat_saves_less():
    """What the policies are for: residuals between the passes get fewer from none to dots to full."""
    batch = rows([documents(0)] * 4)
    saved = {}
    for remat in (*REMAT, "query+key"):
        model = model_of(remat=remat, num_layers=6)
        params = initial(model.config)
        _, pull = jax.vjp(lambda p, m=model: next_token_loss(m)(p, batch, None).total, params)
        saved[remat] = sum(x.size for x in jax.tree.leaves(pull))
    assert saved["full"] < saved["attention"] < saved["dots"] < saved["none"], saved
    assert saved["full"] < saved["query+key"] < saved["attention"], saved


@pytest.mark.parametrize("name, keys, width", [
    ("kernel", dict(attention="chunked"), 16 + 4), ("kernel", dict(attention="ring"), 16 + 4),
    ("gate+up", dict(moe=dict(experts=4, per_token=2)), 2 * 2 * 24),
    ("gate+up", dict(moe=dict(experts=4, per_token=2, capacity=2.0)), 2 * 4 * 24)])
def test_a_name_keeps_what_it_says(name, keys, width):
    """Of each token and layer: a kernel's output and a log-sum a head; and for each expert of a token, or slot, gate
    and up."""
    batch, saved = rows([documents(0)] * 4), {}
    for remat in ("full", name):
        model = build_model(build(DecoderConfig, dict(
            num_layers=3, embed_dim=16, num_heads=4, mlp_dim=24, vocab_size=32, mlp="swiglu", remat=remat, **keys)),
            vocab_size=32, platform="cpu", dtype=jnp.float32)
        params = jax.jit(model.init)(jax.random.key(0))
        _, pull = jax.vjp(lambda p, m=model: next_token_loss(m)(p, batch, None).total, params)
        saved[remat] = sum(x.size for x in jax.tree.leaves(pull))
    assert saved[name] - saved["full"] == 3 * 4 * ROW * width


def test_every_layer_has_weights_of_its_own():
    params = initial(model_of().config)["layers"]
    other = jax.jit(model_of(scan_layers=False).init)(jax.random.key(0))["layers"]
    assert_close(params, other, 1e-7)  # and they are the same however the layers are laid out
    for leaf in jax.tree.leaves(params):
        assert leaf.shape[0] == 2
        if np.ptp(leaf) > 0:  # not a norm's scale
            assert not np.allclose(leaf[0], leaf[1])


@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_equal_the_same_documents_alone(style):
    model, docs = model_of(**STYLES[style]), documents()
    packed_logits, packed_loss, packed_grads = run(model, rows([docs]))
    alone_logits, alone_loss, alone_grads = run(model, rows([[doc] for doc in docs]))
    starts = np.cumsum([0, *LENGTHS])
    for i, n in enumerate(LENGTHS):
        assert_close(packed_logits[0, starts[i] : starts[i] + n], alone_logits[i, :n])
    assert_close((packed_loss, packed_grads), (alone_loss, alone_grads))


def test_the_order_of_documents_and_the_padding_do_not_matter():
    model, docs = model_of(), documents()
    _, loss, grads = run(model, rows([docs]))
    _, turned_loss, turned_grads = run(model, rows([docs[::-1]]))
    assert_close((loss, grads), (turned_loss, turned_grads))
    _, longer_loss, longer_grads = run(model, rows([docs], length=2 * ROW))
    assert_close((loss, grads), (longer_loss, longer_grads))
    dirty = rows([docs])
    for name in ("tokens", "targets"):  # what stands in the padding reaches nothing
        dirty[name][0, sum(LENGTHS):] = 7
    _, dirty_loss, dirty_grads = run(model, dirty)
    assert_close((loss, grads), (dirty_loss, dirty_grads), 1e-6)
