"""Watching a run: the account of its time over restarts, traces, HLO, a watchdog that names who is late."""

import json
import pathlib
import re
import time

import numpy as np
import pytest
from processes import finish, finish_together, lines

from lmjax.monitoring.goodput import KINDS, Ledger, account, goodput_line
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.watch import Trace, late
from lmjax.runtime.distributed import Place

pytestmark = pytest.mark.long

SHORT = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2", "eval.every=3", "eval.batches=1")


def test_the_account_of_runs_that_are_killed_again_and_again():
    """Against a record of every single second: which step it went to, and whether that step was done again."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        now, step, rows, truth = 1000.0, 0, [], []  # truth: (kind, seconds, step)
        while step < 40:
            begin, saved = now, step
            truth = [("redone" if kind == "useful" and of > saved else kind, s, of) for kind, s, of in truth]
            setup, restore = rng.uniform(1, 3, 2)
            now += setup + restore
            rows.append({"step": step, "at": now, "start": now - begin, "restore": restore})
            truth += [("setup", setup, 0), ("restore", restore, 0)]
            for _ in range(rng.integers(1, 6)):  # rows of this start
                spent = dict.fromkeys(("useful", "data", "eval"), 0.0)
                pace = rng.uniform(0.5, 1)
                for _ in range(rng.integers(1, 5)):  # steps of the row, equally long: a row is divided evenly
                    step += 1
                    for kind, seconds in (("useful", pace), ("data", rng.uniform(0, 1))):
                        spent[kind] += seconds
                        truth.append((kind, seconds, step))
                spent["eval"] = rng.uniform(0, 2)
                idle = rng.uniform(0, 1)
                truth += [("eval", spent["eval"], 0), ("idle", idle, 0)]
                now += sum(spent.values()) + idle
                rows.append({"step": step, "at": now, **spent})
            if step < 40:
                down = rng.uniform(1, 9)
                truth.append(("down", down, 0))
                now, step = now + down, int(rng.integers(saved, step + 1))  # goes on from a checkpoint
        spent = account(rows)
        for kind in KINDS:
            np.testing.assert_allclose(spent.get(kind, 0.0), sum(s for k, s, _ in truth if k == kind), atol=1e-6,
                                       err_msg=kind)
        np.testing.assert_allclose(sum(spent.values()), now - 1000.0)


def test_an_account_of_nothing_and_its_line(tmp_path):
    assert account([]) == {}
    ledger = Ledger(tmp_path)
    ledger.start(0, 2.0, restore=0.5)
    ledger.spend(1, useful=1.0)
    ledger.spend(2, useful=1.0)  # of the next row: the first one was not a minute ago
    ledger.close()
    rows = list(read_jsonl(tmp_path / "ledger.jsonl"))
    assert [(r["step"], r.get("useful")) for r in rows] == [(0, None), (2, 2.0)]
    assert goodput_line({"useful": 90.0, "compile": 8.0, "down": 2.0}) == (
        "goodput: 90.0% of 1m40s: useful 1m30s, compile 8.0s, down 2.0s")


def test_who_is_late():
    places = {0: (Place(12, 8, "running the step"), "a"), 1: (Place(9, 7, "waiting for data"), "b"),
              2: (Place(12, 8, "running the step"), "c")}
    assert late(places) == ("process 1 (b) is waiting for data at step 7, and late: 2 of 3 processes are further, at "
                            "step 8")
    del places[1]
    assert late(places) == "process 0 (a) is running the step at step 8; process 2 (c) is running the step at step 8"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run that was traced, dumped and stopped at step 4 of 6, then went on; its directory and what it printed."""
    workdir = tmp_path_factory.mktemp("watched") / "run"
    stopped = """
import os, signal
from lmjax.training.records import Records
log_step = Records.log_step
def stop(self, step, metrics):
    if step == 3:  # and step 4 is on its way
        os.kill(os.getpid(), signal.SIGTERM)
    log_step(self, step, metrics)
Records.log_step = stop
"""
    first = finish(workdir, *SHORT, "watch.profile=2:3", f"watch.hlo={workdir}/hlo", "watch.stall_seconds=60",
                   first=stopped)
    return workdir, first, finish(workdir, *SHORT, "watch.profile=2:3")


