"""One flipped bit on one device is found and undone, and never ends up in a checkpoint."""

import jax
import numpy as np
import pytest
from processes import final_checksums, lines, run_here

from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training import loop
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.table import make_optimizer
from lmjax.training.replicas import differing, hashes, replicated
from lmjax.training.state import state_spec
from lmjax.tree import named_leaves

pytestmark = pytest.mark.long

MODEL = DecoderConfig(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=16)
MESHES = {"eight": dict(data=8), "two": dict(data=2, fsdp=2, tensor=2), "one": dict(data=1, fsdp=8)}


def flipped(x, place, element, bit):
    """x with one bit of one element changed on one device of its mesh, by its place there."""
    device = x.sharding.mesh.devices.flat[place]
    parts = {shard.device: shard.data for shard in x.addressable_shards}
    part = np.array(parts[device])
    bits = part.reshape(-1).view(np.uint32)
    bits[element % bits.size] ^= np.uint32(1 << bit)
    parts[device] = jax.device_put(part, device)
    return jax.make_array_from_single_device_arrays(
        x.shape, x.sharding, [parts[shard.device] for shard in x.addressable_shards])


def with_flip(state, name, place, element=0, bit=3):
    leaves, tree = jax.tree.flatten(state)
    names = [path for path, _ in named_leaves(state)]
    leaves[names.index(name)] = flipped(leaves[names.index(name)], place, element, bit)
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module", params=MESHES)
def state(request):
    layout = make_layout(MeshConfig(**MESHES[request.param]), jax.devices())
    model = build_model(MODEL, vocab_size=32, platform="cpu", dtype="float32")
    tx = make_optimizer(OptimizerConfig(warmup_steps=1), 10, model.axes)
    spec = state_spec(model, tx, layout, ema=True)
    return spec.init(0)


def test_every_flipped_bit_is_named(state):
    """100 random ones, in weights, moments and averages; and none where there is none."""
    assert differing(hashes(state), state) == []
    random, arrays = np.random.default_rng(0), replicated(state)
    for _ in range(100):
        array = arrays[random.integers(len(arrays))]
        group = array.groups[random.integers(len(array.groups))]
        place = group[random.integers(len(group))]
        bad = differing(hashes(with_flip(state, array.name, place, random.integers(10**6),
                                         random.integers(31))), state)
        devices = [item.device.id for item in bad]
        flat = state.step.sharding.mesh.devices.flat
        assert {item.array for item in bad} == {array.name}
        assert devices == ([flat[place].id] if len(group) > 2 else [flat[p].id for p in group])
        assert all(item.is_sure == (len(group) > 2) for item in bad)


@pytest.mark.parametrize("mesh", [pytest.param("eight", marks=pytest.mark.slow), "two"])
def test_a_run_undoes_it_and_ends_with_the_same_bits(tmp_path, monkeypatch, capsys, mesh):
    """Found by the comparison of step 6, and by that before the save of step 9."""
    runs = ("train.steps=12", "optimizer.warmup_steps=2", "checkpoint.every=3", "eval.every=0",
            "checkpoint.keep_last=9", "watch.compare_every=2",
            *(f"mesh.{axis}={n}" for axis, n in MESHES[mesh].items()))
    assert run_here(tmp_path / "straight", *runs) == 0
    assert "replica_differs" not in (tmp_path / "straight/timing.jsonl").read_text()
    compiled = loop._compile

    def wrapped(run):
        step, calls = compiled(run), iter(range(1, 10**6))

        def spoilt(state, batch):
            state, metrics = step(state, batch)
            call = next(calls)  # call 10 is step 7, as step 6 leads back to step 3
            if call == 6:
                state = with_flip(state, "params/norm/scale", 5)
            if call == 12:
                state = with_flip(state, "params/layers/block/mlp/up/kernel", 1)
            return state, metrics

        return spoilt

    monkeypatch.setattr(loop, "_compile", wrapped)
    assert run_here(tmp_path / "run", *runs) == 0
    said = capsys.readouterr().err
    found = [line for line in lines(tmp_path / "run", "timing.jsonl")
             if line.get("event") == "replica_differs"]
    first, *rest = found
    assert (first["step"], first["array"], first["majority"]) == (6, "params/norm/scale", True)
    place = jax.devices()  # `data=8` and `data=2,fsdp=2,tensor=2` keep the order of the devices
    assert first["device"] == place[5].id and first["process"] == 0
    assert {line["step"] for line in rest} == {9}
    assert place[1].id in {line["device"] for line in rest if line["array"].endswith("up/kernel")}
    assert "went back to step 3" in said and "went back to step 6" in said
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [3, 6, 9, 12]
    assert final_checksums(tmp_path / "run") == final_checksums(tmp_path / "straight")
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")
