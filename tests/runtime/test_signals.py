"""A signal that has to act at once does so, whatever the main thread is doing."""

import pathlib
import signal
import time

import pytest
from processes import FINISHED, start, wait_for

# `hold` never returns, and no signal ends it: it locks a mutex that it has locked.
HOLD = """
import ctypes, pathlib
def hold():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    pathlib.Path({workdir!r} + ".held").touch()
    libc.pthread_mutex_lock(mutex)
"""
STAGES = {  # what holds a run, how many signals end it
    "restoring": ("import lmjax.training.setup as m\nm.begin = lambda *args: hold()", 1),
    "compiling": ("import lmjax.training.loop as m\nm._compile = lambda run: hold()", 1),
    "waiting for data": ("from lmjax.training.records import Records\n"
                         "Records.next_batch = lambda *args: hold()", 2),
    "saving": ("import lmjax.training.loop as m\nm._save = lambda *args, **kwargs: hold()", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_stuck_ends_within_seconds(tmp_path, stage, number):
    workdir, (patch, signals) = tmp_path / "run", STAGES[stage]
    process = start(workdir, *FINISHED, first=HOLD.format(workdir=str(workdir)) + patch)
    try:
        wait_for(process, pathlib.Path(f"{workdir}.held").exists)
        for _ in range(signals):
            assert process.poll() is None, "the first signal lets a run save"
            process.send_signal(number)
            time.sleep(0.5)
        began = time.monotonic()
        assert process.wait(timeout=40) == 128 + number
        assert time.monotonic() - began < 30
    finally:
        process.kill()
