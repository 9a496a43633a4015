"""Watching a run: the account of its time over restarts, traces, HLO, outliers, a watchdog that names who is late."""

import json
import pathlib

import numpy as np
import pytest
from processes import finish, finish_together, lines

from lmjax.goodput import KINDS, Ledger, account, goodput_line
from lmjax.metrics import read_jsonl
from lmjax.runtime import Place
from lmjax.watch import Outliers, late

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


def test_outliers():
    slow, rng = Outliers(), np.random.default_rng(0)
    usual = rng.uniform(1.0, 1.2, 200)
    usual[:3] = 9.0  # nothing is unusual yet
    usual[[50, 120]] = 1.8
    assert [i for i, seconds in enumerate(usual) if slow(seconds)] == [50, 120]


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
from lmjax import train
report = train.Loop._report
def stop(self):
    if self.pending and self.pending[0] == 3:  # and step 4 is on its way
        os.kill(os.getpid(), signal.SIGTERM)
    report(self)
train.Loop._report = stop
"""
    first = finish(workdir, *SHORT, "watch.profile=2:3", f"watch.hlo={workdir}/hlo", "watch.stall_seconds=60",
                   first=stopped)
    return workdir, first, finish(workdir, *SHORT)


def test_traces_and_hlo(watched):
    workdir, first, _ = watched
    assert f"step 3: the trace is in {workdir / 'profile'}" in first
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


def test_two_processes_of_which_one_is_late(tmp_path: pathlib.Path):
    """Both write their stacks and end with a line that names the one whose data does not come."""
    slow = """
import time
from lmjax import train
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
from lmjax import train, watch
watch.GRACE_SECONDS = 1.0
report = train.Loop._report
def hold(self):
    if self.pending and self.pending[0] == 3:
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter
    report(self)
train.Loop._report = hold
"""
    printed = finish(tmp_path / "run", "watch.stall_seconds=2", expect=1, first=stuck)
    assert "Timeout (0:00:04)!" in printed and "in hold" in printed


@pytest.mark.parametrize("value, word", [("5", "steps A:B"), ("0:3", "steps A:B"), ("5:3", "A not after B")])
def test_a_profile_that_names_no_steps_is_refused(value, word, tmp_path, capsys):
    from lmjax import cli

    command = ["train", "--config", "configs/synthetic.py:tiny", "--workdir", str(tmp_path), "--profile", value]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "config.watch.profile: expected" in error and word in error and json.dumps(value)[1:-1] in error
