"""A run that is killed again and again ends with the bits of one that never was. Real processes, real signals."""

import pathlib
import random
import signal
import time

import pytest
from processes import assert_same_run, final_checksums, finish, lines, start, wait_for

from lmjax.training.checkpoint import checkpoint_steps

FAST = ("train.steps=16", "checkpoint.every=3", "eval.every=8", "model.dropout=0.1")
TEXT = ("data.sources.0.uri=text:{stdlib}/email/*.py", "train.steps=16", "checkpoint.every=4", "eval.every=8",
        "sample.every=8", "data.heldout_fraction=0.2", "optimizer.ema_decay=0.9")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(workdir, *FAST)
    return workdir


def committed(workdir: pathlib.Path) -> list[int]:
    return checkpoint_steps(workdir / "checkpoints")


def run_with_kills(workdir: pathlib.Path, moments, *overrides: str, config: str) -> None:
    for moment in moments:
        process = start(workdir, *overrides, config=config)
        wait_for(process, moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    finish(workdir, *overrides, config=config)


def test_killed_at_any_moment_ends_the_same(straight, tmp_path):
    workdir = tmp_path / "run"
    rng = random.Random(0)

    def compiling():  # config.json is written just before the state is made and the step compiled
        return (workdir / "config.json").exists()

    def after_lines(n):
        def happened():
            return len(lines(workdir)) >= n and (time.sleep(rng.random() * 0.05) or True)
        return happened

    def saving():  # the directory is there, its commit file is not
        newest = max((int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")), default=0)
        return newest > max(committed(workdir), default=0)

    run_with_kills(workdir, [compiling, after_lines(5), saving, after_lines(11)], *FAST,
                   config="configs/synthetic.py:tiny")
    assert_same_run(straight, workdir, ["metrics.jsonl"])
    assert final_checksums(workdir)["step"] == 16


def test_sigterm_saves_the_step_and_exits_cleanly(straight, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, *FAST)
    wait_for(process, lambda: len(lines(workdir)) >= 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = committed(workdir)[-1]
    steps = [r["step"] for r in lines(workdir) if "loss" in r]
    assert saved == steps[-1] and saved < 16
    assert f"saved at step {saved}" in pathlib.Path(f"{workdir}.log").read_text()
    finish(workdir, *FAST)
    assert_same_run(straight, workdir, ["metrics.jsonl"])


TOLD_WHILE_EVALUATING = """
import os, signal, lmjax.training.loop as train
evaluate = train.evaluate
def told(step, params, batches, split):
    def watched():
        for i, batch in enumerate(batches):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
    return evaluate(step, params, watched(), split)
train.evaluate = told
"""


def test_sigterm_in_an_evaluation_saves_the_step_and_the_next_start_evaluates_it(straight, tmp_path):
    workdir = tmp_path / "run"
    for step in (8, 16):
        code = {8: 0, 16: 75}[step]  # as the launcher asks, the last evaluation included
        env = {"LMJAX_STOPPED_CODE": str(code)} if code else None
        assert start(workdir, *FAST, first=TOLD_WHILE_EVALUATING, env=env).wait(timeout=200) == code
        assert committed(workdir)[-1] == step and f"stopped and saved at step {step}" in pathlib.Path(
            f"{workdir}.log").read_text()
        assert not [r for r in lines(workdir) if r["step"] == step and "eval/loss" in r]
        if step == 8:  # evaluated by a start of its own, which is told to stop right behind
            process = start(workdir, *FAST)
            wait_for(process, lambda: any("eval/loss" in r for r in lines(workdir)))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
    finish(workdir, *FAST, env={"LMJAX_STOPPED_CODE": "75"})  # nothing stops this one
    assert_same_run(straight, workdir, ["metrics.jsonl"])
    assert "LMJAX_STOPPED_CODE: expected an exit code from 0 to 255, got 'temp'" in finish(
        workdir, *FAST, expect=2, env={"LMJAX_STOPPED_CODE": "temp"})


@pytest.mark.long
def test_on_text_through_tf_data_with_samples_and_ema(tmp_path):
    import sysconfig

    text = [item.format(stdlib=sysconfig.get_paths()["stdlib"]) for item in TEXT]
    config = "configs/quickstart.py:tiny"
    finish(tmp_path / "straight", *text, config=config)
    workdir = tmp_path / "killed"
    preparing = [lambda: any(tmp_path.glob("killed/data*")) and (time.sleep(0.3) or True)]
    training = [lambda: len(lines(workdir)) >= 10]
    run_with_kills(workdir, preparing + training, *text, config=config)
    assert_same_run(tmp_path / "straight", workdir)
    assert (workdir / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_killed_at_twenty_random_moments(straight, tmp_path):
    workdir, rng = tmp_path / "run", random.Random(1)
    for _ in range(20):
        process = start(workdir, *FAST)
        time.sleep(3 + 12 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(workdir, *FAST)
    assert_same_run(straight, workdir, ["metrics.jsonl"])
