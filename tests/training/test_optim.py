"""Optimizers against formulas, stacked parameters against single ones, shardings by the byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.ema import ema_update
from lmjax.training.optim.parameters import kind_of
from lmjax.training.optim.schedules import SCHEDULES, make_schedule
from lmjax.training.optim.sharding import state_shardings
from lmjax.training.optim.table import OPTIMIZERS, make_optimizer
from lmjax.training.recipe import build_recipe

LAYERS, EMBED, HEADS, HEAD_DIM, MLP, VOCAB = 3, 16, 2, 4, 24, 40
AXES = {
    "embedding": {"table": ("vocab", "embed")},
    "blocks": {
        "query": {"kernel": ("layers", "embed", "heads", "head_dim"),
                  "bias": ("layers", "norm", "norm")},
        "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "down": {"kernel": ("layers", "mlp", "embed")},
        "norm": {"scale": ("layers", "norm")},
    },
    "final_norm": {"scale": ("norm",)},
}
SHAPES = {
    "embedding": {"table": (VOCAB, EMBED)},
    "blocks": {
        "query": {"kernel": (LAYERS, EMBED, HEADS, HEAD_DIM), "bias": (LAYERS, HEADS, HEAD_DIM)},
        "out": {"kernel": (LAYERS, HEADS, HEAD_DIM, EMBED)},
        "down": {"kernel": (LAYERS, MLP, EMBED)},
        "norm": {"scale": (LAYERS, EMBED)},
    },
    "final_norm": {"scale": (EMBED,)},
}
MATRICES = ("query/kernel", "out/kernel", "down/kernel")
# One step at full rate, with nothing but the rescaling that is looked at.
BARE = OptimizerConfig(peak_lr=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0,
                       clip_norm=0.0)


def random_like(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
                        shapes,
                        is_leaf=lambda x: isinstance(x, tuple))


def named(tree):
    """{"blocks/query/kernel": leaf}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def bare(name, **settings):
    return dataclasses.replace(BARE, name=name, **settings)


def first_updates(config, params, grads, axes=AXES):
    """What a first step adds to each parameter, by name."""
    tx = make_optimizer(config, 10, axes)
    return named(jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params))


# Schedules: step -> share of the peak, with 10 steps of warm-up, 110 in all, down to a tenth.
POINTS = {
    "cosine": {0: 1 / 11, 9: 10 / 11, 10: 1, 35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55,
               110: 0.1, 200: 0.1},
    "linear": {0: 1 / 11, 10: 1, 60: 0.55, 110: 0.1},
    "exponential": {0: 1 / 11, 10: 1, 60: math.sqrt(0.1), 110: 0.1},
    "wsd": {0: 1 / 11, 10: 1, 60: 1, 88: 1, 88 + 11: 1 - 0.9 * math.sqrt(0.5), 110: 0.1},
    "inverse_sqrt": {0: 1 / 11, 10: 1, 40: 0.5, 90: 1 / 3, 1000: 0.1},
    "constant": {0: 1 / 11, 10: 1, 110: 1},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_has_its_closed_form(name):
    config = OptimizerConfig(schedule=name, peak_lr=2e-3, warmup_steps=10, final_lr_fraction=0.1)
    schedule = make_schedule(config, 110)
    for step, share in POINTS[name].items():
        np.testing.assert_allclose(schedule(step), 2e-3 * share, rtol=1e-5)
    steps = jnp.arange(110, dtype=jnp.int32)
    traced = jax.jit(jax.vmap(schedule))(steps)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, [schedule(int(t)) for t in steps], rtol=1e-5)
    assert traced.min() > 0, "a step at rate 0 is wasted"
    assert np.argmax(traced) == 10 and np.all(np.diff(traced[10:]) <= 1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_decay_ends_one_step_after_the_last(name):
    """So even with final_lr_fraction 0, the last step (of 0..109) still learns."""
    for fraction in (0.0, 0.1):
        config = OptimizerConfig(schedule=name, peak_lr=1.0, warmup_steps=10,
                                 final_lr_fraction=fraction)
        last, after = (float(make_schedule(config, 110)(step)) for step in (109, 110))
        assert after == pytest.approx(fraction, abs=1e-6)
        assert fraction + 1e-4 < last < fraction + 0.03


def test_no_warmup_starts_at_the_peak():
    for name in SCHEDULES:
        config = OptimizerConfig(schedule=name, warmup_steps=0, peak_lr=0.5)
        assert make_schedule(config, 20)(0) == 0.5


@pytest.mark.parametrize("schedule, warmup", [("cosine", 100), ("wsd", 81)])
def test_warmup_that_does_not_fit_is_refused(schedule, warmup):
    make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=warmup - 1), 100)
    with pytest.raises(ValueError, match=f"warmup_steps: expected at most {warmup - 1} .* got "
                       f"{warmup};"):
        make_schedule(OptimizerConfig(schedule=schedule, warmup_steps=warmup), 100)


