"""A mesh changes where arrays lie, to the byte as the rules say, and no result."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.nn import ops, positions
from lmjax.sharding import MESH_AXES, RULES, MeshConfig, constrain, make_layout, use_layout
from lmjax.tasks.losses import next_token_loss
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.table import make_optimizer
from lmjax.training.state import state_spec
from lmjax.tree import named_leaves

MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(data=1, fsdp=8),
    "data=2,fsdp=2,tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=2,context=2,tensor=2": dict(data=1, fsdp=2, context=2, tensor=2),
    "data=4,context=2": dict(data=4, context=2),
    "data=4,tensor=2": dict(data=-1, tensor=2),
}


def layout_of(**keys):
    return make_layout(MeshConfig(**keys))


def test_make_layout_orders_the_axes_and_fills_in_the_rest():
    mesh = layout_of(fsdp=2, tensor=2).mesh
    assert mesh.axis_names == MESH_AXES and dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {
        "data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(layout_of(data=1, fsdp=-1).mesh.shape)["fsdp"] == 8
    one = make_layout(MeshConfig(), jax.devices()[:1])
    assert one.mesh.size == 1 and dict(one.rules) == RULES


@pytest.mark.parametrize("keys", [dict(data=3), dict(fsdp=3), dict(data=1), dict(data=4, fsdp=4)])
def test_axes_that_are_not_the_devices_are_refused(keys):
    message = r"config\.mesh: expected .* the 8 devices present, got data=.*; set"
    with pytest.raises(UserError, match=message):
        layout_of(**keys)


def test_slices_are_of_tpus_and_only_data_goes_across_them():
    class Device(SimpleNamespace):
        __hash__ = object.__hash__

    def pod(platform):
        return [Device(platform=platform, slice_index=i // 4, id=i, process_index=i // 4,
                       device_kind="", coords=(i % 4, 0, 0), core_on_chip=0) for i in range(8)]

    message = r"mesh\.data: expected a multiple of the 2 slices.* got 1; change it"
    with pytest.raises(UserError, match=message):
        make_layout(MeshConfig(data=1, fsdp=8), pod("tpu"))
    # GPUs have a slice_index, too: one per host.
    assert make_layout(MeshConfig(data=1, fsdp=8), pod("gpu")).mesh.shape["fsdp"] == 8


def test_specs():
    layout = layout_of(data=2, fsdp=2, tensor=2)
    assert layout.spec(("vocab", "embed"), (6, 4)) == PartitionSpec("tensor", "fsdp")
    assert layout.spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, "fsdp", "tensor", None)
    assert layout.spec(("batch", "seq", None), (4, 5, 7)) == PartitionSpec(
        ("data", "fsdp"), None, None)
    assert layout_of(data=8).spec(("batch", "seq", "act_embed")) == PartitionSpec(
        "data", None, None)
    moved = layout_of(data=2, fsdp=2, tensor=2,
                      rules={"kv_heads": (), "mlp": ("fsdp", "tensor"), "embed": ()})
    assert moved.spec(("embed", "kv_heads", "head_dim"), (4, 1, 2)) == PartitionSpec(
        None, None, None)
    assert moved.spec(("embed", "mlp"), (3, 4)) == PartitionSpec(None, ("fsdp", "tensor"))


@pytest.mark.parametrize("axes, shape, parts", [
    (("vocb", "embed"), None, ["'vocb'", "vocab"]),
    (("vocab", "embed"), (4,), ["(4,)", "('vocab', 'embed')"]),
    (("embed", "heads", "head_dim"), (4, 3, 2),
     ["tensor=2", "heads=3", "remainder of 1", "mesh.rules"]),
    (("embed", "kv_heads", "head_dim"), (4, 1, 2), ["tensor=2", "kv_heads=1"]),
    (("batch", "seq"), (6, 8), ["data*fsdp=4", "batch=6", "remainder of 2"])])
def test_specs_that_cannot_be(axes, shape, parts):
    with pytest.raises(UserError, match="expected .*; ") as caught:
        layout_of(data=2, fsdp=2, tensor=2).spec(axes, shape)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message


@pytest.mark.parametrize("rules", [{"vocab": ("fsdp",)}, {"vocab": ("tensor", "tensor")}])
def test_a_mesh_axis_on_two_dimensions_is_refused(rules):
    layout = layout_of(data=2, fsdp=2, tensor=2, rules=rules)
    with pytest.raises(UserError, match="mesh.rules: expected each mesh axis on at most one .*; "):
        layout.sharding(("vocab", "embed"), (8, 8))


def test_constrain_places_inside_a_layout_and_is_nothing_outside():
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, "batch", "seq", "act_mlp") is x
    layout = layout_of(data=2, fsdp=2, tensor=2)

    def placed(x):
        with use_layout(layout):
            return constrain(x, "batch", "seq", "act_mlp")

    out = jax.jit(placed)(x)
    assert out.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    with use_layout(layout), pytest.raises(UserError, match="batch=7"):
        constrain(x[:7], "batch", "seq", "act_mlp")
    with use_layout(layout), pytest.raises(UserError, match=r"\(8, 4, 6\).*'seq'"):
        constrain(x, "batch", "seq")
    assert constrain(x, "batch", "seq", "act_mlp") is x  # the layout has been taken back
    with use_layout(make_layout(MeshConfig(), jax.devices()[:1])):
        assert constrain(x, "batch", "seq", "act_mlp") is x


def test_heads_that_the_mesh_does_not_divide_are_refused_before_anything_is_made():
    config = DecoderConfig(embed_dim=16, num_heads=4, num_kv_heads=1, mlp_dim=16, num_layers=1)
    model = build_model(config, vocab_size=32, platform="cpu", dtype=jnp.float32)
    tx = make_optimizer(OptimizerConfig(), 1000, model.axes)
    message = "mesh: expected tensor=2 to divide kv_heads=1, .*mesh.rules"
    with pytest.raises(UserError, match=message):
        state_spec(model, tx, layout_of(tensor=2), ema=False)
    state_spec(model, tx, layout_of(tensor=2, rules={"kv_heads": ()}), ema=False)


@functools.cache
def small():
    config = DecoderConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64,
                           vocab_size=64, qk_norm=True, init_std=0.1)
    model = build_model(config, vocab_size=64, platform="cpu", dtype=jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0))


def packed_batch(rows=8, length=16):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (rows, length + 1), dtype=np.int32)
    cut = rng.integers(3, length - 3, (rows, 1))
    at = np.arange(length)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
            "segment_ids": np.where(at >= length - 2, 0, 1 + (at >= cut)).astype(np.int32),
            "positions": np.where(at >= cut, at - cut, at).astype(np.int32),
            "loss_mask": np.broadcast_to(at < length - 2, (rows, length)).astype(np.float32)}


@functools.cache
def gradients(mesh):
    """The loss and the gradients on all devices in `mesh`, or on one device with "one"."""
    model, params = small()
    if mesh == "one":
        layout = make_layout(MeshConfig(), jax.devices()[:1])
    else:
        layout = layout_of(**MESHES[mesh])
    shardings = layout.tree(model.axes, model.shapes)
    params = jax.device_put(params, shardings)
    batch = jax.device_put(packed_batch(), layout.sharding(("batch", "seq")))
    loss_fn = next_token_loss(model, z_loss=1e-2, chunk=0 if "context" in mesh else 8)

    def mean(params, batch):
        with use_layout(layout):
            sums = loss_fn(params, batch, None)
        return sums.total / sums.weight

    step = jax.jit(jax.value_and_grad(mean), out_shardings=(layout.replicated, shardings))
    loss, grads = step(params, batch)
    return float(loss), jax.device_get(grads)


@pytest.mark.parametrize("mesh", [
    mesh if mesh in ("data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2")
    else pytest.param(mesh, marks=pytest.mark.long) for mesh in MESHES])
def test_every_mesh_computes_what_one_device_does(mesh):
    agree(*gradients(mesh))


def test_so_do_the_matmuls_and_rotations_for_tpu(monkeypatch):
    for module in (ops, positions):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    agree(*gradients.__wrapped__("data=2,fsdp=2,tensor=2"))


def agree(loss, grads):
    one_loss, one_grads = gradients("one")
    assert loss == pytest.approx(one_loss, rel=1e-5)
    for (name, a), b in zip(named_leaves(grads), jax.tree.leaves(one_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=name)


def test_a_device_holds_only_its_share_of_the_logits():
    """The batch is split 4 ways, the vocabulary 2 ways: no array holds a row's whole logits."""
    model, params = small()
    layout = layout_of(data=4, tensor=2)
    batch = jax.device_put(packed_batch(), layout.sharding(("batch", "seq")))
    loss_fn = next_token_loss(model)

    def total(params, batch):
        with use_layout(layout):
            return loss_fn(params, batch, None).total

    shardings = layout.tree(model.axes, model.shapes)
    step = jax.jit(jax.grad(total), out_shardings=shardings)
    text = step.lower(jax.device_put(params, shardings), batch).compile().as_text()
    assert "f32[2,16,32]" in text and "f32[2,16,64]" not in text and "f32[8,16" not in text


