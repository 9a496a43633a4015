"""Chips and topologies, and what `launch/gpu_check` reports of a GPU."""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from lmjax.runtime.chips import CHIPS, parse_topology, peak_flops

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu_check():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(ROOT / "launch/gpu_check"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, millions", [("124M", 124), ("350M", 355), ("1B", 1056)])
def test_gpu_check_times_models_of_the_stated_size(gpu_check, name, millions):
    from lmjax.models.model import build_model
    from lmjax.tree import num_elements

    recipe = gpu_check.recipe(name)
    model = build_model(recipe.model, vocab_size=0, platform="gpu", dtype=recipe.train.dtype("gpu"),
                        seq_len=recipe.data.seq_len)
    assert round(num_elements(model.shapes) / 1e6) == millions
    assert model.kernel.name == "cudnn" and str(model.dtype) == "bfloat16"
    pytest.importorskip("torch")
    from lmjax.benchmarks.torch_step import lacking

    assert not lacking(model.config)


@pytest.mark.slow  # runs PyTorch and a test run of its own
def test_gpu_check_runs_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launch/gpu_check", "--tiny", "--seconds", "1", "--out", tmp_path / "gpu.json"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert re.match(r"\d+ passed", report["tests"])
    row = report["sizes"]["tiny"]
    for who in ("lmjax", "PyTorch"):
        assert row[who]["mfu"] is None and row[who]["model_flops_per_second"] > 0
        assert row[who]["tokens_per_second"] == pytest.approx(2 * 32 / row[who]["step_seconds"])
    assert row["rounds"] >= 3 and len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("kind, flops", [
    ("TPU v5 lite", CHIPS["v5e"].flops), ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v6 lite", CHIPS["v6e"].flops), ("TPU7x", 2307e12 / 2), ("TPU v4", CHIPS["v4"].flops),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200 NVL", 836e12), ("NVIDIA H200", 989e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA RTX A1000", None), ("cpu", None)])
def test_peaks(kind, flops):
    assert peak_flops(kind) == flops


@pytest.mark.parametrize("topology, hosts", [
    ("v5e:1x1", (1, 1)), ("v5e:2x2", (1, 4)), ("v6e:2x4", (1, 8)), ("v5e:4x4", (4, 4)),
    ("2xv6e:16x16", (64, 4)), ("v4:2x2x1", (1, 4)), ("v5p:2x2x2", (2, 4)),
    ("v5p:4x4x12", (48, 4)), ("tpu7x:2x2x1", (1, 4)), ("tpu7x:4x4x8", (32, 4))])
def test_hosts_of_a_slice(topology, hosts):
    assert parse_topology(topology).hosts == hosts


@pytest.mark.parametrize("topology", [
    "v5e:1x2", "v5e:3x5", "v5e:2x5", "v5e:2x8", "v6e:8x4", "v5p:1x1x1", "v5p:3x3x3", "v5p:2x2x16",
    "v5p:8x4x4"])
def test_shapes_that_nobody_offers(topology):
    """A program compiles for them, but no launcher may ask for them."""
    with pytest.raises(ValueError, match="--topology: expected a slice"):
        _ = parse_topology(topology).hosts


@pytest.mark.slow  # loads the TPU compiler
@pytest.mark.parametrize("topology", ["v5e:4x4", "2xv6e:4x4", "2xv5p:2x2x2", "v4:2x2x2",
                                      "tpu7x:2x2x1"])
def test_the_compiler_takes_the_flags(topology):
    """libtpu ends the process if it does not know a flag."""
    pytest.importorskip("libtpu")
    program = f"""
import os
from lmjax.runtime.chips import parse_topology, tpu_compiler
topology = parse_topology({topology!r})
tpu_compiler()
os.environ["LIBTPU_INIT_ARGS"] = topology.flags + os.environ.get("MORE", "")
import jax
from lmjax.planning.measure import topology_devices
sharding = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])
x = jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=sharding)
print(jax.jit(lambda x: x @ x).lower(x).compile().as_text()[:9])
"""
    for more, works in (("", True), (" --xla_no_such_flag=1", False)):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                              text=True, env={**os.environ, "MORE": more})
        assert (done.stdout.strip() == "HloModule") == works, done.stdout + done.stderr


@pytest.mark.parametrize("text, shape, chips", [
    ("v5e:16x16", (16, 16), 256), ("v5e-256", (16, 16), 256), ("v5litepod-8", (2, 4), 8),
    ("v6e-32", (4, 8), 32), ("v5p-128", (4, 4, 4), 64), ("v5p-8", (2, 2, 1), 4),
    ("v5p-2048", (8, 8, 16), 1024), ("v4:2x2x4", (2, 2, 4), 16), ("2xv5e:4x4", (4, 4), 32),
    ("v5p:16x16x24", (16, 16, 24), 6144), ("tpu7x-64", (2, 4, 4), 32),
    ("tpu7x:2x2x1", (2, 2, 1), 4), ("v7x-8", (2, 2, 1), 4), ("2xtpu7x-256", (4, 4, 8), 256)])
def test_topologies_by_name(text, shape, chips):
    found = parse_topology(text)
    assert (found.shape, found.chips) == (shape, chips)
    assert parse_topology(str(found)) == found


def test_devices_of_a_topology():
    """Product names count cores; a tpu7x chip has two devices of JAX, any other chip has one."""
    assert parse_topology("tpu7x-64").devices == 64
    assert parse_topology("2xtpu7x:2x2x1").devices == 16
    assert parse_topology("v5p-128").devices == 64


@pytest.mark.parametrize("text", ["v9x-8", "tpu7x-3", "v5e", "v5e:16", "v5e:17x1", "v5p-12",
                                  "v5e-512", "0xv5e:2x2", "0xv5e-16", "v5p-1", "tpu v5e-8"])
def test_topologies_that_do_not_exist(text):
    with pytest.raises(ValueError, match="--topology: expected one such as .*, got .*; correct it"):
        parse_topology(text)


@pytest.mark.parametrize("text, meant", [("v5e-16x16", "v5e:16x16"),
                                         ("2xv5litepod-4x4", "2xv5litepod:4x4"),
                                         ("tpu7x-2x2x1", "tpu7x:2x2x1")])
def test_a_shape_after_a_hyphen_is_told_from_a_product(text, meant):
    with pytest.raises(ValueError, match=rf"got '{text}'; did you mean {meant}\?"):
        parse_topology(text)
    assert parse_topology(meant)
