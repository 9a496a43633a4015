"""What a working directory remembers of its checkpoints, wherever they are: saved.json.

A start that does not find the newest of them would begin again at step 0, and cut the records.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from lmjax.errors import UserError, first_line
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.runtime.files import write_whole
from lmjax.training.checkpoint import checkpoint_steps, read_about
from lmjax.training.recipe import Recipe

FILE = "saved.json"


@dataclasses.dataclass
class Saved:
    """The newest checkpoint of a run, as saved.json names it."""

    directory: str = ""  # of the checkpoints
    step: int = 0  # of the newest complete checkpoint; 0: none
    evaluated: int = 0  # the newest saved step whose evaluation and samples are complete

    def write(self, workdir: Path, **changed: Any) -> None:
        """Changes these fields and writes the file."""
        for name, value in changed.items():
            setattr(self, name, value)
        write_whole(workdir / FILE, json.dumps(dataclasses.asdict(self)) + "\n")


def read_saved(workdir: Path, directory: str) -> Saved:
    """Returns what a run has saved.

    Before there was a saved.json, the run's events told of checkpoints that were begun. The last of
    them may never have become complete: then its directory lies there without a commit file.

    Args:
      workdir: the run's directory.
      directory: of its checkpoints.

    Raises:
      UserError: the file is damaged.
    """
    file = workdir / FILE
    if file.exists():
        try:
            return Saved(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError("a JSON object of directory, step and evaluated", first_line(error),
                            "move the file away to go by timing.jsonl", where=str(file)) from None
    steps = [0]
    for row in read_jsonl(workdir / "timing.jsonl"):
        if row.get("event") == "start":  # nothing was there to resume from
            steps = [0]
        elif row.get("event") in ("checkpoint", "resume"):
            steps.append(row["step"])
    newest = max(steps)
    if (Path(directory) / str(newest)).exists() and newest not in checkpoint_steps(directory):
        newest = max(step for step in steps if step != newest)
    return Saved(directory, newest)


def find_saved(recipe: Recipe, workdir: Path) -> Saved:
    """Returns what the run has saved, if that is where the recipe looks for it.

    Raises:
      UserError: the newest checkpoint is not there, and `checkpoint.abandon` does not give it up.
    """
    directory = recipe.checkpoint.path(workdir)
    saved = read_saved(workdir, directory)
    newest = max(checkpoint_steps(directory), default=0)
    if newest >= saved.step or recipe.checkpoint.abandon == saved.step:
        return saved
    fix = f"bring it back to there from {saved.directory} (is a mount missing?)"
    if saved.directory == directory:
        fix = "bring it back (is a mount missing?)"
    elif "://" not in saved.directory and saved.step in checkpoint_steps(saved.directory):
        fix = f"set config.checkpoint.directory={saved.directory}, where it is"
    raise UserError(f"the checkpoint of step {saved.step}, the newest that this run has saved",
                    f"none after step {newest}" if newest else "no checkpoint",
                    f"{fix}, or give it up and go on from step {newest} with "
                    f"--config.checkpoint.abandon={saved.step}", where=directory)


def keep_records(workdir: Path, step: int) -> Path:
    """Copies the records of a run whose steps up to `step` are given up; returns the folder."""
    names = [f"abandoned-{step}", *(f"abandoned-{step}.{i}" for i in range(1, 1000))]
    folder = next(workdir / name for name in names if not (workdir / name).exists())
    folder.mkdir()
    for file in workdir.glob("*.jsonl"):
        shutil.copy2(file, folder)
    return folder


@dataclasses.dataclass
class RunStatus:
    """What a directory tells of its run, without reading any array."""

    directory: str  # of the checkpoints
    saved: list[int]  # steps of the complete checkpoints, oldest first
    reached: int  # the newest step that the records know; a kill loses those after the last saved
    steps: int  # train.steps; 0 if no config is left
    problems: list[str]  # why it is not whole; empty if it is


def run_status(workdir: Path) -> RunStatus | None:
    """Returns the status of the run in `workdir`; None if it is not the directory of a run.

    The checksums of the arrays are not computed; that of each checkpoint's record is.
    """
    config, problems = workdir / "config.json", []
    default = workdir / "checkpoints"
    if not (config.exists() or (workdir / FILE).exists() or checkpoint_steps(default)):
        return None
    recipe: dict[str, Any] = {}
    try:
        recipe = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        problems.append(f"config.json: {first_line(error)}")
    directory = recipe.get("checkpoint", {}).get("directory") or str(default.absolute())
    found = checkpoint_steps(directory)
    reached = 0
    try:
        reached = max((row["step"] for row in read_jsonl(workdir / "metrics.jsonl")), default=0)
        saved = read_saved(workdir, directory)
        if max(found, default=0) < saved.step:
            problems.append(f"the checkpoint of step {saved.step} is not in {directory}")
    except UserError as error:
        problems.append(str(error))
    for step in found:
        try:
            read_about(f"{directory}/{step}")
        except UserError as error:
            problems.append(str(error))
    return RunStatus(directory, found, reached, recipe.get("train", {}).get("steps", 0), problems)
