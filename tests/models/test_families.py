"""Published models against transformers with the same random weights, and caches against rows.

Rows are padded and of different lengths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_models import COMMON, DECODERS, ENCDECS, ENCODERS, MODELS, V, tree_of

from lmjax.config import build
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout, use_layout
from lmjax.tasks.losses import next_token_loss
from lmjax.tree import named_leaves, num_elements

T, LENGTHS = 20, np.array([20, 13])
S, SOURCES = 14, np.array([9, 14])  # of the encoder's rows
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
CONFIGS = {**dict.fromkeys(DECODERS, DecoderConfig), **dict.fromkeys(ENCODERS, EncoderConfig),
           **dict.fromkeys(ENCDECS, EncDecConfig)}
# Models whose switches the others have, too, in another combination.
SIMILAR = {"gpt2-erf", "llama", "llama-tied", "qwen2", "qwen3", "mixtral", "gemma2", "roberta",
           "t5-v1.0"}


# Models whose caches are like those in test_decoder.py or like Gemma 3's.
SIMILAR_CACHES = SIMILAR | {"gpt2", "llama3", "mistral"}
EXPERTS = dict(experts=4, per_token=3, mlp_dim=24, shared_dim=40, shared_gate=True)


def cases(models, similar):
    return [pytest.param(name, marks=[pytest.mark.long] if name in similar else [])
            for name in models]


def model_of(name, dtype=jnp.float32, **keys):
    config = build(CONFIGS[name], COMMON | MODELS[name].ours | keys)
    return build_model(config, vocab_size=V, platform="cpu", dtype=dtype)


@functools.cache
def batch_of(seed=0):
    tokens = np.random.default_rng(seed).integers(3, V, (2, T + 1), dtype=np.int32)
    real = np.arange(T) < LENGTHS[:, None]
    source = np.random.default_rng(seed + 1).integers(3, V, (2, S), dtype=np.int32)
    there = np.arange(S) < SOURCES[:, None]
    encoder = {
        "encoder_tokens": np.where(there, source, 0),
        "encoder_segment_ids": there.astype(np.int32),
        "encoder_positions": np.broadcast_to(np.arange(S, dtype=np.int32), (2, S)),
        "token_types": (np.arange(T) > 6).astype(np.int32) * np.ones((2, 1), np.int32)}
    return encoder | {
        "tokens": np.where(real, tokens[:, :-1], 0), "targets": tokens[:, 1:],
        "segment_ids": real.astype(np.int32), "loss_mask": real.astype(np.float32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))}


@functools.cache
def oracle(name):
    """(their logits, loss, gradients, weights) on `batch_of()`, or a skip that says why."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    model = MODELS[name]
    torch.manual_seed(0)
    prefix = f"{model.their}Text" if model.their == "Gemma3" else model.their
    config = getattr(transformers, f"{prefix}Config")(**model.config, attn_implementation="eager",
                                                      use_cache=False)
    theirs = getattr(transformers, f"{model.their}{model.head}")(config).eval()
    # With noise no bias is 0, no norm is at its initial value, and scores tell keys apart. T5 does
    # not divide scores: less noise keeps its softmax off a single key, which magnifies rounding.
    noise = 0.1 if model.their == "T5" else 0.2
    for parameter in filter(lambda p: p.requires_grad, theirs.parameters()):
        parameter.data += (noise if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    if name == "t5-v1.1":  # the class may tie new weights, which the published model does not
        theirs.lm_head.weight = torch.nn.Parameter(
            0.5 * torch.randn_like(theirs.lm_head.weight))
    batch = {key: torch.tensor(np.array(value)) for key, value in batch_of().items()}
    inputs = dict(input_ids="tokens", attention_mask="segment_ids") | model.inputs
    logits = theirs(**{their: batch[our].long() for their, our in inputs.items()}).logits
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["targets"].long().flatten(), reduction="none")
    loss = (nats * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
    loss.backward()
    used = {key: p for key, p in theirs.named_parameters() if p.grad is not None}
    weights = {key: p.detach().numpy() for key, p in used.items()}
    grads = {key: p.grad.numpy() for key, p in used.items()}
    return logits.detach().numpy(), loss.item(), grads, weights


def with_their_weights(name, model):
    *_, weights = oracle(name)
    tree = tree_of(named_leaves(model.shapes), MODELS[name].names, weights)
    params = jax.tree.unflatten(jax.tree.structure(model.shapes),
                                list(map(jnp.asarray, tree.values())))
    assert num_elements(params) == sum(w.size for w in weights.values())
    return params


@functools.cache
def ours(name):
    """(model, parameters with their weights)."""
    model = model_of(name)
    return model, with_their_weights(name, model)


@functools.cache
def computed(name):
    """(logits, loss, gradients) of our model."""
    model, params = ours(name)
    loss_fn = next_token_loss(model)

    @jax.jit
    def run(params, batch):
        def mean(params):
            sums = loss_fn(params, batch, None)
            return sums.total / sums.weight

        return model.logits(params, batch), *jax.value_and_grad(mean)(params)

    return run(params, batch_of())


@pytest.mark.parametrize("name", cases(MODELS, SIMILAR))
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    their_logits, their_loss, their_grads, _ = oracle(name)
    logits, loss, grads = computed(name)
    real = batch_of()["segment_ids"] > 0
    scale = np.abs(their_logits[real]).max()
    assert scale > 1
    np.testing.assert_allclose(np.asarray(logits)[real], their_logits[real], atol=2e-5 * scale,
                               rtol=0)
    assert float(loss) == pytest.approx(their_loss, rel=1e-5)
    expected = tree_of(named_leaves(grads), MODELS[name].names, their_grads)
    largest = max(np.abs(g).max() for g in expected.values())
    for key, grad in named_leaves(grads):
        # A key's bias shifts all scores of a query alike: its gradient is 0 but for rounding.
        size = largest if key.endswith("key/bias") else np.abs(expected[key]).max()
        assert size > 1e-4
        np.testing.assert_allclose(grad, expected[key], atol=1e-4 * size, rtol=0, err_msg=key)


@pytest.mark.parametrize("name, wrong", [
    ("gpt2", dict(mlp="gelu")), ("llama3", dict(rope_theta=101.0)),
    ("mistral", dict(sliding_window=5)),
    pytest.param("gpt2-erf", dict(mlp="gelu_tanh"), marks=pytest.mark.long),
    pytest.param("llama", dict(norm_eps=1e-2), marks=pytest.mark.long),
    pytest.param("qwen3", dict(norm_eps=1e-3), marks=pytest.mark.long)])
def test_the_comparison_tells_near_misses_apart(name, wrong):
    """With one switch slightly off, the logits differ by a multiple of the bound above."""
    their_logits, *_ = oracle(name)
    model, real = model_of(name, **wrong), batch_of()["segment_ids"] > 0
    logits = jax.jit(model.logits)(with_their_weights(name, model), batch_of())
    difference = np.abs(np.asarray(logits)[real] - their_logits[real]).max()
    assert difference > 1e-4 * np.abs(their_logits[real]).max()


@pytest.mark.parametrize("name", cases(DECODERS | ENCDECS, SIMILAR_CACHES))
def test_ragged_prefill_then_decoding_equals_the_full_forward(name):
    """Prompts of 9 and 3 tokens, padded with other tokens, are fed and continued together."""
    model, params = ours(name)
    full, tokens = np.asarray(computed(name)[0]), batch_of()["tokens"]
    lengths, more = np.array([9, 3]), 10
    prompt = np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 13).astype(np.int32)
    fed = np.stack([tokens[[0, 1], lengths + i] for i in range(more)])

    @jax.jit
    def run(params, prompt, fed):
        start = dict(params=params, batch=batch_of()) if name in ENCDECS else {}
        cache = model.init_cache(2, 24, **start)
        first, cache = model.step(params, prompt, cache, jnp.asarray(lengths - 1, jnp.int32))

        def one(cache, last_B):
            logits, cache = model.step(params, last_B[:, None], cache)
            return cache, logits

        _, rest = jax.lax.scan(one, cache, fed)
        return jnp.concatenate([first[None], rest])

    logits = run(params, prompt, fed)
    for i in range(more + 1):
        np.testing.assert_allclose(logits[i], full[[0, 1], lengths - 1 + i], rtol=0,
                                   atol=2e-5 * np.abs(full).max(), err_msg=f"{i} tokens later")


