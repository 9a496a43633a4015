"""The same run on one device, on eight, on two real processes, and moved between these."""

import os
import pathlib
import shutil
import signal
import sysconfig

import jax
import numpy as np
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster
from processes import (
    finish,
    finish_together,
    lines,
    losses,
    run_here,
    start,
    start_together,
    wait_for,
)

from lmjax.runtime import cluster
from lmjax.training.checkpoint import checkpoint_steps

RUN = ("train.steps=32", "optimizer.warmup_steps=2", "train.batch_size=16", "checkpoint.every=8",
       "checkpoint.keep_last=5", "eval.every=16", "eval.batches=0",
       "data.sources.0.uri=synthetic:500", "model.dropout=0.1")
MESHES = {
    "data": ("mesh.data=8",),
    "fsdp": ("mesh.fsdp=8",),
    "mixed": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
}
TWO_PROCESSES = ("mesh.data=2", "mesh.fsdp=4")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The directory of the run on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(workdir, *RUN, devices=1)
    return workdir


@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.slow),
                                  pytest.param("fsdp", marks=pytest.mark.slow),
                                  pytest.param("mixed", marks=pytest.mark.long)])
def test_eight_devices_compute_what_one_does(one, tmp_path, mesh):
    workdir = tmp_path / "run"  # in this process, which has eight devices
    assert run_here(workdir, *RUN, *MESHES[mesh]) == 0
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(one, tmp_path):
    finish_together(tmp_path / "run", *RUN, *TWO_PROCESSES, processes=2, devices=4)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)
    assert [r["step"] for r in lines(tmp_path / "run")] == [r["step"] for r in lines(one)]


SLOWLY = """
import os, time
from lmjax.training.records import Records
os.environ["LMJAX_STOPPED_CODE"] = "75"
log_step = Records.log_step
def log_slowly(self, step, metrics):
    time.sleep(0.1)
    log_step(self, step, metrics)
Records.log_step = log_slowly
"""


@pytest.mark.long
def test_sigterm_to_one_of_two_processes_stops_both(one, tmp_path):
    """Pre-emption hits one host: the processes agree on a step, save it, and exit with one code.

    Until then they compute the same as one process.
    """
    workdir = tmp_path / "run"
    running = start_together(workdir, *RUN, *TWO_PROCESSES, processes=2, devices=4, first=SLOWLY)
    wait_for(running[0], lambda: len(lines(workdir)) >= 3)
    running[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in running]
    assert codes == [75, 75], pathlib.Path(f"{workdir}.log").read_text()
    saved = checkpoint_steps(workdir / "checkpoints")[-1]
    steps = [record["step"] for record in lines(workdir) if "loss" in record]
    assert steps == [*range(1, saved + 1)] and saved < 32
    found = [record["loss"] for record in lines(workdir) if "loss" in record]
    np.testing.assert_allclose(found, losses(one)[:saved], rtol=1e-5)


EXPERTS = ("data.sources.0.uri=synthetic:500", "train.steps=8", "eval.every=4", "eval.batches=0",
           "checkpoint.every=8", "sample.every=0", "optimizer.warmup_steps=2")
ALL_AXES = {  # -> processes, devices of each, mesh; the first mesh axes cross the processes
    "stages on two processes": (2, 4, ("mesh.stage=2", "mesh.expert=2", "mesh.tensor=2")),
    "experts on two processes": (2, 2, ("mesh.expert=4",)),
    "stages and experts on four processes": (
        4, 2, ("mesh.stage=2", "mesh.expert=2", "mesh.context=2")),
    "rows and weights on four processes": (
        4, 2, ("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2")),
}


@pytest.fixture(scope="module")
def one_with_experts(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("experts") / "run"
    finish(workdir, *EXPERTS, config="configs/moe.py:tiny", devices=1)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("split", ALL_AXES)
def test_any_axis_may_cross_processes(split, one_with_experts, tmp_path):
    processes, devices, mesh = ALL_AXES[split]
    finish_together(tmp_path / "run", *EXPERTS, *mesh, processes=processes, devices=devices,
                    config="configs/moe.py:tiny")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one_with_experts), rtol=1e-5)


