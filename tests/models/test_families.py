"""Every family against transformers with the same random weights, padded and ragged, and its caches against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import COMMON, DECODERS, ENCDECS, ENCODERS, V, tree_of

from lmjax.config import build
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout, use_layout
from lmjax.training.step import next_token_loss
from lmjax.tree import named_leaves, num_elements

T, LENGTHS = 20, np.array([20, 13])
MISSING = "is not installed, so nothing is compared with it: pip install lmjax[oracle]"
FAMILIES = DECODERS | ENCODERS | ENCDECS
CONFIGS = {**dict.fromkeys(DECODERS, DecoderConfig), **dict.fromkeys(ENCODERS, EncoderConfig),
           **dict.fromkeys(ENCDECS, EncDecConfig)}
S, SOURCES = 14, np.array([9, 14])  # of the encoder


def batch_of(seed=0):
    tokens = np.random.default_rng(seed).integers(3, V, (2, T + 1), dtype=np.int32)
    real = np.arange(T) < LENGTHS[:, None]
    source = np.random.default_rng(seed + 1).integers(3, V, (2, S), dtype=np.int32)
    there = np.arange(S) < SOURCES[:, None]
    encoder = {"encoder_tokens": np.where(there, source, 0), "encoder_segment_ids": there.astype(np.int32),
               "encoder_positions": np.broadcast_to(np.arange(S, dtype=np.int32), (2, S)),
               "token_types": (np.arange(T) > 6).astype(np.int32) * np.ones((2, 1), np.int32)}
    return encoder | {
        "tokens": np.where(real, tokens[:, :-1], 0), "targets": tokens[:, 1:], "segment_ids": real.astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (2, T)), "loss_mask": real.astype(np.float32)}


@functools.cache
def oracle(name):
    """(their logits, loss, gradients, weights) on `batch_of()`, or a loud skip."""
    torch = pytest.importorskip("torch", reason=f"torch {MISSING}")
    transformers = pytest.importorskip("transformers", reason=f"transformers {MISSING}")
    family = FAMILIES[name]
    torch.manual_seed(0)
    prefix = f"{family.their}Text" if family.their == "Gemma3" else family.their
    config = getattr(transformers, f"{prefix}Config")(**family.config, attn_implementation="eager", use_cache=False)
    theirs = getattr(transformers, f"{family.their}{family.head}")(config).eval()
    # No bias at 0, no norm at its start, and scores that tell keys apart, but not so large (T5 does not divide them)
    # that a softmax is all on one key, which magnifies rounding.
    noise = 0.1 if family.their == "T5" else 0.2
    for parameter in filter(lambda p: p.requires_grad, theirs.parameters()):
        parameter.data += (noise if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    if name == "t5-v1.1":  # whose weights are not tied, whatever the class does with new ones
        theirs.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn_like(theirs.lm_head.weight))
    batch = {key: torch.tensor(np.array(value)) for key, value in batch_of().items()}
    inputs = dict(input_ids="tokens", attention_mask="segment_ids") | family.inputs
    logits = theirs(**{theirs_: batch[ours_].long() for theirs_, ours_ in inputs.items()}).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].long().flatten(), reduction="none")
    loss = (nats * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
    loss.backward()
    used = {key: p for key, p in theirs.named_parameters() if p.grad is not None}
    weights = {key: p.detach().numpy() for key, p in used.items()}
    grads = {key: p.grad.numpy() for key, p in used.items()}
    return logits.detach().numpy(), loss.item(), grads, weights


@functools.cache
def ours(name):
    """(model, parameters with their weights in them)."""
    *_, weights = oracle(name)
    family = FAMILIES[name]
    config = build(CONFIGS[name], COMMON | family.ours)
    model = build_model(config, vocab_size=V, platform="cpu", dtype=jnp.float32)
    tree = tree_of(named_leaves(model.shapes), family.names, weights)
    params = jax.tree.unflatten(jax.tree.structure(model.shapes), list(map(jnp.asarray, tree.values())))
    assert num_elements(params) == sum(w.size for w in weights.values())
    return model, params


@functools.cache
def computed(name):
    """(logits, loss, gradients) of ours."""
    model, params = ours(name)
    loss_fn = next_token_loss(model)

    @jax.jit
    def run(params, batch):
        def mean(params):
            sums = loss_fn(params, batch, None)
            return sums.total / sums.weight

        return model.logits(params, batch), *jax.value_and_grad(mean)(params)

    return run(params, batch_of())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(name):
    their_logits, their_loss, their_grads, _ = oracle(name)
    logits, loss, grads = computed(name)
    real = batch_of()["segment_ids"] > 0
    scale = np.abs(their_logits[real]).max()
    assert scale > 1
    np.testing.assert_allclose(np.asarray(logits)[real], their_logits[real], atol=2e-5 * scale, rtol=0)
    assert float(loss) == pytest.approx(their_loss, rel=1e-5)
    expected = tree_of(named_leaves(grads), FAMILIES[name].names, their_grads)
    largest = max(np.abs(g).max() for g in expected.values())
    for key, grad in named_leaves(grads):
        # A key's bias shifts all scores of a query alike: its gradient is 0, and only rounding is left.
        size = largest if key.endswith("key/bias") else np.abs(expected[key]).max()
        assert size > 1e-4
        np.testing.assert_allclose(grad, expected[key], atol=1e-4 * size, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", DECODERS | ENCDECS)
def test_ragged_prefill_then_decoding_equals_the_full_forward(name):
    """Prompts of 9 and 3 tokens are fed together, padded with junk on the right, then continued together."""
    model, params = ours(name)
    full, tokens, lengths, more = np.asarray(computed(name)[0]), batch_of()["tokens"], np.array([9, 3]), 10
    prompt = np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 13).astype(np.int32)
    fed = np.stack([tokens[[0, 1], lengths + i] for i in range(more)])

    @jax.jit
    def run(params, prompt, fed):
        start = dict(params=params, batch=batch_of()) if name in ENCDECS else {}
        first, cache = model.step(params, prompt, model.init_cache(2, 24, **start), jnp.asarray(lengths - 1, jnp.int32))

        def one(cache, last_B):
            logits, cache = model.step(params, last_B[:, None], cache)
            return cache, logits

        _, rest = jax.lax.scan(one, cache, fed)
        return jnp.concatenate([first[None], rest])

    logits = run(params, prompt, fed)
    for i in range(more + 1):
        np.testing.assert_allclose(logits[i], full[[0, 1], lengths - 1 + i], atol=2e-5 * np.abs(full).max(), rtol=0,
                                   err_msg=f"{i} tokens later")


@pytest.mark.parametrize("name", ["gemma2", "qwen2-moe", "t5-v1.1"])
def test_decoding_on_a_mesh_equals_the_full_forward(name):
    """Local and global layers, experts, an encoder's keys: weights and caches split over data, fsdp and tensor."""
    config = build(CONFIGS[name], COMMON | FAMILIES[name].ours | dict(num_layers=2, init_std=0.3))
    model = build_model(config, vocab_size=V, platform="cpu", dtype=jnp.float32)
    params, batch, lengths, more = jax.jit(model.init)(jax.random.key(0)), batch_of(), np.array([9, 3]), 4
    expected, tokens = np.asarray(jax.jit(model.logits)(params, batch)), batch["tokens"]
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2, rules={"batch": ("data",)}))
    placed = jax.device_put(params, layout.tree(model.axes, model.shapes))

    @jax.jit
    def run(params, prompt, fed):
        with use_layout(layout):
            start = dict(params=params, batch=batch) if name in ENCDECS else {}
            logits, cache = model.step(params, prompt, model.init_cache(2, 24, **start),
                                       jnp.asarray(lengths - 1, jnp.int32))
            found = [logits]
            for tokens_B in fed:
                logits, cache = model.step(params, tokens_B[:, None], cache)
                found.append(logits)
            return jnp.stack(found), cache.layers

    fed = np.stack([tokens[[0, 1], lengths + i] for i in range(more)])
    logits, caches = run(placed, tokens[:, :9], fed)
    for i in range(more + 1):
        np.testing.assert_allclose(logits[i], expected[[0, 1], lengths - 1 + i], atol=2e-5 * np.abs(expected).max(),
                                   rtol=0, err_msg=f"{i} tokens later")
    assert all(not cache.is_fully_replicated for cache in jax.tree.leaves(caches))