@pytest.mark.parametrize("settings, message", [
    ({"name": "adam"}, "optimizer.name: expected one of adamw, "),
    ({"schedule": "step"}, "optimizer.schedule: expected one of cosine, "),
    ({"peak_lr": -1.0}, "peak_lr: expected at least 0"),
    ({"b2": 1.0}, "b2: expected 0 <= b2 < 1, got 1.0"),
    ({"final_lr_fraction": 10.0}, "final_lr_fraction: expected 0 to 1"),
    ({"layer_decay": 0.0}, "layer_decay: expected 0 < layer_decay <= 1, got 0"),
    ({"groups": [{"parameters": "("}]}, r"groups.0.parameters: expected a regular expression"),
    ({"groups": [{"multiplier": 2.0}]}, "groups.0.parameters: expected a regular expression, or a"),
    ({"groups": [{"kind": "tokens"}]}, "groups.0.kind: expected one of matrix, embedding, "),
    ({"groups": [{"kind": "vector", "b2": 1.0}]}, "groups.0.b2: expected 0 <= b2 < 1, got 1.0"),
    ({"schedule": "exponential", "final_lr_fraction": 0.0},
     "final_lr_fraction: expected more than 0"),
])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build_recipe({"optimizer": settings})


def test_adamw_is_the_formula():
    config = OptimizerConfig(name="adamw", peak_lr=0.01, schedule="linear", warmup_steps=2,
                             final_lr_fraction=0.0, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3,
                             clip_norm=0.0)
    tx = make_optimizer(config, 10, AXES)
    params = random_like(SHAPES, 0)
    state = tx.init(params)
    mine = {name: np.asarray(p, np.float64) for name, p in named(params).items()}
    m = dict.fromkeys(mine, 0.0)
    v = dict.fromkeys(mine, 0.0)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for t, rate in enumerate([0.01 / 3, 0.02 / 3, 0.01, 0.01 * 7 / 8]):
        grads = random_like(SHAPES, t + 1)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, g in named(grads).items():
            g = np.asarray(g, np.float64)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            m_hat, v_hat = m[name] / (1 - 0.8 ** (t + 1)), v[name] / (1 - 0.9 ** (t + 1))
            decay = 0.3 if name.endswith(MATRICES) else 0.0
            mine[name] = mine[name] - rate * (m_hat / (np.sqrt(v_hat) + 1e-3) + decay * mine[name])
    for name, p in named(params).items():
        np.testing.assert_allclose(p, mine[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_kinds_come_from_names_not_ranks():
    assert kind_of(("embed", "mlp")) == kind_of(("layers", "experts", "embed", "mlp")) == "matrix"
    assert kind_of(("layers", "embed", "experts")) == "matrix"  # a router
    assert kind_of(("embed", "head_dim")) == "matrix"
    assert kind_of(("vocab", "embed")) == kind_of(("positions", "embed")) == "embedding"
    for axes in [("norm",), ("layers", "norm"), ("layers", "norm", "norm"), ("layers", "embed"),
                 ("heads", "head_dim"), ("layers", "experts", "mlp"), ("experts",)]:
        assert kind_of(axes) == "vector", axes


@pytest.mark.parametrize("name, decay_embeddings", [
    *((name, False) for name in OPTIMIZERS), ("adamw", True),
    *(pytest.param(name, True, marks=pytest.mark.long) for name in OPTIMIZERS if name != "adamw")])
def test_only_matrices_decay(name, decay_embeddings):
    config = bare(name, peak_lr=0.5, weight_decay=0.2, decay_embeddings=decay_embeddings)
    params = random_like(SHAPES, 0)
    # Without a gradient, decay is all that moves a parameter.
    updates = first_updates(config, params, jax.tree.map(jnp.zeros_like, params))
    for path, param in named(params).items():
        decays = path.endswith(MATRICES) or (decay_embeddings and path.startswith("embedding"))
        np.testing.assert_allclose(updates[path], -0.5 * 0.2 * param if decays else 0 * param,
                                   atol=1e-7)


def test_clipping_is_by_the_norm_of_all_parameters():
    grads = random_like(SHAPES, 1)
    norm = math.sqrt(sum(float(jnp.sum(g ** 2)) for g in jax.tree.leaves(grads)))
    for clip, scale in [(0.0, 1.0), (norm / 4, 0.25), (norm * 4, 1.0)]:
        updates = first_updates(bare("sgd", clip_norm=clip), random_like(SHAPES, 0), grads)
        for path, g in named(grads).items():
            np.testing.assert_allclose(updates[path], -scale * g, rtol=1e-5)


def test_muon_is_two_dimensional_muon_in_every_layer():
    grads = random_like(SHAPES, 1)
    updates = first_updates(bare("muon"), random_like(SHAPES, 0), grads)
    sides = {"query": (EMBED, HEADS * HEAD_DIM), "out": (HEADS * HEAD_DIM, EMBED),
             "down": (MLP, EMBED)}
    single = optax.contrib.muon(1.0, beta=0.95, consistent_rms=0.2)
    first_update = jax.jit(lambda g: single.update(g, single.init(g), g)[0])
    for name, (rows, columns) in sides.items():
        g_LRC = grads["blocks"][name]["kernel"].reshape(LAYERS, rows, columns)
        u_LRC = updates[f"blocks/{name}/kernel"].reshape(LAYERS, rows, columns)
        for g_RC, u_RC in zip(g_LRC, u_LRC, strict=True):
            np.testing.assert_allclose(u_RC, first_update(g_RC), rtol=1e-3, atol=1e-5)
            # Five iterations leave singular values about 1, not at it (Jordan et al. 2024).
            values = np.linalg.svd(np.asarray(u_RC) / (0.2 * math.sqrt(max(rows, columns))),
                                   compute_uv=False)
            assert 0.6 < values.min() and values.max() < 1.3
            assert 0.15 < float(jnp.sqrt(jnp.mean(u_RC ** 2))) < 0.25  # as AdamW's
    # The rest is AdamW, whose first step is the gradient's sign.
    for path, g in named(grads).items():
        if not path.endswith(MATRICES):
            np.testing.assert_allclose(updates[path], -jnp.sign(g), rtol=1e-3)


def test_muon_takes_experts_as_separate_and_refuses_what_is_no_matrix():
    axes = {"w": ("layers", "experts", "embed", "mlp")}
    grads = random_like({"w": (2, 3, 8, 12)}, 0)
    update = first_updates(bare("muon"), grads, grads, axes)["w"]
    one = {"w": grads["w"][1, 2]}
    alone = first_updates(bare("muon"), one, one, {"w": ("embed", "mlp")})
    np.testing.assert_allclose(update[1, 2], alone["w"], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="two sides for muon, got axes .* use adamw"):
        make_optimizer(bare("muon"), 10, {"w": ("layers", "embed", "mlp", "seq")})


def test_adafactor_treats_every_layer_alone():
    axes = {"w": ("layers", "embed", "mlp"), "scale": ("layers", "norm")}
    params = random_like({"w": (3, 128, 130), "scale": (3, 4)}, 0)
    state = make_optimizer(bare("adafactor"), 9, axes).init(params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes[-3:] == [12, 3 * 128, 3 * 130], "a row and a column of statistics per matrix"

    def second_update(params, axes, growth):
        """Lets the gradient grow by another factor in each layer, so that some are clipped."""
        tx = make_optimizer(bare("adafactor"), 9, axes)
        _, state = tx.update(params, tx.init(params), params)
        return tx.update(jax.tree.map(jnp.multiply, params, growth), state, params)[0]

    growth = jnp.array([0.1, 1.0, 9.0])
    stacked = {"w": growth[:, None, None], "scale": growth[:, None]}
    together = jax.jit(lambda p: second_update(p, axes, stacked))(params)
    own = {"w": ("embed", "mlp"), "scale": ("norm",)}
    single = jax.jit(lambda p, growth: second_update(p, own, {"w": growth, "scale": growth}))
    rms = []
    for i in range(3):
        alone = single(jax.tree.map(lambda p, i=i: p[i], params), growth[i])
        for name, update in alone.items():
            np.testing.assert_allclose(together[name][i], update, rtol=1e-4)
        rms.append(float(jnp.sqrt(jnp.mean(alone["w"] ** 2))))
    assert rms[0] < 0.5 and 0.999 < rms[2] < 1.001, "one layer is clipped and another is not"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
    config = OptimizerConfig(name=name, peak_lr=0.02, warmup_steps=5, weight_decay=0.0)
    tx = make_optimizer(config, 60, AXES)
    target = random_like(SHAPES, 0, 0.3)

    def loss(params):
        differences = jax.tree.map(jnp.subtract, params, target)
        return sum(jnp.sum(d ** 2) for d in jax.tree.leaves(differences))

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, tx.init(params)), length=60)[1]

    losses = run(jax.tree.map(jnp.zeros_like, target))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_all_that_a_resumed_run_needs(name):
    config = OptimizerConfig(name=name, peak_lr=0.1, warmup_steps=2)
    params = random_like(SHAPES, 0)

    def advance(params, state, steps):
        tx = make_optimizer(config, 8, AXES)  # made anew, as after a restart
        update = jax.jit(tx.update)
        state = tx.init(params) if state is None else state
        for step in steps:
            updates, state = update(random_like(SHAPES, step + 1), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    straight = advance(params, None, range(4))
    resumed = advance(*jax.tree.map(np.asarray, advance(params, None, range(2))), range(2, 4))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


# Every parameter divides by 8 over all its sharded axes; w is large enough for Adafactor to factor.
SHARDED = {
    "table": ((256, 128), ("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
    "w": ((2, 128, 256), ("layers", "embed", "mlp"), PartitionSpec(None, "fsdp", "tensor")),
    "square": ((128, 128), ("embed", "mlp"), PartitionSpec("fsdp", "tensor")),
    "query": ((2, 128, 2, 128), ("layers", "embed", "heads", "head_dim"),
              PartitionSpec(None, "fsdp", "tensor")),
    "scale": ((2, 128), ("layers", "norm"), PartitionSpec()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_lies_where_its_parameters_lie(name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = {k: NamedSharding(mesh, spec) for k, (_, _, spec) in SHARDED.items()}
    shapes = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, (shape, _, _) in SHARDED.items()}
    tx = make_optimizer(OptimizerConfig(name=name), 1000,
                        {k: axes for k, (_, axes, _) in SHARDED.items()})
    params = {k: jax.device_put(jnp.ones(s.shape), shardings[k]) for k, s in shapes.items()}
    out = state_shardings(tx, shapes, shardings, mesh)
    state = jax.jit(tx.init, out_shardings=out)(params)

    def held(tree):
        """Bytes of each of the eight devices."""
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return [sum(s.data.nbytes for s in shards if s.device == device)
                for device in jax.devices()]

    def share(*names):
        return held({k: params[k] for k in names})[0]

    # Moments of one or two arrays per parameter, sharded alike. Counts and coefficients are a few
    # bytes.
    matrices = ("w", "square", "query")
    expected = {
        "adamw": 2 * share(*SHARDED),
        "lion": share(*SHARDED),
        "sgd": share(*SHARDED),
        "muon": share(*matrices) + 2 * share("table", "scale"),
        # Rows and columns: the parameter's own spec without the axis that was averaged out.
        "adafactor": share("scale") + 4 * sum([
            256 // 2 + 128 // 4,  # table
            2 * (128 // 4 + 256 // 2),  # w: in each layer
            128 // 4 + 128 // 2,  # square
            2 * (128 // 4 + 128),  # query: in each layer and the one head of two that a device has
        ]),
    }[name]
    sizes = held(state)
    assert all(expected <= nbytes <= expected + 80 for nbytes in sizes), (expected, sizes)
    # An update leaves everything where it is.
    updates, new = jax.jit(tx.update, out_shardings=(shardings, out))(params, state, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, new))
    assert jax.tree.structure(state) == jax.tree.structure(out)


def test_adafactor_statistics_follow_the_axis_they_keep():
    """Also in a square matrix, where the shapes of rows and columns do not tell them apart."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = {"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))}
    params = {"w": jax.random.normal(jax.random.key(0), (128, 128))}
    tx = make_optimizer(bare("adafactor"), 10, {"w": ("embed", "mlp")})
    specs = {jax.tree_util.keystr(path): leaf.spec for path, leaf in
             jax.tree_util.tree_leaves_with_path(state_shardings(tx, params, sharding, mesh))}
    row, = (spec for path, spec in specs.items() if "v_row" in path)
    column, = (spec for path, spec in specs.items() if "v_col" in path)
    _, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    v_row, v_col = (optax.tree.get(state, key)["w"] for key in ("v_row", "v_col"))
    mean_of = {"fsdp": jnp.mean(params["w"] ** 2, axis=1),
               "tensor": jnp.mean(params["w"] ** 2, axis=0)}
    np.testing.assert_allclose(v_row, mean_of[row[0]], rtol=1e-4)
    np.testing.assert_allclose(v_col, mean_of[column[0]], rtol=1e-4)


def test_ema_forgets_the_start_and_then_averages():
    params, ema = {"w": jnp.full(3, 2.0)}, {"w": jnp.full(3, 1.0)}
    np.testing.assert_allclose(ema_update(ema, params, 0.9, 0)["w"], 0.1 * 1 + 0.9 * 2, rtol=1e-6)
    np.testing.assert_allclose(ema_update(ema, params, 0.9, 8)["w"], 0.5 * 1 + 0.5 * 2, rtol=1e-6)
    np.testing.assert_allclose(ema_update(ema, params, 0.9, 10 ** 6)["w"], 0.9 * 1 + 0.1 * 2,
                               rtol=1e-6)