def test_traces_and_hlo(watched):
    workdir, first, again = watched
    assert f"step 3: the trace is in {workdir / 'profile'}" in first
    assert "expected steps 2:3 to come, got a run that goes on from step 3; tracing nothing" in again
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert (workdir / "hlo/step.hlo.txt").read_text().startswith("HloModule")
    assert "stablehlo" in (workdir / "hlo/step.stablehlo.mlir").read_text()


def test_the_ledger_of_a_run(watched):
    workdir, first, second = watched
    rows = list(read_jsonl(workdir / "ledger.jsonl"))
    assert sum("start" in row for row in rows) == 2 and rows[-1]["step"] == 6
    spent = account(rows)
    assert {"useful", "compile", "eval", "checkpoint", "restore", "setup", "down"} <= set(spent)
    assert "redone" not in spent  # it was stopped with its step saved
    wall = rows[-1]["at"] - rows[0]["at"] + rows[0]["start"]
    np.testing.assert_allclose(sum(spent.values()), wall, rtol=1e-6)
    for kind in ("compile", "eval", "checkpoint"):
        named = sum(r["seconds"] for r in lines(workdir, "timing.jsonl") if r.get("event") == kind)
        np.testing.assert_allclose(spent[kind], named, rtol=1e-6)
    assert goodput_line(spent) in second.splitlines() and "goodput: " in first
    assert "Where the time went" in (workdir / "report.html").read_text()


LATE_ONCE = """
import time
from lmjax.training import loop as train
make = train.make_batches
def late(*args, **kwargs):
    for number, batch in enumerate(make(*args, **kwargs), 1):
        if number == 22:
            time.sleep(3)
        yield batch
train.make_batches = late
"""
STEPS = ("train.steps=24", "optimizer.warmup_steps=2", "checkpoint.every=30", "eval.every=0")


def test_data_that_is_late_once_is_no_slow_step(tmp_path):
    """Its wait lies in the interval of the step before, which was on its way already."""
    workdir = tmp_path / "run"
    finish(workdir, *STEPS, first=LATE_ONCE)
    timing = lines(workdir, "timing.jsonl")
    assert account(read_jsonl(workdir / "ledger.jsonl"))["data"] >= 3
    steps = {r["step"]: r for r in timing if "data_wait_share" in r}
    stalled, = (step for step, r in steps.items() if r["step_seconds"] >= 3)
    assert stalled == 21 and steps[stalled]["data_wait_share"] > 0.8
    assert not [r for r in timing if r.get("event") == "slow_step" and r["seconds"] > 1]


def test_a_slow_step_names_the_process_that_waited_for_its_data(tmp_path):
    workdir = tmp_path / "run"
    printed = finish_together(workdir, *STEPS, processes=2, devices=1, only={1: {"first": LATE_ONCE}})
    slow, = (r for r in lines(workdir, "timing.jsonl") if r.get("event") == "slow_step" and r["seconds"] > 2)
    assert (slow["step"], slow["process"], slow["doing"]) == (22, 1, "waiting for data") and slow["host"]
    told = re.findall(r"slow steps: .*", printed)
    assert len(told) == 1 and re.search(r"\d times the median; .*process 1 \(\S+\) was waiting for data", told[0]), told


HANGS = {  # what the run is at -> Python that makes it hang there
    "setting up": "train.set_up = hang",
    "preparing data": "run._data = hang",
    "restoring a checkpoint": "run.begin = hang",
    "compiling": "train._compile = hang",
    "saving checkpoints": "checkpoint.Checkpointer.wait = hang",
}


