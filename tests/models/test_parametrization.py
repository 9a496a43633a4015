"""muP and CompleteP: one table for initial weights, multipliers, rates, decay and epsilon."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.huggingface.settings import write_settings
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encdec import EncDecConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.folding import folded
from lmjax.models.model import Model, ModelConfig, build_model
from lmjax.models.parametrization import optimizer_factors, scale_initial
from lmjax.nn.adapters import AdapterConfig
from lmjax.nn.routing import MoEConfig
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.groups import multipliers
from lmjax.training.optim.table import make_optimizer
from lmjax.training.recipe import build_recipe
from lmjax.tree import named_leaves

TINY: dict[str, Any] = dict(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=32,
                            vocab_size=64)
BASE: dict[str, Any] = dict(base_embed_dim=4, base_num_layers=1, base_head_dim=2)  # m 4, l 2
FAMILIES: dict[str, ModelConfig] = {
    "decoder": DecoderConfig(**TINY),
    "tied, Gemma's switches": DecoderConfig(
        **TINY, norm="rmsnorm_1p", norm_position="both", scale_embeddings=True,
        tie_embeddings=True, qk_norm=True, logit_softcap=30.0),
    "GPT-2's switches": DecoderConfig(**TINY, positions="learned", norm="layernorm",
                                      mlp="gelu_tanh", use_bias=True, tie_embeddings=True),
    "OLMo's switches": DecoderConfig(**TINY, norm_position="after", qk_norm=True,
                                     qk_norm_over="all_heads"),
    "GPT-J's switches": DecoderConfig(**TINY, parallel_residual="one_norm", norm="layernorm",
                                      output_bias=True, qk_norm=True, qk_norm_kind="rmsnorm_1p"),
    "experts": DecoderConfig(**TINY, moe=MoEConfig(experts=4, per_token=2, shared_dim=8,
                                                   shared_gate=True)),
    "encoder": EncoderConfig(**TINY, norm="layernorm", norm_position="post", use_bias=True,
                             mlp="gelu", tie_embeddings=True),
    "encdec": EncDecConfig(**TINY, positions="relative", tie_embeddings=True, scale_output=True,
                           query_scalar=1.0, mlp="relu"),
}


def made(config: ModelConfig) -> Model:
    return build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)


def with_base(config: ModelConfig, parametrization: str, **base: int) -> ModelConfig:
    return dataclasses.replace(config, parametrization=parametrization, **(base or BASE))


def batch(config: ModelConfig) -> dict[str, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 8), dtype=np.int32)
    places = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    same = {"tokens": tokens, "positions": places, "segment_ids": np.ones((2, 8), np.int32)}
    return jax.tree.map(jnp.asarray, same | {f"encoder_{key}": x for key, x in same.items()})


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_base_all_parametrizations_are_the_standard_one(name: str) -> None:
    """The same program, and the same factors: bit for bit, at no cost."""
    config = FAMILIES[name]
    base = dict(base_embed_dim=16, base_num_layers=2, base_head_dim=4)
    programs = []
    for parametrization in ("standard", "mup", "completep"):
        model = made(with_base(config, parametrization, **base))
        lowered = jax.jit(lambda key, model=model: model.logits(model.init(key), batch(config)))
        programs.append(lowered.lower(jax.random.key(0)).as_text())
        found = optimizer_factors(model.config, "muon", model.shapes, model.axes)
        assert {*found.values()} == ({(1, 1, 1)} if found else set())
    assert programs[0] == programs[1] == programs[2]


# By the end of a path: what rate (AdamW, Muon), epsilon and the std of initial weights are
# multiplied by under CompleteP at 4 times the width and twice the depth of the base.
EXPECTED = {
    "embedding/table": (1, 1, 1 / 4, 1), "head/table": (1, 1, 1 / 4, 1),
    "query/kernel": (1 / 4, 1 / 2, 1 / 8, 1 / 2), "value/kernel": (1 / 4, 1 / 2, 1 / 8, 1 / 2),
    "out/kernel": (1 / 4, 1 / 2, 1 / 8, 2**0.5 / 2), "up/kernel": (1 / 4, 1 / 2, 1 / 8, 1 / 2),
    "down/kernel": (1 / 4, 1 / 2, 1 / 8, 2**0.5 / 2), "router/kernel": (1 / 4, 1 / 4, 1 / 2, 1 / 4),
    "shared_gate/kernel": (1 / 4, 1 / 4, 1 / 2, 1 / 4), "norm/scale": (1, 1, 1 / 4, 1),
    "mlp_norm/scale": (1, 1, 1 / 8, 1), "query/bias": (1, 1, 1 / 8, 1),
    "adapter/a": (1 / 4, 1 / 4, 1 / 2, 1), "adapter/b": (1, 1, 1 / 8, 1),
}


def test_the_table_gives_what_the_papers_say() -> None:
    """Yang and Hu 2022, table 8; Dey et al. 2025, table 1; LoRA+, arXiv:2402.12354."""
    config = dataclasses.replace(FAMILIES["experts"], qkv_bias=True)
    model = made(with_base(config, "completep")).with_adapters(
        AdapterConfig(kind="lora", rank=2))
    adam, muon = (optimizer_factors(model.config, name, model.shapes, model.axes)
                  for name in ("adamw", "muon"))
    ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), model.shapes)
    initial = dict(named_leaves(scale_initial(model.config, ones, model.axes)))
    seen = set()
    for path in adam:
        for end, (rate, of_muon, eps, std) in EXPECTED.items():
            if path.endswith(f"/{end}") or path == end:
                seen.add(end)
                assert adam[path] == pytest.approx((rate, 1 / rate, eps)), path
                assert muon[path] == pytest.approx((of_muon, 1 / of_muon, eps)), path
                np.testing.assert_allclose(initial[path], std, rtol=1e-6)
    assert seen == {*EXPECTED}


@pytest.mark.long
def test_the_optimizer_takes_the_factors_with_its_groups() -> None:
    """One step of AdamW against its formula, with a group that has its own rate and decay."""
    model = made(with_base(FAMILIES["decoder"], "mup"))
    settings = dict(peak_lr=0.5, warmup_steps=0, schedule="constant", clip_norm=0.0, eps=1e-2)
    config = OptimizerConfig(weight_decay=0.25, groups=(), **settings)
    config = dataclasses.replace(config, groups=build_recipe({"optimizer": {"groups": [
        {"parameters": "/up/", "multiplier": 2.0, "weight_decay": 0.125}]}}).optimizer.groups)
    factors = optimizer_factors(model.config, "adamw", model.shapes, model.axes)
    by_path = multipliers(config, model.shapes, model.axes, factors)
    tx = make_optimizer(config, 10, model.axes, by_path, factors=factors)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 2.0), model.shapes)
    grads = jax.tree.map(lambda s: jnp.full(s.shape, 1e-2), model.shapes)
    updates = dict(named_leaves(tx.update(grads, tx.init(params), params)[0]))
    up, down = updates["layers/block/mlp/up/kernel"], updates["layers/block/mlp/down/kernel"]
    adam = 1e-2 / (1e-2 + 1e-2 / 4)  # epsilon at a quarter
    np.testing.assert_allclose(down, -0.5 * (adam / 4 + 0.25 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(up, -0.5 * 2.0 * (adam / 4 + 0.125 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["embedding/table"], -0.5 * adam, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_multipliers_fold_into_the_weights(name: str) -> None:
    model = made(with_base(FAMILIES[name], "completep"))
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    plain, weights = folded(model, params)
    assert plain.config.parametrization == "standard"
    expected = jax.jit(model.logits)(params, batch(model.config))
    np.testing.assert_allclose(jax.jit(plain.logits)(weights, batch(model.config)), expected,
                               atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - jax.jit(plain.logits)(params, batch(model.config))).max() > 1e-3


@pytest.mark.parametrize(("change", "message"), [
    ({"model.parametrization": "mup"}, "base_embed_dim"),
    ({"model.parametrization": "completep", "model.base_embed_dim": 4}, "base_num_layers"),
    ({"model.parametrization": "mup", "model.base_embed_dim": 4, "optimizer.name": "sgd"},
     "optimizer.name"),
    ({"model.parametrization": "mup", "model.base_embed_dim": 4, "train.shrink": True},
     "train.shrink")])
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str) -> None:
    mapping: dict[str, Any] = {}
    for key, value in change.items():
        group, _, name = key.partition(".")
        mapping.setdefault(group, {})[name] = value
    with pytest.raises(UserError, match=message):
        build_recipe(mapping)


@pytest.mark.long
def test_an_export_that_cannot_fold_is_refused() -> None:
    with pytest.raises(UserError, match="folded into its weights"):
        write_settings(with_base(FAMILIES["decoder"], "mup"))
    plain = dict(norm="layernorm_plain", norm_position="after")
    for name, change, message in (
            ("encoder", dict(mlm_head=False), "tie_embeddings=false"),
            ("decoder", plain, "outputs of residual branches"),
            ("tied, Gemma's switches", dict(norm="layernorm_plain"), "a norm before"),
            ("decoder", dict(qkv_clip=1.0), "queries, which are clipped")):
        model = made(with_base(dataclasses.replace(FAMILIES[name], **change), "completep"))
        params = jax.tree.map(lambda s: jnp.ones(s.shape), model.shapes)
        with pytest.raises(UserError, match=message):
            folded(model, params)
