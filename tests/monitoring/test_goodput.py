"""The goodput ledger accounts for every second of a run, over kills and restarts."""

import numpy as np
import pytest
from processes import lines

from lmjax.monitoring.goodput import ACTIVITIES, Ledger, account, goodput_line
from lmjax.monitoring.jsonl import read_jsonl


def killed_run(rng):
    """Makes up a run of 40 steps that is killed again and again.

    Returns the rows of its ledger, the true (activity, seconds, step) of each second spent, and the
    wall time.
    """
    now, step, rows, truth = 1000.0, 0, [], []
    while step < 40:
        begin, saved = now, step
        truth = [("redone" if activity == "useful" and done > saved else activity, seconds, done)
                 for activity, seconds, done in truth]
        setup, restore = rng.uniform(1, 3, 2)
        now += setup + restore
        rows.append({"step": step, "at": now, "start": now - begin, "restore": restore})
        truth += [("setup", setup, 0), ("restore", restore, 0)]
        for _ in range(rng.integers(1, 6)):  # rows of this start
            spent = dict.fromkeys(("useful", "data", "eval"), 0.0)
            pace = rng.uniform(0.5, 1)
            for _ in range(rng.integers(1, 5)):  # equally long steps: a row is divided evenly
                step += 1
                for activity, seconds in (("useful", pace), ("data", rng.uniform(0, 1))):
                    spent[activity] += seconds
                    truth.append((activity, seconds, step))
            spent["eval"] = rng.uniform(0, 2)
            idle = rng.uniform(0, 1)
            truth += [("eval", spent["eval"], 0), ("idle", idle, 0)]
            now += sum(spent.values()) + idle
            rows.append({"step": step, "at": now, **spent})
        if step < 40:
            down = rng.uniform(1, 9)
            truth.append(("down", down, 0))
            now, step = now + down, int(rng.integers(saved, step + 1))  # resumes from a checkpoint
    return rows, truth, now - 1000.0


def test_the_account_of_runs_that_are_killed_again_and_again():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, truth, wall = killed_run(rng)
        spent = account(rows)
        for activity in ACTIVITIES:
            true = sum(seconds for other, seconds, _ in truth if other == activity)
            np.testing.assert_allclose(spent.get(activity, 0.0), true, atol=1e-6, err_msg=activity)
        np.testing.assert_allclose(sum(spent.values()), wall)


def test_an_empty_account_and_the_line_of_one(tmp_path):
    assert account([]) == {}
    ledger = Ledger(tmp_path)
    ledger.start(0, 2.0, restore=0.5)
    ledger.spend(1, useful=1.0)
    ledger.spend(2, useful=1.0)  # both go to the next row, which is due a minute after the first
    ledger.close()
    rows = list(read_jsonl(tmp_path / "ledger.jsonl"))
    assert [(row["step"], row.get("useful")) for row in rows] == [(0, None), (2, 2.0)]
    assert goodput_line({"useful": 90.0, "compile": 8.0, "down": 2.0}) == (
        "goodput: 90.0% of 1m40s: useful 1m30s, compile 8.0s, down 2.0s")


@pytest.mark.slow
def test_the_ledger_of_a_run(watched):
    workdir, first, second = watched
    rows = list(read_jsonl(workdir / "ledger.jsonl"))
    assert sum("start" in row for row in rows) == 2 and rows[-1]["step"] == 6
    spent = account(rows)
    assert {"useful", "compile", "eval", "checkpoint", "restore", "setup", "down"} <= set(spent)
    assert "redone" not in spent  # the first start saved the step at which it stopped
    wall = rows[-1]["at"] - rows[0]["at"] + rows[0]["start"]
    np.testing.assert_allclose(sum(spent.values()), wall, rtol=1e-6)
    for activity in ("compile", "eval", "checkpoint"):
        events = sum(line["seconds"] for line in lines(workdir, "timing.jsonl")
                     if line.get("event") == activity)
        np.testing.assert_allclose(spent[activity], events, rtol=1e-6)
    assert goodput_line(spent) in second.splitlines() and "goodput: " in first
    assert "Where the time went" in (workdir / "report.html").read_text()