@pytest.mark.parametrize("doing", HANGS)
def test_a_run_that_hangs_beside_its_steps(doing, tmp_path):
    """Each ends after the patience that it has, which is longer than that of a step."""
    hang = f"""
import time
from lmjax.monitoring import watch
from lmjax.training import checkpoint, loop as train, setup as run
def hang(*args): time.sleep(600)
{HANGS[doing]}
watch.GRACE_SECONDS = 1.0
watch.PATIENCE = dict.fromkeys(watch.PATIENCE, 3600.0) | {{{doing!r}: 3.0}}
"""
    began = time.monotonic()
    printed = finish(tmp_path / "run", *SHORT, "watch.stall_seconds=1.5", expect=1, first=hang)
    assert time.monotonic() - began < 100
    assert f"expected {doing} to end within 3 s, got no end in" in printed
    assert f"is {doing} at step" in printed and "in hang" in (tmp_path / "run/stall-0.txt").read_text()


def test_recipes_for_pods_are_watched():
    from lmjax.config import load
    from lmjax.training.recipe import build_recipe

    assert build_recipe(load("configs/llama2_7b.py", [])).watch.stall_seconds == 1800


def test_two_processes_of_which_one_is_late(tmp_path: pathlib.Path):
    """Both write their stacks and end with a line that names the one whose data does not come."""
    slow = """
import time
from lmjax.training import loop as train
make = train.make_batches
def wait_for_ever():
    time.sleep(600)
def stuck(*args, **kwargs):
    for number, batch in enumerate(make(*args, **kwargs), 1):
        if number == 4:
            wait_for_ever()
        yield batch
train.make_batches = stuck
"""
    printed = finish_together(tmp_path / "run", "watch.stall_seconds=3", processes=2, devices=1, expect=1, timeout=120,
                              only={1: {"first": slow}})
    told = [line for line in printed.splitlines() if line.startswith("lmjax: error: ")]
    assert len(told) == 2 and told[0] == told[1], printed
    assert "expected a step to end within 3 s" in told[0] and "is waiting for data at step 4, and late" in told[0]
    assert "process 1 (" in told[0] and "process 0" not in told[0]
    assert "wait_for_ever" in (tmp_path / "run/stall-1.txt").read_text()
    assert "wait_for_ever" not in (tmp_path / "run/stall-0.txt").read_text() != ""


@pytest.mark.slow  # sits out the time after which what needs no Python ends the process
def test_a_process_that_cannot_run_python_any_more(tmp_path):
    stuck = """
import ctypes
from lmjax.monitoring import watch
from lmjax.training.records import Records
watch.GRACE_SECONDS = 1.0
log_step = Records.log_step
def hold(self, step, metrics):
    if step == 3:
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter
    log_step(self, step, metrics)
Records.log_step = hold
"""
    printed = finish(tmp_path / "run", "watch.stall_seconds=2", expect=1, first=stuck)
    assert "Timeout (0:00:04)!" in printed and "in hold" in printed


def test_steps_to_trace_that_a_run_has_behind_it(tmp_path):
    said = "watch.profile: expected steps 3:6 to come, got a run that goes on from step"
    trace = Trace("3:6", tmp_path)
    assert [trace.missed(start) for start in (0, 2, 3, 6)] == [
        "", "", f"{said} 3; tracing steps 4:6", f"{said} 6; tracing nothing"]
    assert not Trace("", tmp_path).missed(9)


@pytest.mark.parametrize("value, word", [("5", "steps A:B"), ("0:3", "steps A:B"), ("5:3", "A not after B"),
                                         ("5:99", "steps up to train.steps=")])
def test_a_profile_that_names_no_steps_is_refused(value, word, tmp_path, capsys):
    from lmjax.cli import main as cli

    command = ["train", "--config", "configs/synthetic.py:tiny", "--workdir", str(tmp_path), "--profile", value]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "watch.profile: expected" in error and word in error and json.dumps(value)[1:-1] in error
