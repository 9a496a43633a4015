"""A signal that has to act at once does so, whatever the main thread is doing.

Compiling, restoring and reading data are such calls. Here it is a mutex that is locked twice.
"""

import signal
import subprocess
import sys
import time

import pytest

HELD = """
import ctypes, sys
from lmjax.runtime.signals import stop_signal
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with stop_signal() as stop:
    if sys.argv[1] == "training":
        stop.defer()
    libc.pthread_mutex_lock(mutex)
    print("held", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage, signals", [("setting up", 1), ("training", 2)])
def test_a_process_that_is_stuck_ends_within_seconds(stage, signals, number):
    process = subprocess.Popen([sys.executable, "-c", HELD, stage], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    try:
        for _ in range(signals):
            assert process.poll() is None, "the first signal lets a run save its step"
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(timeout=30) == 128 + number
    finally:
        process.kill()
        process.stdout.close()
