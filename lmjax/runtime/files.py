"""Files and directories: locks, whole writes, directories made in one piece, full disks."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmjax.errors import UserError

# How TensorStore and NumPy word a full disk.
FULL = r"No space left|RESOURCE_EXHAUSTED|^\d+ requested and \d+ written"


class Busy(UserError):
    """Another process works in the same place. It may end soon, so a launcher may try again."""


def lock(path: str | Path, busy: Busy, flags: int) -> int:
    """Locks a file or directory for this process alone.

    Args:
      path: the file or directory.
      busy: what to raise if another process holds the lock.
      flags: of `os.open`; with O_CREAT a missing file is made.

    Returns:
      A file descriptor. Closing it releases the lock, and so does the end of the process.

    Raises:
      Busy: `busy`, if another process holds the lock.
      FileNotFoundError: there is nothing at `path`, and `flags` lack O_CREAT.
    """
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise busy from None
    return descriptor


def claim(directory: str | Path, out: str | Path) -> int:
    """Makes `directory` if it is missing and locks it, so that one process alone makes `out` in it.

    Returns:
      The file descriptor of the `lock`.

    Raises:
      Busy: another process makes `out`.
    """
    busy = Busy("nobody else at work there", "another process that is making it",
                "wait until it has ended", where=str(out))
    os.makedirs(directory, exist_ok=True)
    try:
        descriptor = lock(directory, busy, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # the other process finished a moment ago and renamed the directory
        raise busy from None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    os.close(descriptor)  # renamed likewise, between opening and locking
    raise busy


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one piece: a kill at any moment leaves the old content or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def when_full(error_to_raise: Exception) -> Iterator[None]:
    """Raises `error_to_raise` if the block meets a full disk.

    TensorStore and NumPy report that with errors of their own.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or re.search(FULL, str(error)):
            raise error_to_raise from error
        raise


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes `out` when the block is done.

    If the block fails, the directory is removed.

    Raises:
      UserError: `out` exists already.
      Busy: another process makes `out`.
    """
    out = out.expanduser().absolute()
    part = out.with_name(f".{out.name}.part")
    descriptor = claim(part, out)
    try:
        if out.exists():
            raise UserError("a directory that does not exist yet", out, "choose another",
                            where="--out")
        _empty(part)  # a killed process may have left files
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
