"""Faults injected into real runs: steps are skipped, runs go back, and all of it repeats."""

import pathlib
import re
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import final_checksums, finish, finish_after_a_kill, finish_together, lines, run_here

from lmjax.data.order import Steps
from lmjax.data.pipeline import Mixture
from lmjax.monitoring import health
from lmjax.monitoring.health import Health
from lmjax.training import loop, setup
from lmjax.training import rewind as rewinding
from lmjax.training.checkpoint import checkpoint_steps, read_about
from lmjax.training.run import Run
from lmjax.training.saved import Saved

# Eight rows per step: step k takes the rows 8(k - 1) to 8k - 1.
RUN = ("train.steps=12", "optimizer.warmup_steps=2", "checkpoint.every=4", "train.batch_size=8",
       "checkpoint.keep_last=9", "eval.every=0", "optimizer.ema_decay=0.9")


def poison(patch: pytest.MonkeyPatch, bad: Callable[[np.ndarray], np.ndarray]) -> None:
    """Makes the loss of those training rows NaN of which `bad` says so."""
    rows = Mixture.rows

    def poisoned(self: Mixture, g: np.ndarray) -> dict[str, np.ndarray]:
        made = rows(self, g)
        made["loss_mask"] = np.where(bad(g)[:, None], np.float32("nan"), made["loss_mask"])
        return made

    patch.setattr(Mixture, "rows", poisoned)


def after_each_step(patch: pytest.MonkeyPatch, change: Callable) -> None:
    """Lets `change(call, state, metrics)` stand between the compiled step and the loop."""
    compiled = loop._compile

    def wrapped(run):
        step, calls = compiled(run), iter(range(1, 10**6))
        return lambda state, batch: change(next(calls), *step(state, batch))

    patch.setattr(loop, "_compile", wrapped)


def sums_at(workdir: pathlib.Path, step: int) -> dict:
    return read_about(workdir / "checkpoints" / str(step))["checksums"]


def events(workdir: pathlib.Path, name: str) -> list[dict]:
    return [row for row in lines(workdir, "timing.jsonl") if row.get("event") == name]


@pytest.mark.slow
def test_a_step_without_a_number_changes_nothing(tmp_path, monkeypatch):
    poison(monkeypatch, lambda g: g == 37)  # in step 5
    assert run_here(tmp_path / "run", *RUN, "checkpoint.every=1", "train.steps=7") == 0
    before, after = (sums_at(tmp_path / "run", step) for step in (4, 5))
    counts = {name for name in after["opt_state"] if name.endswith("count")}
    assert counts and after["params"] == before["params"] and after["ema"] == before["ema"]
    assert {name for name, value in after["opt_state"].items()
            if value != before["opt_state"][name]} == counts  # schedules follow the step
    assert sums_at(tmp_path / "run", 6)["params"] != after["params"]
    found, = events(tmp_path / "run", "skipped")
    assert found["step"] == 5 and found["rows"] == "32:40" and "loss nan" in found["why"]
    line = lines(tmp_path / "run")[4]
    assert line["skipped"] == 1 and line["loss"] == "nan"
    assert lines(tmp_path / "run")[3]["tokens"] == line["tokens"]
    assert "not finite" not in (tmp_path / "run/report.html").read_text()


@pytest.mark.long
def test_after_some_in_a_row_their_rows_are_left_out(tmp_path, monkeypatch, capsys):
    """The run ends with the bits of one whose data never had those rows."""
    with monkeypatch.context() as patch:
        poison(patch, lambda g: (40 <= g) & (g < 56))  # steps 6 and 7, after the checkpoint of 4
        assert run_here(tmp_path / "run", *RUN, "watch.rewind_after=2") == 0
    assert "went back to step 4 without the rows 40 to 55" in capsys.readouterr().err
    found, = events(tmp_path / "run", "rewind")
    assert found["after"] == 7 and found["rows"] == "40:56"
    with monkeypatch.context() as patch:
        patch.setattr(setup, "Steps", lambda changes: Steps([(0, 0, 8), (5, 56, 8)]))
        assert run_here(tmp_path / "twin", *RUN) == 0
    assert final_checksums(tmp_path / "run") == final_checksums(tmp_path / "twin")
    assert lines(tmp_path / "run") == lines(tmp_path / "twin")


