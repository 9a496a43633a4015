"""A directory that one process at a time works in."""

import fcntl
import os
from pathlib import Path


class Busy(ValueError):
    """Another process is at work there. It may have ended the next time, so a launcher may try again."""


def claim(directory: str | Path, out: str | Path) -> int:
    """Makes `directory`, or finds it, and holds it for this process alone, to make `out` in it.

    Returns the file descriptor of a lock, to be closed in the end; it dies with its process, too.

    Raises:
      Busy: another process holds it.
    """
    os.makedirs(directory, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(directory)):
            raise BlockingIOError  # the other process has just finished, and renamed it
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise Busy(f"{out}: expected nobody else at work there, got another process that is making it; wait "
                   "until it has ended") from None
    return lock
