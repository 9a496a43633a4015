"""The working directory of a run: one process writes into it, and it belongs to one recipe."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmjax.config import plain
from lmjax.errors import UserError
from lmjax.runtime.distributed import agreed, process
from lmjax.runtime.files import Busy, check_writable, lock
from lmjax.training.changes import blocking_changes
from lmjax.training.recipe import Recipe, build_recipe, recorded_recipe
from lmjax.training.run import Log


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Makes the directory if it is missing and holds it for this run.

    Raises:
      UserError: it is not a local directory, or it cannot be written.
      Busy: another process trains in it.
    """
    if ":/" in str(workdir):
        raise UserError("a local directory", workdir, "keep the run local or on a mounted file "
                        "system (data.directory and checkpoint.directory may be in a bucket)",
                        where="--workdir")
    check_writable(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    busy = Busy("a directory that no run is using", "one that another process trains in",
                "wait for it or use another --workdir", where=str(workdir))
    held: list[int] = []
    flags = os.O_RDWR | os.O_CREAT
    agreed(lambda: held.append(lock(workdir / ".lock", busy, flags)))  # by process 0
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def check_places(recipe: Recipe, workdir: Path) -> None:
    """Refuses directories that the run cannot write, before data is prepared for hours.

    `prepare` checks the directory of the data, if there is something to prepare.

    Raises:
      UserError: an error of `check_writable`.
    """
    check_writable(recipe.checkpoint.path(workdir), "config.checkpoint.directory")
    if recipe.watch.profile:
        check_writable(workdir / "profile", "config.watch.profile")
    if recipe.watch.hlo and process() == 0:  # which writes it
        check_writable(recipe.watch.hlo, "config.watch.hlo")


def check_recipe(recipe: Recipe, workdir: Path, log: Log) -> None:
    """Refuses a directory whose config.json is of another run; logs what changed otherwise.

    Raises:
      UserError: the recipes differ in what makes the run, or config.json is damaged.
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text())
        if not isinstance(before, dict):
            raise ValueError(f"{before!r:.40}")
    except ValueError as error:
        raise UserError("a config as JSON", error, "the file is damaged, move it away to go by the "
                        "checkpoints alone", where=str(file)) from None
    for change in same_run(workdir, before, plain(recipe)):
        log(f"changed since the last start: {change}")


def same_run(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the harmless changes between two plain recipes.

    Raises:
      UserError: other changes, which would make another run.
    """
    for build in (recorded_recipe, build_recipe):  # the second expands paths, if they can be
        with contextlib.suppress(UserError):  # a key that no longer exists is told as a change
            before = plain(build(before))  # gives newer keys their defaults
    blocking, harmless = blocking_changes(before, now)
    if blocking:
        raise UserError("the config that this run was started with", "; ".join(blocking),
                        "use another --workdir or undo the change", where=str(workdir))
    return harmless
