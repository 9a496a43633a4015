"""An error in one of two real processes ends both, at once, with one code and one line."""

import fcntl
import pathlib

import pytest
from processes import finish, finish_together, lines

from lmjax.training.checkpoint import checkpoint_steps

RUN = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2", "checkpoint.keep_last=9",
       "eval.every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for all tests, so that their runs share a cache of compiled programs."""
    return tmp_path_factory.mktemp("refusals")


def end_together(workdir: pathlib.Path, *overrides: str, expect: int, **options: object) -> str:
    """Returns the line that both of two processes end with."""
    printed = finish_together(workdir, *overrides, processes=2, devices=1, expect=expect,
                              timeout=60, **options)
    told = [line for line in printed.splitlines() if line.startswith("lmjax: error: ")]
    assert len(told) == 2 and told[0] == told[1], printed
    return told[0]


@pytest.mark.slow
def test_a_full_disk_and_then_a_checkpoint_that_one_process_cannot_read(folder):
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
    printed = finish_together(workdir, *RUN, processes=2, devices=1,
                              only={1: {"first": unreadable}})
    assert "resuming at step 2" in printed and "another process could not read it" in printed
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4, 6]
    # The checkpoint is kept under another name: another process may be able to read it.
    assert (workdir / "checkpoints" / "damaged-4").is_dir()
    assert [r["step"] for r in lines(workdir) if "loss" in r] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_bad_corpus(folder):
    line = end_together(folder / "corpus", "data.sources.0.uri=text:/nowhere/*.txt", expect=2,
                        config="configs/quickstart.py:tiny")
    assert "process 0" in line and "/nowhere/*.txt" in line


@pytest.mark.long
def test_a_config_that_one_process_alone_has_wrong(folder):
    """The option of process 1 comes last and counts; process 0 does not wait for it for long."""
    line = end_together(folder / "config", *RUN, expect=2,
                        only={1: {"more": ("train.steps=many",)}})
    assert "process 1" in line and "many" in line


@pytest.mark.slow
def test_a_directory_that_another_run_holds(folder):
    workdir = folder / "held"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process trains in" in end_together(workdir, *RUN, expect=1)
    assert [p.name for p in workdir.iterdir()] == [".lock"]


ONE_SLICE = {"MEGASCALE_COORDINATOR_ADDRESS": ""}
TWO_SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "slice-0.invalid", "MEGASCALE_NUM_SLICES": "2"}


@pytest.mark.parametrize("coordinator, env", [
    ("first.invalid", ONE_SLICE),
    pytest.param("slice-0.invalid", TWO_SLICES, marks=pytest.mark.long)])
def test_a_coordinator_whose_name_nobody_knows(coordinator, env, folder):
    """As on GKE before its DNS knows the name: JAX keeps looking it up without naming it."""
    on_a_tpu = """
from lmjax.runtime import cluster
from jax._src.clusters import cloud_tpu_cluster
cluster.running_in_cloud_tpu_vm = cloud_tpu_cluster.running_in_cloud_tpu_vm = True
"""
    env = {"JAX_PLATFORMS": "", "TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "1",
           "LMJAX_JOIN_SECONDS": "1", "TPU_WORKER_HOSTNAMES": "first.invalid,second.invalid", **env}
    printed = finish(folder / coordinator, *RUN, expect=1, first=on_a_tpu, env=env)
    assert (f"all processes at the coordinator {coordinator} within 1 s, got no answer"
            in printed)


@pytest.mark.slow
def test_an_error_that_nobody_foresaw(folder):
    """Process 1 fails while process 0, which runs the coordinator, waits in a collective."""
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
    # The checkpoint of step 4 was still being written, and is whole.
    assert checkpoint_steps(workdir / "checkpoints") == [2, 4]
