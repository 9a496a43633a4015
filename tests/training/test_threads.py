"""A failure in a background thread ends real processes at once, with its documented exit code."""

import errno
import os
import time

import jax
import pytest
from processes import FINISHED, finish, one_line

from lmjax.cli.errors import explain
from lmjax.monitoring.profiling import Profiler
from lmjax.runtime.files import when_full
from lmjax.training.checkpoint import checkpoint_steps

# What happens in a process once step 4 is logged: `strike(workdir)`.
AFTER_STEP_4 = """
import os
from lmjax.training.records import Records
log_step = Records.log_step
def log(self, step, metrics):
    log_step(self, step, metrics)
    if step == 4:
        self.run.checkpointer.wait()
        strike(self.run.workdir)
Records.log_step = log
"""
READ_ONLY = """
makedirs = os.makedirs
def strike(workdir):
    def fails(path, *args, **kwargs):
        if str(path).startswith(str(workdir / "checkpoints")):
            raise OSError(30, os.strerror(30), str(path))
        makedirs(path, *args, **kwargs)
    os.makedirs = fails
"""
LIMIT = """
def strike(workdir):
    import resource
    resource.setrlimit(resource.RLIMIT_{0}, ({1}, resource.getrlimit(resource.RLIMIT_{0})[1]))
"""
WATCHDOG = """
from lmjax.runtime import distributed
def strike(place):
    raise {0}
distributed.tell = strike
"""
COMMIT = """
from orbax.checkpoint._src.checkpointers import async_checkpointer
def strike(*args, **kwargs):
    raise OSError({0}, os.strerror({0}))
import os
async_checkpointer._background_wait_for_commit_futures = strike
"""
FAILURES = {  # what the process runs first, overrides, exit code, words of the line
    "a directory that becomes read-only": (AFTER_STEP_4 + READ_ONLY, (), 2, "Read-only"),
    "a limit of file sizes": (AFTER_STEP_4 + LIMIT.format("FSIZE", 20000), (), 2, "ulimit -f"),
    "a limit of open files": (
        AFTER_STEP_4 + LIMIT.format("NOFILE", "len(os.listdir('/proc/self/fd')) + 1"), (), 2,
        "ulimit -n"),
    "a quota": (COMMIT.format(errno.EDQUOT), (), 2, "room"),
    "a disk that fails": (COMMIT.format(errno.EIO), (), 1, "check the disk"),
    "the watchdog, by the disk": (WATCHDOG.format("OSError(5, 'disk')"), ("watch.stall_seconds=2",),
                                  1, "lmjax-watchdog"),
    "the watchdog, by a fault": (WATCHDOG.format("KeyError('fault')"), ("watch.stall_seconds=2",),
                                 1, "lmjax-watchdog"),
}

LONG = ("a directory that becomes read-only", "a disk that fails", "the watchdog, by a fault")


@pytest.mark.long
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in LONG else pytest.mark.slow) for name in FAILURES])
def test_a_failure_of_a_thread_ends_the_process(name, tmp_path):
    first, overrides, code, words = FAILURES[name]
    began = time.monotonic()
    printed = finish(tmp_path / "run", *FINISHED, "train.steps=100000", *overrides, first=first,
                     expect=code)
    assert words in one_line(printed) and "_SignalingThread" not in printed
    assert time.monotonic() - began < 60, "Orbax's own threads wait for ten minutes"
    if AFTER_STEP_4 in first:
        assert 2 in checkpoint_steps(tmp_path / "run/checkpoints")


@pytest.mark.long
def test_a_save_that_fails_is_known_at_the_next_step(tmp_path):
    printed = finish(tmp_path / "run", *FINISHED, "checkpoint.every=300", "train.steps=100000",
                     first=COMMIT.format(errno.EIO),
                     expect=1)
    assert "Input/output error" in one_line(printed)
    last = [line for line in printed.splitlines() if line.startswith("step ")][-1]
    assert int(last.split()[1].split("/")[0]) < 600, "the next save would be there"


@pytest.mark.parametrize("number, code, fix", [
    (errno.EROFS, 2, "permissions"), (errno.EACCES, 2, "permissions"), (errno.ENOSPC, 2, "room"),
    (errno.EDQUOT, 2, "room"), (errno.EFBIG, 2, "ulimit -f"), (errno.EMFILE, 2, "ulimit -n"),
    (errno.EIO, 1, "check the disk"), (errno.ESTALE, 1, "check the disk")])
def test_the_systems_error_is_known_in_the_words_of_a_library(number, code, fix):
    """TensorStore raises ValueError, and calls too many open files an exhausted resource."""
    error = ValueError('RESOURCE_EXHAUSTED: Error writing local file "/x/y": Failed to open: "/x": '
                       f"{os.strerror(number)} [os_error_code='{number}']")
    found, line = explain(error)
    assert found == code and fix in line and os.strerror(number) in line and "/x/y" in line
    full = OSError(errno.ENOSPC, "expected room, got none")
    with pytest.raises(OSError if fix == "room" else ValueError):
        with when_full(full):
            raise error


def test_a_trace_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device")

    profiler = Profiler("1:1", tmp_path)
    profiler.before(1)
    with monkeypatch.context() as patch:  # a real failure would leave JAX's profiler on
        patch.setattr(jax.profiler, "stop_trace", fails)
        assert "watch.profile: expected a trace" in profiler.after(1, None)
    assert profiler.close() == ""
    jax.profiler.stop_trace()


@pytest.mark.slow
def test_a_run_survives_its_trace(tmp_path):
    """What the file in the way makes JAX raise is real here."""
    way = "\ndef strike(workdir):\n    (workdir / 'profile').write_text('in the way')\n"
    printed = finish(tmp_path / "run", *FINISHED, "watch.profile=5:6", first=AFTER_STEP_4 + way)
    assert "step 6: watch.profile: expected a trace" in printed and "is not a directory" in printed
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2, 4, 6]
