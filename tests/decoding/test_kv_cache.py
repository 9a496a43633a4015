"""Keys and values kept as int8: attention to them, all families, batches, drafts, the server."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_encdec import DIMS, MODELS
from tiny_decoder import GREEDY, PROMPTS, tiny_decoder
from tiny_lm import V, ask, tiny_lm

from lmjax.decoding.answers import DecodingOptions
from lmjax.decoding.generate import Generator
from lmjax.decoding.speculative import Draft, speculate
from lmjax.errors import UserError
from lmjax.models.model import build_model
from lmjax.nn.kernels.choose import KERNELS, attend
from lmjax.nn.kv_cache import Int8Rows
from lmjax.nn.masking import AttentionMask
from lmjax.nn.packed import rounded_rows
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Request
from lmjax.sharding import MeshConfig
from lmjax.training.recipe import build_recipe


@pytest.mark.long
def test_attention_to_integers_is_attention_to_the_floats_that_they_stand_for() -> None:
    B, T, S, H, G, K = 2, 3, 9, 4, 2, 8
    made = jax.random.split(jax.random.key(0), 4)
    q, bias = (jax.random.normal(key, shape) for key, shape in zip(
        made[2:], [(B, T, H, K), (1, H, T, S)], strict=True))
    k, v = (Int8Rows(*rounded_rows(jax.random.normal(key, (B, S, G, K)))) for key in made[:2])
    at = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))
    mask = AttentionMask(at[:, 4 : 4 + T], at, jnp.ones((B, T), jnp.int32),
                         jnp.ones((B, S), jnp.int32), window=5)
    floats = k.dense(q.dtype), v.dense(q.dtype)

    def run(k, v, kernel, **options):
        return jax.jit(lambda: attend(q, k, v, mask, scale=0.4, kernel=KERNELS[kernel],
                                      **options))()

    options = dict(softcap=3.0, bias=bias)
    np.testing.assert_allclose(run(k, v, "xla", **options), run(*floats, "xla", **options),
                               atol=1e-6)
    np.testing.assert_allclose(run(k, v, "chunked"), run(k, v, "xla"), atol=1e-6)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="kv_cache: expected one of float, int8, got 'int4'"):
        DecodingOptions(kv_cache="int4")


def per_token(model, weights, tokens_BT, slots, **options):
    """The logits after every token, read one by one, and the bytes of the cache."""
    def body(cache, token_B):
        logits, cache = model.step(weights, token_B[:, None], cache)
        return cache, logits

    cache = model.init_cache(len(tokens_BT), slots, **options)
    size = sum(x.nbytes for x in jax.tree.leaves((cache.layers, cache.source)))
    _, logits = jax.jit(lambda cache: jax.lax.scan(body, cache, tokens_BT.T))(cache)
    return np.asarray(logits).swapaxes(0, 1), size


@pytest.mark.parametrize("keys", [
    pytest.param(dict(sliding_window=5), marks=pytest.mark.slow),
    pytest.param(dict(num_layers=3, layer_pattern=("local", "global"), sliding_window=4,
                      attention_softcap=5.0), marks=pytest.mark.long)])
def test_one_by_one_or_at_once_with_rings_or_without(keys) -> None:
    """Every way reads the same rounded keys and values, which change the logits only a little."""
    model, params = tiny_decoder(**keys)
    whole, int8 = model, model.with_kv_cache("int8")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 14)), jnp.int32)
    exact, large = per_token(whole, params, tokens, 16)
    ours, small = per_token(int8, params, tokens, 16)
    assert small < large / 2  # with 8 dimensions per head, a scale is as long as half of its row
    assert 0 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()
    for rings in (True, False):
        cache = int8.init_cache(2, 16, rings=rings)
        first, cache = jax.jit(int8.extend)(params, tokens[:, :6], cache)
        second, _ = jax.jit(int8.extend)(params, tokens[:, 6:], cache)
        np.testing.assert_allclose(np.concatenate([first, second], axis=1), ours, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_decoder_keeps_what_its_encoder_says_as_integers_too(name) -> None:
    recipe = build_recipe({"model": MODELS[name] | DIMS, "data": {
        "objective": {"name": "span_corruption"}}})
    model = build_model(recipe.model, vocab_size=0, platform="cpu", dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, (2, 20)), jnp.int32)
    batch = {"encoder_tokens": tokens, "encoder_segment_ids": jnp.ones_like(tokens),
             "encoder_positions": jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32)[None], (2, 20))}
    exact, large = per_token(model, params, tokens[:, :8], 16, params=params, batch=batch)
    ours, small = per_token(model.with_kv_cache("int8"), params, tokens[:, :8], 16, params=params,
                            batch=batch)
    assert small < 0.5 * large
    assert 0 < np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_batch_or_on_a_draft() -> None:
    model, params = tiny_decoder()
    generator = Generator(model.with_kv_cache("int8"))
    together = generator(params, PROMPTS, max_tokens=12, sampling=GREEDY)
    assert together == [generator(params, [p], max_tokens=12, sampling=GREEDY)[0] for p in PROMPTS]
    drafted, gained = speculate(generator, params, Draft(generator.model, params), PROMPTS,
                                max_tokens=12, sampling=GREEDY)
    assert drafted == together and gained > 4


@pytest.mark.slow
@pytest.mark.parametrize("mesh, draft", [(None, False), (None, True), (dict(tensor=2), False)])
def test_the_server_answers_as_generate_does(mesh, draft) -> None:
    """With the prefix cache, windows, a draft, and heads that are split over devices."""
    keys = dict(num_kv_heads=2, sliding_window=20, embed_dim=64)
    lm = tiny_lm(MeshConfig(**mesh), 2, **keys) if mesh else tiny_lm(**keys)
    made = [Engine(lm, slots=3, max_length=64, chunk=16, kv_cache=kind,
                   draft=tiny_lm(seed=1) if draft else None) for kind in ("int8", "float")]
    small, large = (engine.stats()["cache_bytes"] for engine in made)
    assert small < 0.35 * large
    engine = made[0]
    engine.start()
    rng = np.random.default_rng(0)
    start = tuple(rng.integers(3, V - 40, 20).tolist())
    prompts = [start + tuple(rng.integers(3, V - 40, n).tolist()) for n in range(1, 9)]
    answers = ask(engine, [Request(p, 14, GREEDY) for p in prompts])
    assert [lm.reader.names.continuation(p, a.ids) for p, a in zip(prompts, answers, strict=True)
            ] == [lm.generate_ids([p], max_tokens=14, temperature=0.0, kv_cache="int8")[0]
                  for p in prompts]
    assert answers[-1].end.reused_tokens == 16
    engine.close()
