"""What a working directory remembers of its checkpoints, wherever they are: saved.json.

A start that does not find the newest of them would begin again at step 0, and cut the records.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from etils import epath

from lmjax.errors import UserError, first_line
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.statistics import FOLDER
from lmjax.runtime.files import write_whole
from lmjax.training.checkpoint import checkpoint_steps
from lmjax.training.recipe import Recipe

FILE = "saved.json"


@dataclasses.dataclass
class Saved:
    """The newest checkpoint of a run, as saved.json names it."""

    directory: str = ""  # of the checkpoints
    step: int = 0  # of the newest complete checkpoint; 0: none
    evaluated: int = 0  # the newest step whose evaluation and samples are complete
    abandoned: int = 0  # the last step that `checkpoint.abandon` gave up: it does so only once

    def write(self, workdir: Path) -> None:
        """Writes the file."""
        write_whole(workdir / FILE, json.dumps(dataclasses.asdict(self)) + "\n")


def read_saved(workdir: Path, directory: str) -> Saved:
    """Returns what a run has saved.

    Runs older than saved.json are judged by the events of timing.jsonl. An event `checkpoint` says
    only that a save began; a directory without a commit file is an unfinished save.

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
        if row.get("event") in ("start", "resume"):  # nothing newer was there
            steps = [0, row["step"]]
        elif row.get("event") == "checkpoint":
            steps.append(row["step"])
    newest = max(steps)
    if (epath.Path(directory) / str(newest)).exists() and newest not in checkpoint_steps(directory):
        newest = max((step for step in steps if step != newest), default=0)
    return Saved(directory, newest)


def find_saved(recipe: Recipe, workdir: Path) -> Saved:
    """Returns what the run has saved, if that is where the recipe looks for it.

    Raises:
      UserError: the newest checkpoint is not there, and `checkpoint.abandon` does not give it up.
    """
    directory = recipe.checkpoint.path(workdir)
    saved = read_saved(workdir, directory)
    newest = max(checkpoint_steps(directory), default=0)
    if newest >= saved.step or given_up(recipe, saved) == saved.step:
        return saved
    fix = f"bring it back to there from {saved.directory} (is a mount missing?)"
    if saved.directory == directory:
        fix = "bring it back (is a mount missing?)"
    elif "://" not in saved.directory and saved.step in checkpoint_steps(saved.directory):
        fix = f"set config.checkpoint.directory={saved.directory}, where it is"
    raise UserError(f"the checkpoint of step {saved.step}, the newest that this run has saved",
                    f"none after step {newest}" if newest else "no checkpoint",
                    f"{fix}, or give it up and go on from step {newest} with "
                    f"--config.checkpoint.abandon={saved.step}"
                    + " (and saved.json moved away, for it was given up once before)"
                    * (saved.abandoned == saved.step), where=directory)


def given_up(recipe: Recipe, saved: Saved) -> int:
    """Returns the step that `checkpoint.abandon` gives up; 0 if it has been given up before."""
    abandon = recipe.checkpoint.abandon
    return 0 if abandon == saved.abandoned else abandon


def keep_records(workdir: Path, step: int) -> Path:
    """Copies the records of a run whose steps up to `step` are given up; returns the folder."""
    names = [f"abandoned-{step}", *(f"abandoned-{step}.{i}" for i in range(1, 1000))]
    folder = next(workdir / name for name in names if not (workdir / name).exists())
    folder.mkdir()
    for file in workdir.glob("*.jsonl"):
        shutil.copy2(file, folder)
    if (workdir / FOLDER).is_dir():
        shutil.copytree(workdir / FOLDER, folder / FOLDER)
    return folder
