"""Saves that fail do not end a run: it goes on, tries again, and rescues its newest state."""

import errno
import pathlib
import re
import tempfile
import types

import pytest
from processes import FINISHED, assert_same_run, one_line, run_here

from lmjax.training import saving
from lmjax.training.checkpoint import Checkpointer, checkpoint_steps
from lmjax.training.run import Run
from lmjax.training.saving import Saver

PATIENT = ("checkpoint.patience_seconds=600",)


def fail_saves(patch: pytest.MonkeyPatch, code: int, where: pathlib.Path, times: int) -> list[int]:
    """Lets the first `times` saves below `where` fail: half of them at once, half later."""
    steps: list[int] = []
    save, note = Checkpointer.save, Checkpointer.note

    def failing(self: Checkpointer, state, about) -> None:
        if pathlib.Path(self.directory).is_relative_to(where) and len(steps) < times:
            steps.append(int(state.step))
            if len(steps) % 2:
                raise OSError(code, "no luck")
            self.later = True  # as an error of the thread that writes
            return
        save(self, state, about)

    def told(self: Checkpointer) -> None:
        if getattr(self, "later", False):
            self.later = False
            raise ValueError(f"TensorStore says so [os_error_code='{code}']")
        note(self)

    patch.setattr(Checkpointer, "save", failing)
    patch.setattr(Checkpointer, "note", told)
    return steps


@pytest.mark.long
@pytest.mark.parametrize("code", [
    errno.EIO, pytest.param(errno.ENOSPC, marks=pytest.mark.slow)])