@pytest.mark.parametrize("name, keys", [
    pytest.param("gemma2", dict(moe=EXPERTS), marks=pytest.mark.long),
    pytest.param("t5-v1.1", {}, marks=pytest.mark.long),
    pytest.param("gemma2", {}, marks=pytest.mark.slow),
    pytest.param("qwen2-moe", {}, marks=pytest.mark.slow)])
def test_decoding_on_a_mesh_equals_the_full_forward(name, keys):
    """Weights and caches of local and global layers, experts and encoders, split on three axes."""
    model = model_of(name, num_layers=2, init_std=0.3, **keys)
    params, batch = jax.jit(model.init)(jax.random.key(0)), batch_of()
    lengths, more = np.array([9, 3]), 4
    expected, tokens = np.asarray(jax.jit(model.logits)(params, batch)), batch["tokens"]
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2, rules={"batch": ("data",)}))
    placed = jax.device_put(params, layout.tree(model.axes, model.shapes))

    @jax.jit
    def run(params, prompt, fed):
        with use_layout(layout):
            start = dict(params=params, batch=batch) if name in ENCDECS else {}
            cache = model.init_cache(2, 24, **start)
            first, cache = model.step(params, prompt, cache, jnp.asarray(lengths - 1, jnp.int32))

            def one(cache, last_B):
                logits, cache = model.step(params, last_B[:, None], cache)
                return cache, logits

            cache, rest = jax.lax.scan(one, cache, fed)
            return jnp.concatenate([first[None], rest]), cache.layers

    fed = np.stack([tokens[[0, 1], lengths + i] for i in range(more)])
    logits, caches = run(placed, tokens[:, :9], fed)
    for i in range(more + 1):
        np.testing.assert_allclose(logits[i], expected[[0, 1], lengths - 1 + i], rtol=0,
                                   atol=2e-5 * np.abs(expected).max(),
                                   err_msg=f"{i} tokens later")
    assert all(not cache.is_fully_replicated for cache in jax.tree.leaves(caches))


