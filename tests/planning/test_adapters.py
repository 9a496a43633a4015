"""What a plan says of adapters: the state that they need, and its FLOPs."""

import pytest

from lmjax.config import load
from lmjax.models.flops import flops_per_token
from lmjax.models.model import build_model
from lmjax.nn.adapters import AdapterConfig, is_adapter
from lmjax.planning.analytic import guess
from lmjax.planning.measure import measure
from lmjax.runtime.chips import parse_topology
from lmjax.training.recipe import build_recipe
from lmjax.tree import named_leaves, num_elements, split_tree

LORA = ("adapter.kind=lora", "adapter.rank=16", "adapter.targets=.")


def recipe_of(variant, *overrides):
    return build_recipe(load(f"configs/llama2_7b.py{variant}", overrides))


def model_of(recipe):
    return build_model(recipe.model, vocab_size=256, platform="cpu", dtype="bfloat16"
                       ).with_adapters(recipe.adapter)


@pytest.mark.long
def test_the_state_of_adapters_is_theirs_and_a_base_in_the_compute_dtype():
    recipe = recipe_of(":tiny", *LORA, "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8",
                       "mesh.rules={\"heads\": [], \"kv_heads\": [], \"mlp\": [], \"vocab\": []}",
                       "train.compute_dtype=bfloat16")
    memory = measure(recipe, "cpu")[0]["memory"]
    own, base = split_tree(model_of(recipe).shapes, is_adapter)
    assert memory["parameters"] == 4 * num_elements(own)
    assert 8 * num_elements(own) < memory["optimizer"] <= 8 * num_elements(own) + 16
    norms = sum(leaf.size for path, leaf in named_leaves(base) if "norm/" in path)
    assert memory["frozen"] == 2 * num_elements(base) + 2 * norms, "norms stay in float32"


def test_the_guess_knows_what_adapters_save():
    v5p = parse_topology("v5p-128")
    full, lora = (guess(recipe_of("", "mesh.data=1", "mesh.fsdp=64", *more), v5p)
                  for more in ((), LORA))
    saved = 16 * (6.738e9 - 40e6) / 64  # float32 weights, gradients and two moments
    assert full.memory - lora.memory == pytest.approx(saved, rel=0.01)
    assert lora.seconds_per_token < full.seconds_per_token


def test_frozen_weights_cost_four_flops_per_token():
    recipe = recipe_of(":tiny")
    plain, c = model_of(recipe), recipe.model
    adapted = plain.with_adapters(AdapterConfig(kind="lora", rank=2, targets="mlp/up$"))
    own = c.num_layers * 2 * (c.embed_dim + c.mlp_dim)
    attention = flops_per_token(plain, 32) - 6 * (weights := (
        c.vocab_size or 256) * c.embed_dim + c.num_layers * (
        2 * c.embed_dim * c.dims.head_dim * (c.num_heads + c.dims.num_kv_heads)
        + 3 * c.embed_dim * c.mlp_dim))
    assert flops_per_token(adapted, 32) == pytest.approx(4 * weights + 6 * own + attention)