def test_a_run_outlives_saves_that_fail(code, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmjax.training.saving.RETRY_SECONDS", 0.0)
    steps = fail_saves(monkeypatch, code, tmp_path, times=5)
    assert run_here(tmp_path / "run", *FINISHED, *PATIENT) == 0
    assert capsys.readouterr().err.count("the run goes on and tries again") == 5 == len(steps)
    assert checkpoint_steps(tmp_path / "run/checkpoints")[-1] == 6
    assert_same_run(finished, tmp_path / "run", ["metrics.jsonl"])


@pytest.mark.slow
def test_a_run_that_can_never_save_leaves_its_newest_state_elsewhere(
        finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_saves(patch, errno.EIO, run, times=1000)
        assert run_here(run, *FINISHED, "checkpoint.patience_seconds=2") == 1
    found = re.search(r"within 2.* the newest state is in (\S+/tmp/rescued-run-\w+/\d)[:;]",
                      one_line(capsys.readouterr().err))
    rescued = pathlib.Path(found[1])
    (run / "checkpoints").mkdir(exist_ok=True)
    rescued.rename(run / "checkpoints" / rescued.name)
    assert run_here(run, *FINISHED) == 0
    assert f"resuming at step {rescued.name}" in capsys.readouterr().err
    assert_same_run(finished, run, ["metrics.jsonl"])


def test_what_has_gone_is_not_waited_for(tmp_path):
    class Gone:
        def save(self, state, about):
            raise FileNotFoundError("the mount has gone")

    with pytest.raises(FileNotFoundError):
        Saver(Gone(), 600.0, tmp_path, print).save(None, {})


class Late:
    """A checkpointer whose saves all begin; the first `bad` of them fail in the background."""

    def __init__(self, bad: int):
        self.bad, self.saving, self.newest, self.begun, self.directory = bad, 0, 0, 0, "here"

    def save(self, state, about):
        self.begun, self.saving = self.begun + 1, state.step

    def wait(self):
        step, self.saving = self.saving, 0
        if step and self.begun <= self.bad:
            raise ValueError(f"TensorStore says so [os_error_code='{errno.EIO}']")
        self.newest = max(self.newest, step)

    note = wait

    def renew(self):
        self.saving = 0


@pytest.fixture
def clock(monkeypatch):
    """Stands for the time in which `Saver` thinks; sleeping moves it on."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(saving, "time", types.SimpleNamespace(
        monotonic=lambda: now.seconds,
        sleep=lambda seconds: setattr(now, "seconds", now.seconds + seconds)))
    return now


@pytest.fixture
def rescued(monkeypatch, tmp_path):
    """The (directory, step) of all that is rescued; each holds a file afterwards."""
    found = []

    class Rescue:
        def __init__(self, directory, log):
            self.directory, self.close = directory, lambda: None

        def save(self, state, about):
            assert not any(self.directory.iterdir())
            (self.directory / str(state.step)).touch()
            found.append((self.directory, state.step))

    monkeypatch.setattr(saving, "Checkpointer", Rescue)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return found


def state_of(step: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(step=step)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_state_is_rescued_even_if_every_failure_comes_late(clock, rescued, tmp_path, at_the_end):
    saver, steps = Saver(Late(bad=1000), 60.0, tmp_path, print), iter(range(2, 1000))
    saver.save(state_of(1), {})
    if at_the_end:
        with pytest.raises(OSError, match="the newest state is in"):
            saver.finish(lambda: saver.save(state_of(next(steps)), {}))
    else:
        with pytest.raises(OSError, match="the newest state is in"):
            for step in steps:  # a step takes a second
                clock.seconds += 1
                saver.note()
                if saver.due:
                    saver.save(state_of(step), {})
    assert 60 <= clock.seconds < 70
    assert [place for place, _ in rescued] == [tmp_path / "rescued"]
    assert rescued[0][1] == (next(steps) - 1 if at_the_end else step)


def test_nothing_that_was_rescued_is_touched(rescued, tmp_path):
    """Neither by the same run nor by another one of the same name."""
    error = OSError(errno.EIO, "no luck")
    works = [tmp_path / "a/run", tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c/run"]
    for work in works[:1]:
        work.mkdir(parents=True)
    for work in works:  # b and c do not exist: the directory of temporary files is taken
        found = Saver(Late(bad=0), 60.0, work, print)._rescued(state_of(3), {}, error)
        assert str(rescued[-1][0] / "3") in str(found)
    places = [place for place, _ in rescued]
    assert len(set(places)) == 4 and all((place / "3").exists() for place in places)
    assert places[0] == tmp_path / "a/run/rescued" == places[1].parent
    assert all(place.parent == tmp_path for place in places[2:])


def test_a_retry_that_is_on_its_way_is_not_repeated(clock, tmp_path):
    checkpointer = Late(bad=1)
    saver = Saver(checkpointer, 600.0, tmp_path, print)
    saver.save(state_of(1), {})
    saver.note()
    clock.seconds += saving.RETRY_SECONDS
    assert saver.due and saver.save(state_of(2), {})
    clock.seconds += 100
    assert saver.is_failing and not saver.due
    saver.note()
    assert not saver.is_failing and checkpointer.begun == 2


def test_the_weights_of_the_best_step_are_read_after_a_failed_save(clock, tmp_path):
    checkpointer = Late(bad=1)
    checkpointer.with_weights_of = lambda best, spec, state: (best, checkpointer.wait())
    run = types.SimpleNamespace(
        best=types.SimpleNamespace(step=1), checkpointer=checkpointer, spec=None,
        recipe=types.SimpleNamespace(checkpoint=types.SimpleNamespace(keep_best=True)),
        saver=Saver(checkpointer, 600.0, tmp_path, print))
    run.saver.save(state_of(2), {})
    assert Run.best_of(run, 2, None) == (1, None)
    assert run.saver.is_failing


def test_without_patience_a_failed_save_ends_a_rewind(tmp_path):
    """So it does with several processes, which could not agree on what was saved."""
    saver = Saver(Late(bad=1), 0.0, tmp_path, print)
    saver.save(state_of(1), {})
    with pytest.raises(ValueError, match="os_error_code"):
        saver.settle()


def test_a_rewind_does_not_read_a_save_that_has_failed(tmp_path):
    """Orbax lists the step of a save that is on its way, even if it then fails."""
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.manager = types.SimpleNamespace(all_steps=lambda: [8])
    checkpointer.renew()
    assert checkpointer.restore(None, None) is None
    checkpointer.close()