@pytest.mark.long
def test_two_processes_read_text_as_one_does(tmp_path):
    text = (f"data.sources.0.uri=text:{sysconfig.get_paths()['stdlib']}/email/*.py",
            "train.steps=6", "eval.every=3", "checkpoint.every=6", "sample.every=0",
            "optimizer.warmup_steps=2", "data.heldout_fraction=0.2")
    config = "configs/quickstart.py:tiny"
    finish(tmp_path / "one", *text, config=config)
    finish_together(tmp_path / "two", *text, "mesh.fsdp=2", processes=2, devices=1, config=config)
    assert len(losses(tmp_path / "one")) == 8
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.long
def test_a_run_goes_on_with_another_mesh(one, tmp_path):
    """From step 8 of one device, in this process, which has eight."""
    workdir = tmp_path / "run"
    shutil.copytree(one, workdir)
    for step in checkpoint_steps(workdir / "checkpoints")[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert run_here(workdir, *RUN, *MESHES["fsdp"], "checkpoint.abandon=32") == 0
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)
    resumed, = (record["step"] for record in lines(workdir, "timing.jsonl")
                if record.get("event") == "resume")
    assert resumed == 8 and checkpoint_steps(workdir / "checkpoints")[-1] == 32


@pytest.mark.slow
def test_a_run_moves_between_machines(one, tmp_path):
    """One run, first on one device, then on two meshes, then on two processes: the same losses."""
    workdir = tmp_path / "run"

    def leave_at(step: int, *overrides: str, devices: int) -> None:
        process = start(workdir, *RUN, *overrides, devices=devices)
        wait_for(process, lambda: step in checkpoint_steps(workdir / "checkpoints"))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    leave_at(8, devices=1)
    leave_at(16, *MESHES["fsdp"], devices=8)
    leave_at(24, *MESHES["mixed"], devices=8)
    finish_together(workdir, *RUN, *TWO_PROCESSES, processes=2, devices=4)
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)
    resumed = [record["step"] for record in lines(workdir, "timing.jsonl")
               if record.get("event") == "resume"]
    assert len(resumed) == 3 and resumed == sorted(set(resumed)) and resumed[-1] < 32, resumed


# GKE's plugin sets these variables.
GKE = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a.svc,b.svc"}
GKE_ONE_HOST = GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
SLICE_1_OF_2 = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
SLURM = {"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
METADATA = {  # of a Cloud TPU VM
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2,a:b:10.0.0.3",
    "tpu-env": "ZONE: 'us-west4-a'"}
# where -> whether the host has TPU chips, its environment, and (coordinator, number of processes,
# own number), or None if the process runs alone
WHO_JOINS = {
    "a slice on GKE": (True, GKE, ("a.svc:8482", 2, 1)),
    "two slices on GKE": (
        True, GKE | SLICE_1_OF_2 | {"MEGASCALE_COORDINATOR_ADDRESS": "s0.svc:8080"},
        ("s0.svc:8482", 4, 3)),
    "two slices of one host each": (
        True, GKE_ONE_HOST | SLICE_1_OF_2 | {"MEGASCALE_COORDINATOR_ADDRESS": "s0.svc"},
        ("s0.svc:8482", 2, 1)),
    "one host on GKE": (True, GKE_ONE_HOST, None),
    "lmjax plan on GKE": (True, GKE | {"JAX_PLATFORMS": "cpu"}, None),
    "a Cloud TPU": (True, {}, ("10.0.0.1:8482", 3, 2)),
    "tests on a Cloud TPU": (True, {"JAX_PLATFORMS": "cpu"}, None),
    "chips without metadata": (True, {"TPU_SKIP_MDS_QUERY": "1"}, None),
    "Slurm": (False, SLURM, ("node3:61440", 2, 1)),
    "one task of Slurm": (False, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    "libtpu and no chips": (
        False, {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, None),
    "a laptop": (False, {}, None),
}


@pytest.mark.parametrize("where", WHO_JOINS)
def test_who_joins(where, monkeypatch):
    """JAX's own detection decides; only the services that it asks are replaced."""
    chips, env, expected = WHO_JOINS[where]
    detected = ("TPU_", "MEGASCALE_", "SLURM_", "JAX_PLATFORMS")
    for name in [name for name in os.environ if name.startswith(detected)]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", chips)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", chips)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (METADATA[key], 200))
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.1")
    joined = []

    def initialize(local_device_ids, initialization_timeout):
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
        joined.append(found[:3])

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert cluster.join() == bool(expected)
    assert joined == ([expected] if expected else [])