@pytest.mark.slow
def test_an_infinite_moment_is_not_saved_and_not_restored(tmp_path, monkeypatch, capsys):
    def spoil(call, state, metrics):
        """Such a moment makes the updates of Adam zero: neither loss nor weights tell of it."""
        def one(path, x):
            return jnp.full_like(x, jnp.inf) if "nu" in jax.tree_util.keystr(path) else x

        if call == 10:
            moments = jax.tree_util.tree_map_with_path(one, state.opt_state)
            state = state._replace(opt_state=moments)
        return state, metrics

    straight, healed, restored = (tmp_path / name for name in ("straight", "healed", "restored"))
    assert run_here(straight, *RUN) == 0
    with monkeypatch.context() as patch:
        after_each_step(patch, spoil)
        assert run_here(healed, *RUN) == 0
        said = capsys.readouterr().err
        patch.setattr(loop, "non_finite", lambda tree: "")  # a checkpoint that came to be somehow
        assert run_here(restored, *RUN) == 0
    assert re.search(r"nu/\S+ of the state is not finite; went back to step 8", said)
    assert run_here(restored, *RUN) == 0
    said = capsys.readouterr().err
    assert re.search(r"checkpoints/12 is damaged and not used: .*nu.* is not finite", said)
    assert (restored / "checkpoints/damaged-12").exists()
    for run in (healed, restored):
        assert final_checksums(run) == final_checksums(straight)
        assert lines(run) == lines(straight)


@pytest.mark.slow
@pytest.mark.parametrize("policy", health.SPIKES)
def test_spikes_are_treated_as_the_policy_says(tmp_path, monkeypatch, capsys, policy):
    """One row counts a single token, so that the gradient of its step is as of few tokens."""
    monkeypatch.setattr(health, "MIN_STEPS", 5)
    rows = Mixture.rows

    def spiky(self: Mixture, g: np.ndarray) -> dict[str, np.ndarray]:
        made = rows(self, g)
        if 72 in g:  # of step 10
            made["loss_mask"] = np.zeros_like(made["loss_mask"])
            made["loss_mask"][0, 3] = 1
        return made

    monkeypatch.setattr(Mixture, "rows", spiky)
    run = tmp_path / "run"
    assert run_here(run, *RUN, "checkpoint.every=1", f"watch.spikes={policy}") == 0
    said = capsys.readouterr().err
    assert len(events(run, "spike")) == (policy in ("record", "rewind"))
    assert len(events(run, "skipped")) == (policy == "skip")
    assert len(events(run, "rewind")) == (policy == "rewind")
    kept = sums_at(run, 9)["params"] == sums_at(run, 10)["params"]
    assert kept == (policy == "skip")
    assert ("without the rows 72 to 79" in said) == (policy == "rewind")
    assert read_about(run / "checkpoints/12")["data"]["next_row"] == 96 + 8 * (policy == "rewind")


@pytest.mark.slow
def test_a_run_that_no_rewind_heals_ends_with_a_fault(tmp_path, monkeypatch, capsys):
    """The exit code is 1: on other devices it may heal. What was saved stays."""
    poison(monkeypatch, lambda g: g >= 40)
    assert run_here(tmp_path / "run", *RUN, "watch.rewind_after=2") == 1
    said = capsys.readouterr().err
    assert "after 3 rewinds to step 4" in said and "Traceback" not in said
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [4]
    assert [row["rows"] for row in events(tmp_path / "run", "rewind")] == [
        "40:56", "56:72", "32:88"]


