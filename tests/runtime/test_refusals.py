"""What one of two real processes refuses or fails at ends both, at once, with one code and one line."""

import fcntl
import pathlib

import pytest
from processes import finish, finish_together, lines

from lmjax.training.checkpoint import checkpoint_steps

RUN = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2", "checkpoint.keep_last=9", "eval.every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, so that the cache of compiled programs is."""
    return tmp_path_factory.mktemp("refusals")


def end_together(workdir: pathlib.Path, *overrides: str, expect: int, **options: object) -> str:
    """The line that both of two processes end with."""
    printed = finish_together(workdir, *overrides, processes=2, devices=1, expect=expect, timeout=60, **options)
    told = [line for line in printed.splitlines() if line.startswith("lmjax: error: ")]
    assert len(told) == 2 and told[0] == told[1], printed
    return told[0]


@pytest.mark.long
def test_a_disk_without_room_and_then_a_checkpoint_that_one_process_cannot_read(folder):
    workdir = folder / "full"
    full_later = """
import shutil
usage = shutil.disk_usage("/")
free = iter([1 << 40, 1 << 40, 10])  # at steps 2, 4 and 6
shutil.disk_usage = lambda path: usage._replace(free=next(free))
"""
    line = end_together(workdir, *RUN, expect=2, only={0: {"first": full_later}})
    assert "process 0" in line and "MB free" in line
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4]
    unreadable = """
import orbax.checkpoint as ocp
restore = ocp.StandardCheckpointHandler.restore
def fail(self, path, *args, **kwargs):
    if path.parent.name == "4":
        raise OSError("a cable is loose")
    return restore(self, path, *args, **kwargs)
ocp.StandardCheckpointHandler.restore = fail
"""
    printed = finish_together(workdir, *RUN, processes=2, devices=1, only={1: {"first": unreadable}})
    assert "resuming at step 2" in printed and "another process could not read it" in printed
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4, 6]
    assert (workdir / "checkpoints" / "damaged-4").is_dir()  # as it was: for another process it may be whole
    assert [r["step"] for r in lines(workdir) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_bad_corpus(folder):
    line = end_together(folder / "corpus", "data.sources.0.uri=text:/nowhere/*.txt", expect=2,
                        config="configs/quickstart.py:tiny")
    assert "process 0" in line and "/nowhere/*.txt" in line


def test_a_config_that_one_process_alone_has_wrong(folder):
    """Its option comes last and wins; the other waits for nothing that will not come."""
    line = end_together(folder / "config", *RUN, expect=2, only={1: {"more": ("train.steps=many",)}})
    assert "process 1" in line and "many" in line


def test_a_directory_that_another_run_holds(folder):
    workdir = folder / "held"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process trains in" in end_together(workdir, *RUN, expect=1)
    assert [p.name for p in workdir.iterdir()] == [".lock"]


def test_a_coordinator_whose_name_nobody_knows(folder):
    """As on GKE before its DNS has the name: JAX looks it up over and over, and has not told which it is."""
    on_a_tpu = """
from lmjax.runtime import distributed
from jax._src.clusters import cloud_tpu_cluster
distributed.running_in_cloud_tpu_vm = cloud_tpu_cluster.running_in_cloud_tpu_vm = True
"""
    env = {"JAX_PLATFORMS": "", "TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "1", "LMJAX_JOIN_SECONDS": "1",
           "TPU_WORKER_HOSTNAMES": "first.invalid,second.invalid", "MEGASCALE_COORDINATOR_ADDRESS": ""}  # no metadata
    for named, more in (("first.invalid", {}), ("slice-0.invalid", {
            "MEGASCALE_COORDINATOR_ADDRESS": "slice-0.invalid", "MEGASCALE_NUM_SLICES": "2"})):
        printed = finish(folder / named, *RUN, expect=1, first=on_a_tpu, env=env | more)
        assert f"all processes at the coordinator {named} within 1 s, got no answer" in printed


def test_an_error_that_nobody_foresaw(folder):
    """The other process holds the coordinator and waits for this one in a collective."""
    workdir = folder / "broken"
    broken = """
from lmjax.training.records import Records
log_step = Records.log_step
def fail(self, step, metrics):
    if step == 5:
        raise ZeroDivisionError("a fault of the machine")
    log_step(self, step, metrics)
Records.log_step = fail
"""
    line = end_together(workdir, *RUN, expect=1, only={1: {"first": broken}})
    assert "process 1: ZeroDivisionError: a fault of the machine" in line
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4]  # the one that was being written is whole
