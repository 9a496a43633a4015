"""Saves that fail do not end a run: it goes on, tries again, and rescues its newest state."""

import errno
import pathlib
import re
import tempfile

import pytest
from processes import FINISHED, assert_same_run, one_line, run_here

from lmjax.training.checkpoint import Checkpointer, checkpoint_steps
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
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_saves(patch, errno.EIO, run, times=1000)
        assert run_here(run, *FINISHED, "checkpoint.patience_seconds=2") == 1
    found = re.search(r"within 2.* the newest state is in (\S+/tmp/rescued-run/\d)[:;]",
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
