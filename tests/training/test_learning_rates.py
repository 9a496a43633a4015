"""Groups of parameters and layers by depth: the rates, betas and decays of each of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.training.optim.config import GroupConfig, OptimizerConfig
from lmjax.training.optim.groups import multipliers
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.optim.table import OPTIMIZERS, make_optimizer
from lmjax.tree import named_leaves


def mapped(fn, shapes):
    return jax.tree.map(fn, shapes, is_leaf=lambda x: isinstance(x, tuple))


def shape_tree(shapes):
    return mapped(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes)


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return mapped(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes)


MODEL_SHAPES = {  # of a decoder of three layers
    "embedding": {"table": (8, 4)},
    "layers": {"block": {"mlp": {"up": {"kernel": (3, 4, 6)}}, "norm": {"scale": (3, 4)}}},
    "norm": {"scale": (4,)},
    "task_head": {"table": (2, 4)},
}
MODEL_AXES = {
    "embedding": {"table": ("vocab", "embed")},
    "layers": {"block": {"mlp": {"up": {"kernel": ("layers", "embed", "mlp")}},
                         "norm": {"scale": ("layers", "norm")}}},
    "norm": {"scale": ("norm",)},
    "task_head": {"table": ("outputs", "embed")},
}


@pytest.mark.parametrize("name", [
    "adamw", *(pytest.param(name, marks=pytest.mark.long) for name in OPTIMIZERS
               if name != "adamw")])
def test_groups_and_depth_scale_updates_and_decay(name):
    config = OptimizerConfig(
        name=name, peak_lr=0.5, schedule="constant", warmup_steps=0, clip_norm=0.0,
        weight_decay=0.2, decay_embeddings=True, layer_decay=0.5,
        groups=(GroupConfig("^task_head/", 10.0), GroupConfig("norm", 3.0),
                GroupConfig("task_head", 7.0)))
    by_path = multipliers(config, shape_tree(MODEL_SHAPES), MODEL_AXES)
    params, grads = random_like(MODEL_SHAPES, 0), random_like(MODEL_SHAPES, 1)

    def updates(by_path):
        tx = make_optimizer(config, 10, MODEL_AXES, by_path)
        return dict(named_leaves(jax.jit(
            lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)))

    plain, scaled = updates(None), updates(by_path)
    layers = np.array([0.5**3, 0.5**2, 0.5])
    for path, factor in {"embedding/table": 0.5**4, "norm/scale": 3.0, "task_head/table": 10.0,
                         "layers/block/mlp/up/kernel": layers[:, None, None],
                         "layers/block/norm/scale": 3 * layers[:, None]}.items():
        np.testing.assert_allclose(scaled[path], factor * plain[path], rtol=1e-6, err_msg=path)


def test_an_encoder_lies_below_its_decoder():
    stack = {"layers": {"block": {"kernel": (2, 4)}}, "norm": {"scale": (4,)}}
    shapes = shape_tree({"embedding": {"table": (8, 4)}, "encoder": stack, "decoder": stack,
                         "head_bias": (8,)})
    axes = jax.tree.map(lambda shape: ("norm",) * len(shape.shape), shapes)
    found = multipliers(OptimizerConfig(layer_decay=0.1), shapes, axes)
    exponents = {path: np.round(-np.log10(x)).tolist() for path, x in found.items()}
    assert exponents == {
        "embedding/table": 5, "encoder/layers/block/kernel": [4, 3], "encoder/norm/scale": 2,
        "decoder/layers/block/kernel": [2, 1], "decoder/norm/scale": 0, "head_bias": 0}


GROUPS = {  # by path: what the parameter's group sets
    "embedding/table": GroupConfig(kind="embedding", multiplier=3.0, b1=0.5, b2=0.7,
                                   weight_decay=0.4, decay_fraction=0.75),
    "task_head/table": GroupConfig(kind="unembedding", multiplier=0.5, final_lr_fraction=0.3),
    "layers/block/mlp/up/kernel": GroupConfig("mlp", kind="matrix", b2=0.6, weight_decay=0.0),
    "norm/scale": GroupConfig("^norm", kind="vector", multiplier=2.0, weight_decay=0.1),
}


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_groups_of_kinds_have_their_own_rates_betas_decays_and_cooldowns(name):
    config = OptimizerConfig(name=name, peak_lr=0.1, schedule="wsd", warmup_steps=0, clip_norm=0.0,
                             b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2,
                             groups=(*GROUPS.values(), GroupConfig(parameters="mlp")))
    tx = make_optimizer(config, 8, MODEL_AXES,
                        multipliers(config, shape_tree(MODEL_SHAPES), MODEL_AXES))
    params = random_like(MODEL_SHAPES, 0)
    state, update = tx.init(params), jax.jit(tx.update)
    mine = {path: np.asarray(p, np.float64) for path, p in named_leaves(params)}
    first, second = dict.fromkeys(mine, 0.0), dict.fromkeys(mine, 0.0)
    for t in range(8):
        grads = random_like(MODEL_SHAPES, t + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for path, g in named_leaves(grads):
            g, group = np.asarray(g, np.float64), GROUPS.get(path, GroupConfig("x"))
            its = {key: value if (value := getattr(group, key)) is not None else
                   getattr(config, key) for key in ("b1", "b2", "decay_fraction",
                                                    "final_lr_fraction")}
            rate = group.multiplier * float(make_schedule(dataclasses.replace(
                config, decay_fraction=its["decay_fraction"],
                final_lr_fraction=its["final_lr_fraction"]), 8)(t))
            first[path] = its["b1"] * first[path] + (1 - its["b1"]) * g
            second[path] = its["b2"] * second[path] + (1 - its["b2"]) * g * g
            step = (first[path] / (1 - its["b1"] ** (t + 1))
                    / (np.sqrt(second[path] / (1 - its["b2"] ** (t + 1))) + 1e-3))
            decay = group.weight_decay or 0.0  # without a group, only matrices decay
            mine[path] = mine[path] - rate * (step + decay * mine[path])
    for path, p in named_leaves(params):
        if name == "adamw" or not path.endswith("kernel"):
            np.testing.assert_allclose(p, mine[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_one_rate_for_all_changes_nothing_and_a_group_of_nothing_is_refused():
    shapes = shape_tree(MODEL_SHAPES)
    assert multipliers(OptimizerConfig(), shapes, MODEL_AXES) == {}
    with pytest.raises(ValueError, match=r"optimizer.groups.1.parameters: expected .* 'mlpp'; ch"):
        multipliers(OptimizerConfig(groups=(GroupConfig("mlp", 2.0), GroupConfig("mlpp", 2.0))),
                    shapes, MODEL_AXES)
    del shapes["task_head"]
    with pytest.raises(ValueError, match="groups.0: expected a kind .* got unembedding .with tie"):
        multipliers(OptimizerConfig(groups=(GroupConfig(kind="unembedding"),)), shapes, MODEL_AXES)