def test_local_layers_keep_no_more_than_their_window():
    model = model_of("gemma3", jnp.bfloat16)
    layers = jax.eval_shape(lambda: model.init_cache(2, 24)).layers
    assert [layer.key.shape for layer in layers] == [(2, 2, 2, 5, 16), (1, 2, 2, 24, 16)]


def test_a_prefix_is_seen_by_all_of_its_document():
    """One row holds two documents whose first 4 tokens are a prefix.

    Changing one token at a time shows which hidden states depend on which tokens.
    """
    model = build_model(build(DecoderConfig, COMMON | dict(num_kv_heads=4)), vocab_size=V,
                        platform="cpu", dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0))
    n, at = T // 2, np.arange(T, dtype=np.int32)
    batch = {"tokens": batch_of()["tokens"][:1], "positions": at[None] % n,
             "segment_ids": np.repeat(np.int32([[1, 2]]), n, axis=1),
             "bidirectional": (at[None] % n < 4).astype(np.int32)}
    tokens = np.concatenate([batch["tokens"]] * (T + 1))
    tokens[at, at] = (tokens[at, at] + 1) % V
    many = {name: np.repeat(x, T + 1, axis=0) for name, x in batch.items()} | {"tokens": tokens}
    hidden = np.asarray(jax.jit(model.hidden)(params, many).x_BTD)
    depends = np.abs(hidden[:T] - hidden[T]).max(-1).T > 1e-6  # [state, token]
    state, token = np.mgrid[:T, :T]
    expected = (state // n == token // n) & ((token <= state) | (token % n < 4))
    np.testing.assert_array_equal(depends, expected)


def test_an_encoder_has_no_cache_and_an_encoder_decoder_needs_its_source():
    refusal = "model.family: expected a decoder or encdec .*, got an encoder"
    with pytest.raises(ValueError, match=refusal):
        model_of("bert").init_cache(1, 8)
    with pytest.raises(ValueError, match="init_cache: expected params and a batch"):
        model_of("t5-v1.1").init_cache(1, 8)
