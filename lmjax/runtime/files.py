"""A directory that one process at a time works in."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmjax.errors import UserError


class Busy(UserError):
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
        raise Busy("nobody else at work there", "another process that is making it", "wait until it has ended",
                   where=str(out)) from None
    return lock


@contextlib.contextmanager
def when_full(say: Exception) -> Iterator[None]:
    """Raises `say` where the block meets a full disk, however a library words that (TensorStore, NumPy)."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or re.search(r"No space left|RESOURCE_EXHAUSTED|^\d+ requested and \d+ written", str(error)):
            raise say from error
        raise


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """An empty directory to write into, which becomes `out` when the block is done and goes if it fails.

    Raises:
      ValueError: `out` is there already, or another process is making it.
    """
    out = out.expanduser().absolute()
    part = out.with_name(f".{out.name}.part")
    lock = claim(part, out)
    try:
        if out.exists():
            raise ValueError(f"--out: expected a directory that does not exist yet, got {out}; choose another")
        _empty(part)  # of what a killed process has left
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
