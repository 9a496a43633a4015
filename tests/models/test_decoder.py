"""The decoder against transformers with the same weights, its counts against formulas, its cache against itself."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.decoder import DecoderConfig
from lmjax.models.flops import embedding_parameters, flops_per_token
from lmjax.models.model import build_model
from lmjax.training.step import next_token_loss
from lmjax.tree import named_leaves, num_elements

V, D, H, F, LAYERS, T = 48, 32, 4, 56, 2, 10
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"


def model_of(dtype=jnp.float32, **keys):
    config = dict(num_layers=LAYERS, embed_dim=D, num_heads=H, mlp_dim=F, vocab_size=V, max_positions=32, init_std=0.2)
    return build_model(DecoderConfig(**(config | keys)), vocab_size=V, platform="cpu", dtype=dtype)


def batch_of(rows=2, length=T, seed=0):
    tokens = np.random.default_rng(seed).integers(0, V, (rows, length + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((rows, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "loss_mask": np.ones((rows, length), np.float32)}


@functools.cache
def initial(model):
    return jax.jit(model.init)(jax.random.key(0))


# --- transformers
# Ours -> (theirs, how). "layers/" in ours stands for every layer, {} in theirs for its number.
# how: T transposes an (out, in) matrix; 0, 1, 2 take that third of GPT-2's fused (in, 3 * out) matrix.

LLAMA = {
    "embedding/table": ("model.embed_tokens.weight", ""),
    "layers/block/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", ""),
    "layers/block/attention/query/kernel": ("model.layers.{}.self_attn.q_proj.weight", "T"),
    "layers/block/attention/key/kernel": ("model.layers.{}.self_attn.k_proj.weight", "T"),
    "layers/block/attention/value/kernel": ("model.layers.{}.self_attn.v_proj.weight", "T"),
    "layers/block/attention/out/kernel": ("model.layers.{}.self_attn.o_proj.weight", "T"),
    "layers/block/attention/query_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", ""),
    "layers/block/attention/key_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", ""),
    "layers/block/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", ""),
    "layers/block/mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", "T"),
    "layers/block/mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", "T"),
    "layers/block/mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight", "T"),
    "norm/scale": ("model.norm.weight", ""),
    "head/table": ("lm_head.weight", ""),
}
GPT2 = {
    "embedding/table": ("transformer.wte.weight", ""),
    "positions/table": ("transformer.wpe.weight", ""),
    "norm/scale": ("transformer.ln_f.weight", ""),
    "norm/bias": ("transformer.ln_f.bias", ""),
}
for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
    GPT2[f"layers/block/{ours}/scale"] = (f"transformer.h.{{}}.{theirs}.weight", "")
    GPT2[f"layers/block/{ours}/bias"] = (f"transformer.h.{{}}.{theirs}.bias", "")
for ours, theirs, how in (("attention/query", "attn.c_attn", "0"), ("attention/key", "attn.c_attn", "1"),
                          ("attention/value", "attn.c_attn", "2"), ("attention/out", "attn.c_proj", ""),
                          ("mlp/up", "mlp.c_fc", ""), ("mlp/down", "mlp.c_proj", "")):
    GPT2[f"layers/block/{ours}/kernel"] = (f"transformer.h.{{}}.{theirs}.weight", how)
    GPT2[f"layers/block/{ours}/bias"] = (f"transformer.h.{{}}.{theirs}.bias", how)


def mapped(model, table, tensors):
    """Their tensors (weights or gradients, by name) as a tree like our parameters."""

    def one(name, how, shape):
        x = tensors[name]
        x = x.T if how == "T" else np.split(x, 3, axis=-1)[int(how)] if how else x
        return x.reshape(shape)

    leaves = []
    for name, leaf in named_leaves(model.shapes):
        theirs, how = table[name]
        leaves.append(np.stack([one(theirs.format(i), how, leaf.shape[1:]) for i in range(LAYERS)])
                      if name.startswith("layers/") else one(theirs, how, leaf.shape))
    return jax.tree.unflatten(jax.tree.structure(model.shapes), leaves)


def llama(transformers, **keys):
    return dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=H,
                num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 100.0}, initializer_range=0.2,
                attn_implementation="eager", use_cache=False) | keys


def gpt2(transformers, **keys):
    return dict(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=H, n_inner=F, n_positions=32, initializer_range=0.2,
                activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                attn_implementation="eager", use_cache=False, bos_token_id=1, eos_token_id=2) | keys


MODERN = dict(num_kv_heads=2, rope_theta=100.0)
CLASSIC = dict(positions="learned", norm="layernorm", use_bias=True, tie_embeddings=True)
# name -> (their class, their config, our config, the table)
ORACLES = {
    "gpt2": ("GPT2", gpt2, {}, CLASSIC | dict(mlp="gelu_tanh"), GPT2),
    "gpt2-erf": ("GPT2", gpt2, dict(activation_function="gelu"), CLASSIC | dict(mlp="gelu"), GPT2),
    "llama": ("Llama", llama, {}, MODERN, LLAMA),
    "llama-tied": ("Llama", llama, dict(tie_word_embeddings=True), MODERN | dict(tie_embeddings=True), LLAMA),
    "qwen3": ("Qwen3", llama, dict(head_dim=16), MODERN | dict(head_dim=16, qk_norm=True), LLAMA),
    "mistral": ("Mistral", llama, dict(sliding_window=4), MODERN | dict(sliding_window=4), LLAMA),
}


@functools.cache
def oracle(name):
    """(their logits, loss, gradients, weights) on `batch_of()`, or a loud skip."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    family, make, keys, _, _ = ORACLES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**make(transformers, **keys))
    theirs = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config).eval()
    for parameter in theirs.parameters():  # no bias at 0, no scale at 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = {key: torch.tensor(np.array(value)).long() for key, value in batch_of().items()}
    logits = theirs(input_ids=batch["tokens"], position_ids=batch["positions"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    weights = {key: p.detach().numpy() for key, p in theirs.named_parameters()}
    grads = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    return logits.detach().numpy(), loss.item(), grads, weights


def loss_and_gradients(model, params, batch):
    loss_fn = next_token_loss(model)

    def mean(params):
        sums = loss_fn(params, batch, None)
        return sums.total / sums.weight

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.parametrize("name", ORACLES)
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    their_logits, their_loss, their_grads, weights = oracle(name)
    *_, keys, table = ORACLES[name]
    model = model_of(**keys)
    params = jax.tree.map(jnp.asarray, mapped(model, table, weights))
    assert num_elements(params) == sum(w.size for w in weights.values())
    logits = jax.jit(model.logits)(params, batch_of())
    scale = np.abs(their_logits).max()
    assert scale > 1
    np.testing.assert_allclose(logits, their_logits, atol=2e-5 * scale, rtol=0)
    loss, grads = loss_and_gradients(model, params, batch_of())
    assert float(loss) == pytest.approx(their_loss, rel=1e-5)
    expected = mapped(model, table, their_grads)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    for (key, ours), theirs in zip(named_leaves(grads), jax.tree.leaves(expected), strict=True):
        # A key's bias shifts all scores of a query alike: its gradient is 0, and only rounding is left.
        size = largest if key.endswith("key/bias") else np.abs(theirs).max()
        assert size > 1e-4
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * size, rtol=0, err_msg=key)


@pytest.mark.parametrize("name, wrong", [
    ("gpt2", dict(mlp="gelu")), ("gpt2-erf", dict(mlp="gelu_tanh")), ("llama", dict(rope_theta=101.0)),
    ("llama", dict(norm_eps=1e-2)), ("mistral", dict(sliding_window=5)), ("qwen3", dict(norm_eps=1e-3))])
def test_the_oracle_tells_near_misses_apart(name, wrong):
    """A switch that is slightly off fails the comparison above by a factor."""
    their_logits, _, _, weights = oracle(name)
    *_, keys, table = ORACLES[name]
    model = model_of(**(keys | wrong))
    logits = jax.jit(model.logits)(jax.tree.map(jnp.asarray, mapped(model, table, weights)), batch_of())
    assert np.abs(np.asarray(logits) - their_logits).max() > 1e-4 * np.abs(their_logits).max()


# --- counts


@pytest.mark.parametrize("keys, layer, outside", [
    # query and out, key and value, gate, up and down, two norms; two tables and the last norm
    (dict(num_kv_heads=2), 2 * D * D + 2 * D * D // 2 + 3 * D * F + 2 * D, 2 * V * D + D),
    (dict(qk_norm=True, head_dim=6), 4 * D * H * 6 + 3 * D * F + 2 * D + 2 * 6, 2 * V * D + D),
    (CLASSIC | dict(mlp="gelu"), 4 * (D * D + D) + 2 * D * F + F + D + 4 * D, V * D + 32 * D + 2 * D),
    (dict(mlp="relu", positions="none", tie_embeddings=True), 4 * D * D + 2 * D * F + 2 * D, V * D + D)])
def test_parameter_counts(keys, layer, outside):
    model = model_of(**keys)
    assert num_elements(model.shapes) == LAYERS * layer + outside == num_elements(initial(model))
    tables = V * D * (1 if keys.get("tie_embeddings") else 2) + (32 * D if keys.get("positions") == "learned" else 0)
    assert embedding_parameters(model) == tables


@pytest.mark.parametrize("keys, matrices", [
    (dict(num_kv_heads=2), 3 * D * D + 3 * D * F),
    (CLASSIC | dict(mlp="gelu"), 4 * D * D + 2 * D * F),  # the tied table is multiplied with once
    (dict(head_dim=16), 8 * D * D + 3 * D * F),
    (dict(sliding_window=8), 4 * D * D + 3 * D * F)])
def test_flops_per_token(keys, matrices):
    """Three passes of two FLOPs a weight, and of four FLOPs times heads * head_dim a query and visible key."""
    length, model = 256, model_of(**keys)
    window = keys.get("sliding_window", length)
    visible = np.mean([min(t + 1, window) for t in range(length)])
    expected = 6 * (LAYERS * matrices + V * D) + 12 * LAYERS * H * keys.get("head_dim", D // H) * visible
    assert flops_per_token(model, length) == pytest.approx(expected, rel=0.01)


def test_axes_name_every_dimension():
    for keys in (dict(num_kv_heads=2, qk_norm=True), CLASSIC):
        model = model_of(**keys)
        axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
        for (name, leaf), names in zip(named_leaves(model.shapes), axes, strict=True):
            assert len(leaf.shape) == len(names), name
            assert ("layers" in names) == name.startswith("layers/")


def test_a_vocabulary_too_small_for_the_data_is_refused():
    with pytest.raises(ValueError, match=r"config\.model\.vocab_size: expected at least .* 49, got 48; "):
        build_model(DecoderConfig(vocab_size=48), vocab_size=49, platform="cpu", dtype=jnp.float32)
    taken = build_model(DecoderConfig(), vocab_size=49, platform="cpu", dtype=jnp.float32)
    assert taken.config.vocab_size == 49
    with pytest.raises(ValueError, match="attention: .*got 'nope'"):
        build_model(DecoderConfig(attention="nope"), vocab_size=49, platform="cpu", dtype=jnp.float32)


# --- compute dtype


@pytest.mark.parametrize("keys", [dict(num_kv_heads=2, qk_norm=True), CLASSIC | dict(mlp="gelu_tanh")])
def test_bfloat16_compute_keeps_float32_parameters(keys):
    exact, model = model_of(**keys), model_of(jnp.bfloat16, **keys)
    params, batch = initial(exact), batch_of(rows=4)
    assert {p.dtype for p in jax.tree.leaves(initial(model))} == {jnp.dtype("float32")}
    hidden, table, *_ = jax.jit(model.hidden)(params, batch)
    logits = jax.jit(model.logits)(params, batch)
    assert (hidden.dtype, table.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.asarray(jax.jit(exact.logits)(params, batch))
    error = np.sqrt(np.mean((np.asarray(logits) - expected) ** 2)) / expected.std()
    assert 1e-4 < error < 0.03  # not float32 after all, and no worse than 8 bits a few layers deep
    loss, grads = loss_and_gradients(model, params, batch)
    exact_loss, exact_grads = loss_and_gradients(exact, params, batch)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.02)
    for (name, a), b in zip(named_leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        if not name.endswith("key/bias"):  # 0 but for rounding
            assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b), name


# --- cached decoding

CACHED = {
    "rope": dict(num_kv_heads=2),
    "learned": CLASSIC,
    "window": dict(sliding_window=3, num_kv_heads=1),
    "softcap": dict(attention_softcap=3.0, logit_softcap=5.0, qk_norm=True),
    "none": dict(positions="none"),
    "unrolled": dict(scan_layers=False),
}


@pytest.mark.parametrize("name", CACHED)
def test_one_token_at_a_time_equals_the_full_forward(name):
    model, batch = model_of(**CACHED[name]), batch_of()
    params = initial(model)
    full = np.asarray(jax.jit(model.logits)(params, batch))
    step, cache = jax.jit(model.step), model.init_cache(2, 16)
    for t in range(T):
        logits, cache = step(params, batch["tokens"][:, t : t + 1], cache)
        np.testing.assert_allclose(logits, full[:, t], atol=2e-5 * np.abs(full).max(), err_msg=f"token {t}")


@pytest.mark.parametrize("name", CACHED)
def test_ragged_prefill_then_decoding_equals_the_full_forward(name):
    """Prompts of 6 and 2 tokens are fed together, padded with junk on the right, then continued together."""
    model, batch = model_of(**CACHED[name]), batch_of()
    params, tokens = initial(model), batch["tokens"]
    full = np.asarray(jax.jit(model.logits)(params, batch))
    tolerance = 2e-5 * np.abs(full).max()
    lengths = np.array([6, 2])
    prompt = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], 13).astype(np.int32)
    step = jax.jit(model.step)
    logits, cache = step(params, prompt, model.init_cache(2, 16), jnp.asarray(lengths - 1, jnp.int32))
    np.testing.assert_array_equal(cache.slot, lengths)
    for more in range(4):
        at = lengths + more
        np.testing.assert_allclose(logits, full[[0, 1], at - 1], atol=tolerance, err_msg=f"{more} tokens later")
        logits, cache = step(params, tokens[[0, 1], at][:, None], cache)


def test_softcap_bounds_the_logits():
    model = model_of(logit_softcap=0.5)
    logits = jax.jit(model.logits)(initial(model), batch_of())
    assert 0.3 < np.abs(logits).max() < 0.5
    plain = jax.jit(model_of().logits)(initial(model), batch_of())
    np.testing.assert_allclose(logits, 0.5 * np.tanh(np.asarray(plain, np.float64) / 0.5), atol=1e-6)


def test_initial_loss_is_that_of_a_uniform_guess():
    model = model_of(init_std=0.02)
    loss, _ = loss_and_gradients(model, initial(model), batch_of(rows=8))
    assert float(loss) == pytest.approx(math.log(V), rel=0.02)