def test_local_layers_keep_no_more_than_their_window():
    model = build_model(build(DecoderConfig, COMMON | DECODERS["gemma3"].ours), vocab_size=V, platform="cpu",
                        dtype=jnp.bfloat16)
    shapes = [layer.key.shape for layer in jax.eval_shape(lambda: model.init_cache(2, 24)).layers]
    assert shapes == [(2, 2, 2, 5, 16), (1, 2, 2, 24, 16)]


def test_a_prefix_is_seen_by_all_of_its_document():
    """Two documents in a row; the first 4 tokens of each are a prefix: who depends on whom, by changing one token."""
    model = build_model(build(DecoderConfig, COMMON | dict(num_kv_heads=4)), vocab_size=V, platform="cpu",
                        dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0))
    n = T // 2
    batch = {"tokens": batch_of()["tokens"][:1], "segment_ids": np.repeat(np.int32([[1, 2]]), n, axis=1),
             "positions": np.arange(T, dtype=np.int32)[None] % n,
             "bidirectional": (np.arange(T, dtype=np.int32)[None] % n < 4).astype(np.int32)}
    tokens = np.concatenate([batch["tokens"]] * (T + 1))
    tokens[np.arange(T), np.arange(T)] = (tokens[np.arange(T), np.arange(T)] + 1) % V
    many = {name: np.repeat(x, T + 1, axis=0) for name, x in batch.items()} | {"tokens": tokens}
    hidden = np.asarray(jax.jit(model.hidden)(params, many).x_BTD)
    depends = np.abs(hidden[:T] - hidden[T]).max(-1).T > 1e-6  # [who, on whom]
    who, whom = np.mgrid[:T, :T]
    expected = (who // n == whom // n) & ((whom <= who) | (whom % n < 4))
    np.testing.assert_array_equal(depends, expected)


def test_an_encoder_has_no_cache_and_an_encoder_decoder_needs_its_source():
    encoder, encdec = (build_model(build(CONFIGS[name], COMMON | FAMILIES[name].ours), vocab_size=V, platform="cpu",
                                   dtype=jnp.float32) for name in ("bert", "t5-v1.1"))
    with pytest.raises(ValueError, match="model.family: expected a decoder or encdec .*, got an encoder"):
        encoder.init_cache(1, 8)
    with pytest.raises(ValueError, match="init_cache: expected params and a batch"):
        encdec.init_cache(1, 8)
