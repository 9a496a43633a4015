"""A stack computes the same with any layout and remat policy, and packing changes nothing."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import build
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn.stack import REMAT
from lmjax.tasks.losses import next_token_loss

# Results that are compared to the last bits are compiled as users' programs are, with the newer
# emitters where conftest.py chooses the older ones.
AS_USERS_DO = ({"xla_cpu_use_fusion_emitters": True}
               if "fusion_emitters" in os.environ["XLA_FLAGS"] else {})
LENGTHS = (5, 3, 4)  # of the documents; together in a row of 14 they leave two tokens of padding
ROW = 14
STYLES = {
    "modern": dict(num_kv_heads=1, qk_norm=True),
    "gpt2": dict(positions="learned", norm="layernorm", use_bias=True, mlp="gelu_tanh",
                 tie_embeddings=True, max_positions=ROW),
    "window": dict(sliding_window=3, attention_softcap=5.0, logit_softcap=8.0),
}


def model_of(**keys):
    config = dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=32, init_std=0.2)
    config = build(DecoderConfig, config | keys)
    return build_model(config, vocab_size=32, platform="cpu", dtype=jnp.float32)


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 32, n + 1, dtype=np.int32) for n in LENGTHS]


def rows_of(parts, length=ROW):
    """A batch of three rows. `parts` lists the documents of each row; missing rows are padding."""
    names = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32,
             "positions": np.int32, "loss_mask": np.float32}
    batch = {name: np.zeros((3, length), dtype) for name, dtype in names.items()}
    for row, docs in enumerate(parts):
        start = 0
        for number, doc in enumerate(docs, 1):
            n = len(doc) - 1
            values = (doc[:-1], doc[1:], number, np.arange(n), 1.0)
            for name, value in zip(names, values, strict=True):
                batch[name][row, start : start + n] = value
            start += n
    return batch


def initial(config):
    """The parameters, which do not depend on the layout of the layers."""
    return _initial(dataclasses.replace(config, scan_layers=True, remat="none"))


@functools.cache
def _initial(config):
    model = build_model(config, vocab_size=32, platform="cpu", dtype=jnp.float32)
    return jax.jit(model.init)(jax.random.key(0))


@functools.cache
def program_of(config):
    """(params, batch) -> logits, and the loss's sum and gradients, compiled once per shape."""
    model = build_model(config, vocab_size=32, platform="cpu", dtype=jnp.float32)
    loss_fn = next_token_loss(model, z_loss=1e-2)

    @functools.partial(jax.jit, compiler_options=AS_USERS_DO)
    def both(params, batch):
        value, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, None).total)(params)
        return model.logits(params, batch), value, grads

    return both


def run(model, batch):
    return program_of(model.config)(initial(model.config), batch)


def residuals(model, batch):
    """The number of values that the forward pass of the loss saves for the backward pass."""
    loss_fn = next_token_loss(model)
    pull = jax.eval_shape(
        lambda params: jax.vjp(lambda p: loss_fn(p, batch, None).total, params)[1], model.shapes)
    return sum(x.size for x in jax.tree.leaves(pull))


def assert_close(a, b, tolerance=2e-5):
    """Relative to the largest element of each leaf.

    The gradient of a key's bias is 0 up to rounding, so the largest element counts as at least
    0.01.
    """
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b),
                            strict=True):
        scale = max(float(np.abs(x).max()), 1e-2)
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0,
                                   err_msg=jax.tree_util.keystr(path))


QUICK = [("modern", False, "none"), ("modern", True, "attention"), ("window", False, "dots")]
LONG = [("modern", False, "none"), ("modern", True, "full"), ("gpt2", True, "full"),
        ("window", True, "dots")]
LAYOUTS = [*(("modern", scan, remat) for scan in (True, False) for remat in REMAT),
           ("gpt2", True, "full"), ("gpt2", False, "none"),
           ("window", True, "dots"), ("window", False, "dots"), ("window", False, "full")]


@pytest.mark.parametrize("style, scan, remat", [
    case if case in QUICK else
    pytest.param(*case, marks=pytest.mark.long if case in LONG else pytest.mark.slow)
    for case in LAYOUTS if case != ("modern", True, "none")])
