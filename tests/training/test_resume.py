"""A run that is killed or stopped, again and again, ends with the bits of one that never was.

Kills hit real processes. Signals that a run answers are sent to this process, which runs the same
command.
"""

import os
import pathlib
import random
import signal
import sysconfig
import time

import pytest
from processes import assert_same_run, final_checksums, finish, lines, run_here, start, wait_for

from lmjax.training import loop
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.records import Records

FAST = ("train.steps=16", "checkpoint.every=3", "eval.every=8", "model.dropout=0.1")
TEXT = ("data.sources.0.uri=text:{stdlib}/email/*.py", "train.steps=16", "checkpoint.every=4",
        "eval.every=8", "sample.every=8", "data.heldout_fraction=0.2", "optimizer.ema_decay=0.9")
DEVICES = 8  # of this process, so that a process of its own computes the same


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert run_here(workdir, *FAST) == 0
    return workdir


def committed(workdir: pathlib.Path) -> list[int]:
    return checkpoint_steps(workdir / "checkpoints")


def kill_at(workdir: pathlib.Path, moments, *overrides: str, **options) -> None:
    """Starts the run once per moment, and kills it when the moment has come."""
    for moment in moments:
        process = start(workdir, *overrides, **options)
        wait_for(process, moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.parametrize("names", [
    ("saving",),
    pytest.param(("compiling", "line 5", "saving", "line 11"), marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_the_same(names, straight, tmp_path):
    workdir = tmp_path / "run"
    rng = random.Random(0)

    def compiling():  # config.json is written just before the step is compiled
        return (workdir / "config.json").exists()

    def saving():  # the directory of a checkpoint is there, its commit file is not
        newest = max((int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")), default=0)
        return newest > max(committed(workdir), default=0)

    def after_lines(n):
        def happened():
            return len(lines(workdir)) >= n and (time.sleep(rng.random() * 0.05) or True)
        return happened

    moments = {"compiling": compiling, "saving": saving, "line 5": after_lines(5),
               "line 11": after_lines(11)}
    kill_at(workdir, [moments[name] for name in names], *FAST, devices=DEVICES)
    assert not (workdir / "checkpoints" / "16").exists()
    assert run_here(workdir, *FAST) == 0
    assert_same_run(straight, workdir, ["metrics.jsonl"])
    assert final_checksums(workdir)["step"] == 16


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.long
def test_sigterm_saves_the_step_and_exits_cleanly(straight, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    log_step = Records.log_step

    def told(self, step, metrics):
        log_step(self, step, metrics)
        if step == 4:  # step 5 is on its way
            terminate()

    with monkeypatch.context() as patch:
        patch.setattr(Records, "log_step", told)
        assert run_here(workdir, *FAST) == 0
    assert committed(workdir)[-1] == 5 == [r["step"] for r in lines(workdir) if "loss" in r][-1]
    assert "stopped and saved at step 5" in capsys.readouterr().err
    assert run_here(workdir, *FAST) == 0
    assert_same_run(straight, workdir, ["metrics.jsonl"])


@pytest.mark.long
def test_sigterm_in_an_evaluation_saves_the_step_and_the_next_start_evaluates_it(
        straight, tmp_path, monkeypatch, capsys):
    workdir, evaluate = tmp_path / "run", loop.evaluate

    def told_before_the_second_batch(eval_step, params, batches, *others):
        def watched():
            for i, batch in enumerate(batches):
                if i == 1:
                    terminate()
                yield batch
        return evaluate(eval_step, params, watched(), *others)

    def told_at_the_end(*args):
        found = evaluate(*args)
        terminate()
        return found

    def run(evaluate) -> int:
        monkeypatch.setattr(loop, "evaluate", evaluate)
        return run_here(workdir, *FAST)

    assert run(told_before_the_second_batch) == 0
    assert committed(workdir)[-1] == 8 and "saved at step 8" in capsys.readouterr().err
    assert not [r for r in lines(workdir) if "eval/loss" in r]
    assert run(told_at_the_end) == 0
    assert [r["step"] for r in lines(workdir) if "eval/loss" in r] == [8]
    monkeypatch.setenv("LMJAX_STOPPED_CODE", "75")  # as launchers ask, so that they start it again
    assert run(told_before_the_second_batch) == 75, "the last evaluation counts as well"
    assert committed(workdir)[-1] == 16 and "saved at step 16" in capsys.readouterr().err
    assert run(told_before_the_second_batch) == 75, "it saved nothing, as the step is saved already"
    printed, events = capsys.readouterr().err, lines(workdir, "timing.jsonl")
    assert "stopped at step 16; the same command goes on from there" in printed
    last_start = max(i for i, row in enumerate(events) if row.get("event") == "resume")
    assert "checkpoint" not in [row.get("event") for row in events[last_start:]]
    assert run(evaluate) == 0, "nothing stopped this one"
    assert_same_run(straight, workdir, ["metrics.jsonl"])
    monkeypatch.setenv("LMJAX_STOPPED_CODE", "temp")
    assert run(evaluate) == 2
    assert ("LMJAX_STOPPED_CODE: expected an exit code from 0 to 255, got 'temp'"
            in capsys.readouterr().err)


@pytest.mark.slow
def test_sigterm_to_a_process(straight, tmp_path):
    """At whatever line of code the signal finds the process."""
    workdir = tmp_path / "run"
    process = start(workdir, *FAST, devices=DEVICES)
    wait_for(process, lambda: len(lines(workdir)) >= 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = committed(workdir)[-1]
    assert saved == [r["step"] for r in lines(workdir) if "loss" in r][-1] and saved < 16
    finish(workdir, *FAST, devices=DEVICES)
    assert_same_run(straight, workdir, ["metrics.jsonl"])


@pytest.mark.long
def test_on_text_through_tf_data_with_samples_and_ema(tmp_path):
    text = [item.format(stdlib=sysconfig.get_paths()["stdlib"]) for item in TEXT]
    config = "configs/quickstart.py:tiny"
    finish(tmp_path / "straight", *text, config=config)
    workdir = tmp_path / "killed"

    def preparing():
        return any(tmp_path.glob("killed/data*")) and (time.sleep(0.3) or True)

    kill_at(workdir, [preparing, lambda: len(lines(workdir)) >= 10], *text, config=config)
    finish(workdir, *text, config=config)
    assert_same_run(tmp_path / "straight", workdir)
    assert (workdir / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_killed_at_twenty_random_moments(straight, tmp_path):
    workdir, rng = tmp_path / "run", random.Random(1)
    for _ in range(20):
        process = start(workdir, *FAST, devices=DEVICES)
        time.sleep(3 + 12 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(workdir, *FAST, devices=DEVICES)
    assert_same_run(straight, workdir, ["metrics.jsonl"])
