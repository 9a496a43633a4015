"""Files and directories: what can be written, locks, whole writes, new directories, full disks."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lmjax.errors import UserError, first_line

# How TensorStore words an error of the system, and how NumPy and buckets word a full disk.
CODE = re.compile(r"\[os_error_code='(\d+)'\]")
FULL = r"No space left|RESOURCE_EXHAUSTED|^\d+ requested and \d+ written"


def check_writable(path: str | os.PathLike[str], where: str, *, file: bool = False) -> None:
    """Refuses a path that cannot be written, before the work whose result goes there.

    What is missing counts as writable if it can be made. Nothing is made or changed.

    Args:
      path: a local path, or the address of a bucket, which is not checked.
      where: the key or option that it comes from, for errors.
      file: whether a file goes there. By default it is a directory with files in it.

    Raises:
      UserError: a file or a broken link is in the way, or the system does not let this process
        write.
    """
    if "://" in os.fspath(path):
        return
    for place in (Path(path), *Path(path).parents):
        try:
            _try_to_write(place, file and place == Path(path))
            return
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            if is_missing and not os.path.lexists(place):
                continue  # it will be made, if the directory above it can be written
            raise _not_writable(place, error, "file" if file else "directory", where) from error


def _try_to_write(place: Path, is_file: bool) -> None:
    """Opens a file, or makes one without a name in a directory: permissions do not tell it all."""
    mode = os.stat(place).st_mode
    if is_file and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not is_file and not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not is_file:
        with tempfile.TemporaryFile(dir=place):
            pass
    elif stat.S_ISREG(mode):  # a pipe would wait for its reader
        with place.open("ab"):
            pass


def _not_writable(place: Path, error: OSError, kind: str, where: str) -> UserError:
    got = f"{place}, which is not ({(error.strerror or str(error)).lower()})"
    fix = "correct its permissions, or choose another path"
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        got = f"the {'file' if isinstance(error, NotADirectoryError) else 'directory'} {place}"
        fix = "move it away, or choose another path"
    elif isinstance(error, FileNotFoundError) and place.is_symlink():
        got = f"the link {place}, which leads nowhere"
        fix = "make what it points to (is a mount missing?), or remove it"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "make room, or choose another path"
    return UserError(f"a {kind} that can be written", got, fix, where=where)


def check_new(out: Path) -> None:
    """Refuses a directory of `--out` that exists already or cannot be made.

    Raises:
      UserError: something is there, if only a link, or an error of `check_writable`.
    """
    if os.path.lexists(out):
        raise UserError("a directory that does not exist yet", out, "choose another",
                        where="--out")
    check_writable(out.parent, "--out")


def cache_directory(name: str, given: str, where: str, *,
                    read: bool = True) -> tuple[Path | None, bool]:
    """Finds the directory of a cache: `given`, or ~/.cache/lmjax/NAME if that is "".

    A line on stderr tells if it cannot be written. With `read`, it may still be read.

    Returns:
      The directory, None if it can be neither written nor read, and whether it can be written.
    """
    folder = None
    try:
        folder = Path(given) if given else Path.home() / ".cache" / "lmjax" / name
        check_writable(folder, where)
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        error = UserError("a home directory for the cache", "none", "set HOME or this variable",
                          where=where)
    except UserError as found:
        error = found
    else:
        return folder, True
    is_readable = (read and folder is not None and folder.is_dir()
                   and os.access(folder, os.R_OK | os.X_OK))
    what = "reading a cache and adding nothing to it" if is_readable else "going on without a cache"
    print(f"{what}: {error}", file=sys.stderr, flush=True)
    return folder if is_readable else None, False


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


def of_the_system(error: BaseException) -> BaseException:
    """Returns the OSError that TensorStore has put into words; any other error as it is."""
    found = CODE.search(str(error))
    if not found or isinstance(error, (OSError, UserError)):
        return error
    number = int(found[1])
    return OSError(number, f"{os.strerror(number)} ({first_line(error)})")


@contextlib.contextmanager
def when_full(error_to_raise: Exception) -> Iterator[None]:
    """Raises `error_to_raise` if the block meets a full disk.

    TensorStore and NumPy report that with errors of their own.
    """
    try:
        yield
    except Exception as error:
        found = of_the_system(error)
        number = found.errno if isinstance(found, OSError) else None  # NumPy's have none
        if number in (errno.ENOSPC, errno.EDQUOT) or (
                number is None and re.search(FULL, str(error))):
            raise error_to_raise from error
        raise


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes `out` when the block is done.

    If the block fails, the directory is removed.

    Raises:
      UserError: an error of `check_new`.
      Busy: another process makes `out`.
    """
    out = out.absolute()
    part = out.with_name(f".{out.name}.part")
    check_new(out)
    descriptor = claim(part, out)
    try:
        check_new(out)  # another process may have made it since
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