LAYERS, EMBED, HEADS, KV, DIM, MLP, VOCAB, POSITIONS = 2, 128, 4, 2, 32, 256, 512, 16


def hand_made(e, t):
    """The shape of every parameter on a device.

    The embed axis is split `e` ways, and the axes that tensor parallelism splits `t` ways.
    """
    block = {
        "attention/query/kernel": (LAYERS, EMBED // e, HEADS // t, DIM),
        "attention/query/bias": (LAYERS, HEADS, DIM),
        "attention/key/kernel": (LAYERS, EMBED // e, KV // t, DIM),
        "attention/key/bias": (LAYERS, KV, DIM),
        "attention/value/kernel": (LAYERS, EMBED // e, KV // t, DIM),
        "attention/value/bias": (LAYERS, KV, DIM),
        "attention/out/kernel": (LAYERS, HEADS // t, DIM, EMBED // e),
        "attention/out/bias": (LAYERS, EMBED),
        "attention_norm/scale": (LAYERS, EMBED), "attention_norm/bias": (LAYERS, EMBED),
        "mlp_norm/scale": (LAYERS, EMBED), "mlp_norm/bias": (LAYERS, EMBED),
        "mlp/up/kernel": (LAYERS, EMBED // e, MLP // t), "mlp/up/bias": (LAYERS, MLP),
        "mlp/down/kernel": (LAYERS, MLP // t, EMBED // e), "mlp/down/bias": (LAYERS, EMBED),
    }
    return {f"layers/block/{name}": shape for name, shape in block.items()} | {
        "embedding/table": (VOCAB // t, EMBED // e), "head/table": (VOCAB // t, EMBED // e),
        "positions/table": (POSITIONS, EMBED // e), "norm/scale": (EMBED,), "norm/bias": (EMBED,)}


def hand_made_optimizer(name, e, t):
    """The shapes of the optimizer's arrays on a device, without those of one element."""
    params = hand_made(e, t)
    matrices = {key for key in params if key.startswith("layers/") and key.endswith("kernel")}
    if name == "adamw":
        return [*params.values()] * 2
    if name == "muon":
        # One momentum per matrix, Adam's two moments for the rest, and three Newton-Schulz numbers.
        rest = [shape for key, shape in params.items() if key not in matrices]
        return [*params.values(), (3,), *rest]
    # Adafactor keeps rows and columns of a matrix with two sides of 128 or more, and a whole second
    # moment of the rest.
    factored = {"layers/block/mlp/up/kernel", "layers/block/mlp/down/kernel", "embedding/table",
                "head/table"}
    return [shape for key, shape in params.items() if key not in factored] + (
        2 * [(LAYERS, EMBED // e), (LAYERS, MLP // t)] + 2 * [(EMBED // e,), (VOCAB // t,)])


def held(tree, device):
    """The (name, shape, bytes) of each shard of `tree` on `device`, from the arrays themselves."""
    out = []
    for name, leaf in named_leaves(tree):
        (shard,) = (s for s in leaf.addressable_shards if s.device == device)
        out.append((name, shard.data.shape, shard.data.nbytes))
    return out


ZERO_3, MIXED = ("fsdp=8", (8, 1)), ("data=2,fsdp=2,tensor=2", (2, 2))  # mesh, ways of each split


@pytest.mark.parametrize("optimizer, mesh, cuts", [
    ("adamw", *MIXED),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("adamw", *ZERO_3), ("muon", *MIXED), ("muon", *ZERO_3), ("adafactor", *MIXED),
        ("adafactor", *ZERO_3)))])
def test_a_device_holds_what_the_rules_say_to_the_byte(optimizer, mesh, cuts):
    config = DecoderConfig(num_layers=LAYERS, embed_dim=EMBED, num_heads=HEADS, num_kv_heads=KV,
                           head_dim=DIM, mlp_dim=MLP, vocab_size=VOCAB, max_positions=POSITIONS,
                           positions="learned", norm="layernorm", mlp="gelu", use_bias=True)
    model = build_model(config, vocab_size=VOCAB, platform="cpu", dtype=jnp.float32)
    tx = make_optimizer(OptimizerConfig(name=optimizer), 1000, model.axes)
    spec = state_spec(model, tx, layout_of(**MESHES[mesh]), ema=True)
    state = spec.init(0)
    expected, moments = hand_made(*cuts), sorted(hand_made_optimizer(optimizer, *cuts))
    for device in jax.devices():
        for tree in (state.params, state.ema):
            found = held(tree, device)
            assert {name: shape for name, shape, _ in found} == expected
            size = sum(4 * int(np.prod(shape)) for shape in expected.values())
            assert sum(n for *_, n in found) == size
        found = held(state.opt_state, device)
        assert sorted(shape for _, shape, _ in found if np.prod(shape) > 1) == moments
        rest = [n for _, shape, n in found if np.prod(shape) == 1]
        assert max(rest) == 4  # counts, and placeholders of Adafactor
        size = sum(4 * int(np.prod(shape)) for shape in moments) + sum(rest)
        assert sum(n for *_, n in found) == size
    shardings = jax.tree.leaves(spec.shardings)
    for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
        assert leaf.sharding == sharding