def test_scan_equals_unrolled_and_remat_changes_nothing(style, scan, remat):
    """Each layout and policy, against scanned layers that save everything."""
    batch = rows_of([documents()])
    reference = run(model_of(**STYLES[style]), batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(reference))
    assert_close(reference, run(model_of(**STYLES[style], scan_layers=scan, remat=remat), batch))


@functools.cache
def gradients_with_dropout(scan, remat):
    model = model_of(dropout=0.4, scan_layers=scan, remat=remat)
    loss_fn, batch = next_token_loss(model), rows_of([documents()])
    params = initial(model.config)
    return jax.jit(jax.grad(lambda p: loss_fn(p, batch, jax.random.key(5)).total))(params)


@pytest.mark.long
@pytest.mark.parametrize("remat", REMAT)
def test_dropout_is_the_same_when_recomputed(remat):
    """A backward pass that drew new masks would give other gradients than one that kept them."""
    assert_close(gradients_with_dropout(True, "none"), gradients_with_dropout(False, remat))


@pytest.mark.long
def test_remat_saves_less():
    """Fewer values are saved from policy to policy: none, dots, attention, full."""
    batch = rows_of([documents()] * 3)
    saved = {remat: residuals(model_of(remat=remat, num_layers=6), batch)
             for remat in (*REMAT, "query+key")}
    assert saved["full"] < saved["attention"] < saved["dots"] < saved["none"], saved
    assert saved["full"] < saved["query+key"] < saved["attention"], saved


@pytest.mark.long
@pytest.mark.parametrize("name, keys, width", [
    ("kernel", dict(attention="chunked"), 16 + 4), ("kernel", dict(attention="ring"), 16 + 4),
    ("gate+up", dict(moe=dict(experts=4, per_token=2)), 2 * 2 * 24),
    ("gate+up", dict(moe=dict(experts=4, per_token=2, capacity=2.0)), 2 * 4 * 24)])
def test_a_name_saves_its_arrays_and_no_others(name, keys, width):
    """Saved values per token and layer beyond those of "full".

    A kernel saves its output and one log-sum per head. An expert saves gate and up per choice, or
    per slot.
    """
    batch = rows_of([documents()] * 3)
    full, named = (residuals(model_of(num_layers=3, num_heads=4, remat=remat, **keys), batch)
                   for remat in ("full", name))
    assert named - full == 3 * 3 * ROW * width


def test_every_layer_has_weights_of_its_own():
    params = initial(model_of().config)["layers"]
    other = jax.jit(model_of(scan_layers=False).init)(jax.random.key(0))["layers"]
    assert_close(params, other, 1e-7)  # the layout of the layers makes no difference
    for leaf in jax.tree.leaves(params):
        assert leaf.shape[0] == 2
        if np.ptp(leaf) > 0:  # the scales of norms are all equal
            assert not np.allclose(leaf[0], leaf[1])


@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_equal_the_same_documents_alone(style):
    model, docs = model_of(**STYLES[style]), documents()
    packed_logits, packed_loss, packed_grads = run(model, rows_of([docs]))
    alone_logits, alone_loss, alone_grads = run(model, rows_of([[doc] for doc in docs]))
    starts = np.cumsum([0, *LENGTHS])
    for i, n in enumerate(LENGTHS):
        assert_close(packed_logits[0, starts[i] : starts[i] + n], alone_logits[i, :n])
    assert_close((packed_loss, packed_grads), (alone_loss, alone_grads))


def test_the_order_of_documents_and_what_the_padding_holds_do_not_matter():
    model, docs = model_of(**STYLES["modern"]), documents()
    _, loss, grads = run(model, rows_of([docs]))
    _, turned_loss, turned_grads = run(model, rows_of([docs[::-1]]))
    assert_close((loss, grads), (turned_loss, turned_grads))
    dirty = rows_of([docs])
    for name in ("tokens", "targets"):
        dirty[name][0, sum(LENGTHS):] = 7
    _, dirty_loss, dirty_grads = run(model, dirty)
    assert_close((loss, grads), (dirty_loss, dirty_grads), 1e-6)


@pytest.mark.long
def test_the_length_of_the_padding_does_not_matter():
    model, docs = model_of(**STYLES["modern"]), documents()
    assert_close(run(model, rows_of([docs]))[1:], run(model, rows_of([docs], length=2 * ROW))[1:])