POISONED = """
import numpy as np
from lmjax.data.pipeline import Mixture
rows = Mixture.rows
def poisoned(self, g):
    made = rows(self, g)
    bad = (40 <= g) & (g < 56) | (g == 75)
    made["loss_mask"] = np.where(bad[:, None], np.float32("nan"), made["loss_mask"])
    return made
Mixture.rows = poisoned
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")])
def test_the_whole_story_repeats_bit_for_bit_after_a_kill(tmp_path, mesh):
    devices = 8 if mesh else 1
    options = {"devices": devices, "first": POISONED}
    story = (*RUN, *mesh, "watch.rewind_after=2", "train.steps=40", "optimizer.warmup_steps=2")
    finish(tmp_path / "straight", *story, **options)
    finish_after_a_kill(tmp_path / "killed", *story, **options)
    assert final_checksums(tmp_path / "straight") == final_checksums(tmp_path / "killed")
    assert lines(tmp_path / "straight") == lines(tmp_path / "killed")
    assert [line["step"] for line in lines(tmp_path / "killed") if "skipped" in line] == [8]


def fake_run(patch: pytest.MonkeyPatch, judge: Health, **fields) -> types.SimpleNamespace:
    """What `rewind` needs of a run whose only checkpoint is the state before its first step."""
    def place(run, log, at):
        run.start, run.steps = 0, Steps([(0, 0, 8)])
        run.health.restore({})

    patch.setattr(rewinding, "place", place)
    patch.setattr(rewinding, "cover", lambda run, log, at: None)
    return types.SimpleNamespace(
        health=judge, steps=Steps([(0, 0, 8)]), start=0, rewinds=0, state=None,
        saver=types.SimpleNamespace(settle=lambda: True),
        recipe=types.SimpleNamespace(train=types.SimpleNamespace(batch_size=8)), **fields)


@pytest.mark.parametrize("policy, after", [("rewind", 0), ("skip", 2)])
def test_spikes_that_come_back_do_not_rewind_for_ever(monkeypatch, policy, after):
    """Every 40th step is a spike, or the end of two: longer than a new baseline takes."""
    judge, count = Health(policy, after), 0
    run, step = fake_run(monkeypatch, judge), 1
    while step <= 200 and count < 20:
        spikes = step % 40 in (0, 39 if policy == "skip" else 0)
        bad = judge.judge(step, 9.0 if spikes else 3.0, 1.0)
        cause = bad and judge.rewinds(bad)
        if cause:
            rewinding.rewind(run, cause, print, print)
            count, step = count + 1, 0
        step += 1
    assert count == rewinding.MOST_REWINDS + 1
    judge.forgives = False  # a checkpoint is saved
    assert step == 201
    judge.judge(201, 9.0, 1.0)
    assert judge.rewinds(judge.judge(202, 9.0, 1.0))


def test_a_run_that_goes_back_before_a_change_of_batch_size_takes_that_size(monkeypatch):
    """The checkpoint of the change is damaged, so that the run goes back to the beginning."""
    run = fake_run(monkeypatch, Health())
    run.recipe.train.batch_size, run.start = 4, 10
    run.steps = Steps([(0, 0, 8)]).resumed(10, 4).without(11, 92)  # 84 to 91 are left out
    cause = health.Rewind(13, "", 13)  # the rows 96 to 99
    assert rewinding.rewind(run, cause, print, print) == (96, 100)
    assert [tuple(c) for c in run.steps.changes] == [(0, 0, 4), (21, 92, 4), (22, 100, 4)]
    assert rewinding.rewind(run, health.Rewind(3, "no row"), print, print) == (12, 12)
    assert run.steps.of(22) == (92, 96)


def test_every_process_knows_which_step_was_evaluated(tmp_path, monkeypatch):
    """Only process 0 writes it down."""
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        run = types.SimpleNamespace(saved=Saved(), workdir=tmp_path)
        Run.note(run, evaluated=4)
        assert run.saved.evaluated == 4
        assert (tmp_path / "saved.json").exists() == (process == 0)


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
    story = (*RUN, "mesh.data=2", "watch.rewind_after=2", "eval.every=4")
    for name in ("first", "second"):
        finish_together(tmp_path / name, *story, processes=2, devices=1, first=POISONED)
    assert final_checksums(tmp_path / "first") == final_checksums(tmp_path / "second")
    assert lines(tmp_path / "first") == lines(tmp_path / "second")
    assert len(events(tmp_path / "first", "rewind")) == 1
