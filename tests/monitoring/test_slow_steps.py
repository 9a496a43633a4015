"""Which steps are slow, and how the terminal tells of them."""

import re

import numpy as np
import pytest
from processes import finish, finish_together, lines

from lmjax.monitoring.goodput import account
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.slow_steps import SECONDS_PER_LINE, Outliers, SlowStepLog

RUNNING, WAITING = "process 0 (a) was running the step", "process 1 (b) was waiting for data"


def test_a_step_is_slow_beside_the_median_of_those_before():
    slow, rng = Outliers(), np.random.default_rng(0)
    seconds = rng.uniform(1.0, 1.2, 200)
    seconds[:3] = 9.0  # too early: no step is slow yet
    seconds[[50, 120]] = 1.8
    assert [step for step, took in enumerate(seconds) if slow(took)] == [50, 120]


def test_waiting_for_data_makes_no_step_slow():
    """When every step waits, the rest of each is a blink: even a hundred times that is not slow."""
    slow, waits = Outliers(), np.random.default_rng(0).uniform(0.9, 0.999, 200)
    waits[50] = 0.1
    assert not any([slow(1.0 + (step == 120), waited) for step, waited in enumerate(waits)])
    assert slow(2.6, 0.9)


def test_the_terminal_gets_at_most_one_line_per_minute():
    now, lines = 0.0, []
    log = SlowStepLog(lambda line: lines.append((now, line)), clock=lambda: now)
    for step in range(2000):  # 1000 seconds, with many slow steps in the first 500
        now = step / 2
        if now < 500 and step % 3 == 0:
            log.add(2.0 + step % 5, WAITING if step % 2 else RUNNING)
        log.tick()
    times = [when for when, _ in lines]
    assert 8 <= len(lines) <= 500 / SECONDS_PER_LINE + 1 and max(times) < 560
    assert min(np.diff(times)) >= SECONDS_PER_LINE
    assert lines[0][1] == ("slow steps: 41 in the last 1m00s, 2.0 to 6.0 times the median; "
                           f"{RUNNING} in 21 of them")
    assert sum(int(line.split()[2]) for _, line in lines) == 334  # none is left out


def test_the_line_names_the_cause_that_cost_the_most_time():
    lines = []
    log = SlowStepLog(lines.append)
    for ratio, cause in ((1.7, RUNNING), (48.0, WAITING), (2.0, RUNNING)):
        log.add(ratio, cause)
    log.close()
    assert lines[0].endswith(f"1.7 to 48.0 times the median; {WAITING} in 1 of them")


def test_the_rest_is_told_at_the_end():
    lines = []
    log = SlowStepLog(lines.append)
    log.close()
    assert lines == []
    log.add(31.24, WAITING)
    log.tick()
    assert lines == []
    log.close()
    log.close()
    assert lines == [f"slow steps: 1, 31.2 times the median; {WAITING}"]


LATE_ONCE = """
import time
from lmjax.training import loop
make = loop.make_batches
def late(*args, **kwargs):
    for number, batch in enumerate(make(*args, **kwargs), 1):
        if number == 22:
            time.sleep(3)
        yield batch
loop.make_batches = late
"""
STEPS = ("train.steps=24", "optimizer.warmup_steps=2", "checkpoint.every=30", "eval.every=0")


@pytest.mark.slow
def test_data_that_is_late_once_is_no_slow_step(tmp_path):
    """The wait counts as part of the step before, which is still running."""
    workdir = tmp_path / "run"
    finish(workdir, *STEPS, first=LATE_ONCE)
    timing = lines(workdir, "timing.jsonl")
    assert account(read_jsonl(workdir / "ledger.jsonl"))["data"] >= 3
    steps = {line["step"]: line for line in timing if "data_wait_share" in line}
    stalled, = (step for step, line in steps.items() if line["step_seconds"] >= 3)
    assert stalled == 21 and steps[stalled]["data_wait_share"] > 0.8
    assert not [line for line in timing
                if line.get("event") == "slow_step" and line["seconds"] > 1]


@pytest.mark.slow
def test_a_slow_step_names_the_process_that_waited_for_its_data(tmp_path):
    workdir = tmp_path / "run"
    printed = finish_together(workdir, *STEPS, processes=2, devices=1,
                              only={1: {"first": LATE_ONCE}})
    slow, = (line for line in lines(workdir, "timing.jsonl")
             if line.get("event") == "slow_step" and line["seconds"] > 2)
    assert (slow["step"], slow["process"], slow["doing"]) == (22, 1, "waiting for data")
    assert slow["host"]
    told = re.findall(r"slow steps: .*", printed)
    assert len(told) == 1, told
    assert re.search(r"\d times the median; .*process 1 \(\S+\) was waiting for data", told[0])
