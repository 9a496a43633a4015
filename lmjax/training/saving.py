"""Saving with patience: a save that fails is tried again, and the run goes on meanwhile."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from lmjax.errors import first_line
from lmjax.monitoring.units import human_seconds
from lmjax.runtime.files import of_the_system
from lmjax.training.checkpoint import About, Checkpointer
from lmjax.training.state import TrainState

RETRY_SECONDS = 30.0  # between two tries, at most
# A directory or a mount that has gone: what was saved is not there either, so a run ends at once.
GONE = (FileNotFoundError, NotADirectoryError)


class Saver:
    """Saves the states of a run.

    Args:
      checkpointer: of the run.
      patience: seconds in which saves may fail before the run ends; 0: it ends at once. Several
        processes could not agree on when to try again: they always end at once.
      workdir: of the run; the newest state goes there, or to the directory of temporary files, if
        the run ends because it cannot be saved.
      log: told of failures.
    """

    def __init__(self, checkpointer: Checkpointer, patience: float, workdir: Path,
                 log: Callable[[str], None]):
        self.checkpointer, self.workdir, self.log = checkpointer, workdir, log
        self.patience = patience if jax.process_count() == 1 else 0.0
        self._failing_since: float | None = None
        self._next = 0.0  # when to try again
        self._newest = 0  # the newest complete checkpoint when a save failed
        self._last: Exception | None = None  # the failure at which patience was over

    @property
    def is_failing(self) -> bool:
        """Whether the newest save has failed."""
        return self._failing_since is not None

    @property
    def due(self) -> bool:
        """Whether a save has failed and it is time to try again."""
        return (self.is_failing and not self.checkpointer.saving
                and time.monotonic() >= self._next)

    def save(self, state: TrainState, about: About) -> bool:
        """Saves a state as `Checkpointer.save` does; returns whether it has begun.

        Raises:
          OSError: saves have failed for too long. The state is saved elsewhere.
        """
        try:
            if self._last:
                raise self._last
            self.checkpointer.save(state, about)
        except Exception as error:  # noqa: BLE001 - TensorStore raises errors of its own
            if self._failed(error) and not self._last:
                return False
            if rescued := self._rescued(state, about, of_the_system(error)):
                raise rescued from error
            raise
        return True

    def note(self) -> None:
        """Calls `Checkpointer.note`; if a save has failed, the next call of `save` tells."""
        self._attempt(self.checkpointer.note)

    def settle(self) -> bool:
        """Waits for the save that is on its way; returns whether it did not fail."""
        return self._attempt(self.checkpointer.wait)

    def finish(self, save: Callable[[], bool]) -> None:
        """Returns when the newest state is complete on the disk.

        Args:
          save: saves it again.

        Raises:
          OSError: saves have failed for too long.
        """
        while not (self.settle() and not self.is_failing):
            time.sleep(max(self._next - time.monotonic(), 0.0))
            save()

    def _attempt(self, do: Callable[[], None]) -> bool:
        """Returns whether what was saved before is complete, or still on its way."""
        try:
            do()
        except Exception as error:  # noqa: BLE001
            if not self._failed(error):
                raise
            return False
        if self.checkpointer.newest > self._newest:
            self._failing_since = None
        return True

    def _failed(self, error: Exception) -> bool:
        """Notes a failed save; returns whether another call of `save` is to come.

        The error may come while no state is at hand. So when patience is over, the next call of
        `save`, which is due at once, ends the run.
        """
        found = of_the_system(error)
        if not self.patience or not isinstance(found, OSError) or isinstance(found, GONE):
            return False
        now = time.monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        left = self.patience - (now - self._failing_since)
        self._next = now + max(min(RETRY_SECONDS, self.patience / 10, left), 0.0)
        self._newest = self.checkpointer.newest
        self.checkpointer.renew()
        if left <= 0:
            self._last = error
            return True
        self.log(f"a checkpoint could not be written ({first_line(found)}); the run goes on and "
                 f"tries again for {human_seconds(left)}")
        return True

    def _rescued(self, state: TrainState, about: About, error: BaseException) -> OSError | None:
        """Saves the state elsewhere; returns the error that says where, None if it cannot."""
        if not (self.patience and isinstance(error, OSError)) or isinstance(error, GONE):
            return None
        for make in (self._beside, self._temporary):
            try:
                place = make().absolute()
                rescue = Checkpointer(place, log=self.log)
                rescue.save(state, about)
                rescue.close()
            except Exception:  # noqa: BLE001 - the next place may do
                continue
            where = place / str(int(state.step))
            return OSError(error.errno, f"{self.checkpointer.directory}: expected to save within "
                           f"{human_seconds(self.patience)}, got {os.strerror(error.errno or 0)}; "
                           f"the newest state is in {where}: make room or mend the disk, move it "
                           "there and run the same command again")
        return None

    def _beside(self) -> Path:
        """Makes a directory in WORKDIR without checkpoints: a save deletes old ones."""
        place = self.workdir / "rescued"
        place.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=place)) if any(place.iterdir()) else place

    def _temporary(self) -> Path:
        """Makes a directory for temporary files; runs of the same name get others."""
        return Path(tempfile.mkdtemp(prefix=f"rescued-{self.workdir.absolute().name}-"))
