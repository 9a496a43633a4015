"""The watchdog ends a run that hangs, and names the process that the others wait for."""

import pathlib
import time

import pytest
from processes import finish, finish_together

from lmjax.config import load
from lmjax.monitoring.watchdog import slowest
from lmjax.runtime.distributed import Place
from lmjax.training.recipe import build_recipe

SHORT = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2", "eval.every=3",
         "eval.batches=1")


def test_the_slowest_process_is_named():
    places = {0: (Place(12, 8, "running the step"), "a"),
              1: (Place(9, 7, "waiting for data"), "b"),
              2: (Place(12, 8, "running the step"), "c")}
    assert slowest(places) == (
        "process 1 (b) is waiting for data at step 7, and late: 2 of 3 processes are further, at "
        "step 8")
    del places[1]
    assert slowest(places) == ("process 0 (a) is running the step at step 8; "
                               "process 2 (c) is running the step at step 8")


HANGS = {  # activity -> Python that makes it hang
    "setting up": "loop.set_up = hang",
    "preparing data": "setup._data = hang",
    "restoring a checkpoint": "setup.begin = hang",
    "compiling": "loop._compile = hang",
    "saving checkpoints": "checkpoint.Checkpointer.wait = hang",
}

LONG = ("compiling", "saving checkpoints")


@pytest.mark.long
@pytest.mark.parametrize("doing", [
    pytest.param(name, marks=() if name in LONG else pytest.mark.slow)
    for name in HANGS])
def test_a_run_that_hangs_outside_its_steps(doing, tmp_path):
    """Each activity may take as long as its own patience, which is longer than that of a step."""
    hang = f"""
import time
from lmjax.monitoring import watchdog
from lmjax.training import checkpoint, loop, setup
def hang(*args): time.sleep(600)
{HANGS[doing]}
watchdog.GRACE_SECONDS = 1.0
watchdog.PATIENCE = dict.fromkeys(watchdog.PATIENCE, 3600.0) | {{{doing!r}: 3.0}}
"""
    began = time.monotonic()
    printed = finish(tmp_path / "run", *SHORT, "watch.stall_seconds=1.5", expect=1, first=hang)
    assert time.monotonic() - began < 100
    assert f"expected {doing} to end within 3 s, got no end in" in printed
    assert f"is {doing} at step" in printed
    assert "in hang" in (tmp_path / "run/stall-0.txt").read_text()


def test_recipes_for_pods_are_watched():
    assert build_recipe(load("configs/llama2_7b.py", [])).watch.stall_seconds == 1800


@pytest.mark.slow
def test_one_of_two_processes_hangs(tmp_path: pathlib.Path):
    """Both write their stacks and end with a line that names the one whose data does not come."""
    hangs_at_4 = """
import time
from lmjax.training import loop
make = loop.make_batches
def wait_for_ever():
    time.sleep(600)
def stuck(*args, **kwargs):
    for number, batch in enumerate(make(*args, **kwargs), 1):
        if number == 4:
            wait_for_ever()
        yield batch
loop.make_batches = stuck
"""
    printed = finish_together(tmp_path / "run", "watch.stall_seconds=3", processes=2, devices=1,
                              expect=1, timeout=120, only={1: {"first": hangs_at_4}})
    told = [line for line in printed.splitlines() if line.startswith("lmjax: error: ")]
    assert len(told) == 2 and told[0] == told[1], printed
    assert "expected a step to end within 3 s" in told[0]
    assert "is waiting for data at step 4, and late" in told[0]
    assert "process 1 (" in told[0] and "process 0" not in told[0]
    assert "wait_for_ever" in (tmp_path / "run/stall-1.txt").read_text()
    assert "wait_for_ever" not in (tmp_path / "run/stall-0.txt").read_text() != ""


@pytest.mark.slow  # waits until the thread that needs no Python ends the process
def test_a_process_that_cannot_run_python_any_more(tmp_path):
    stuck = """
import ctypes
from lmjax.monitoring import watchdog
from lmjax.training.records import Records
watchdog.GRACE_SECONDS = 1.0
log_step = Records.log_step
def hold(self, step, metrics):
    if step == 3:
        ctypes.PyDLL(None).sleep(600)  # keeps Python's lock
    log_step(self, step, metrics)
Records.log_step = hold
"""
    printed = finish(tmp_path / "run", "watch.stall_seconds=2", expect=1, first=stuck)
    assert "Timeout (0:00:04)!" in printed and "in hold" in printed
