"""Which files a source has: a pattern's matches, or the standard library's."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import re
import stat
import sysconfig
from collections.abc import Iterable

from lmjax.errors import UserError

STDLIB_SUFFIXES = {".py", ".txt", ".rst", ".md", ".html", ".c", ".h"}
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}

Files = list[tuple[str, str]]  # (id, path) of each


def matching(pattern: str) -> Files:
    """The files that match, sorted by path; the id is the path after the part without wildcards.

    A file that is there several times, through links, comes once.

    Raises:
      UserError: nothing matches, or something that cannot be read as a file does.
    """
    if os.path.isdir(pattern):
        raise UserError("files", f"the directory {pattern}", f"write {pattern.rstrip('/')}/**/*")
    exact = os.path.lexists(pattern)
    base = os.path.dirname(pattern if exact else re.split(r"[*?\[]", pattern)[0])
    found = [pattern] if exact else glob.glob(pattern, recursive=True)
    if not exact:
        _check_folders(pattern, found)
    files: dict[tuple[int, int] | str, list[str]] = {}
    for path in sorted(set(found)):
        if (file := _file(path)) is not None:
            files.setdefault(file, []).append(path)
    if not files:
        where = "" if os.path.isdir(base or ".") else f" ({base} does not exist)"
        raise UserError("files that match", f"none{where}", "correct the path or the wildcards")
    kept = sorted(paths[0] if len(paths) == 1 else min(paths, key=lambda p: (_in_a_loop(p), p))
                  for paths in files.values())
    return [(_name(os.path.relpath(path, base or ".")), path) for path in kept]


def stdlib(rest: str) -> Files:
    """The files of Python's standard library that hold text."""
    if rest != "python-stdlib":
        raise UserError("builtin:python-stdlib", f"builtin:{rest}", "correct the uri")
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        files += [os.path.join(folder, n) for n in names
                  if os.path.splitext(n)[1] in STDLIB_SUFFIXES]
    return sorted((_name(os.path.relpath(path, root)), path) for path in files)


def _file(path: str) -> tuple[int, int] | str | None:
    """What makes a file the same under two names; None for what is no file of its own."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP and _in_a_loop(path):
            return None  # the same file has a shorter name
        what = "a link to nothing" if os.path.islink(path) else str(error)
        raise UserError("files that can be read", f"{path}, {what}",
                        "restore what it points to, or remove the link") from error
    if stat.S_ISDIR(found.st_mode):
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise UserError("regular files", f"{path}, {kind}", "write its content to a file first")
    # Some mounts number all files 0, or several alike: only hard links go by their number.
    is_linked = found.st_nlink > 1 and found.st_ino
    return (found.st_dev, found.st_ino) if is_linked else os.path.realpath(path)


def _check_folders(pattern: str, found: Iterable[str]) -> None:
    """Raises a UserError where files would be passed over without a word."""
    if os.path.splitext(pattern)[1]:  # `*.parquet` means files: Spark writes folders of that name
        for path in found:
            if os.path.isdir(path):
                raise UserError("files", f"the directory {path}",
                                f"write {os.path.join(pattern, '*')} to read the files in it")
    folders = pattern
    while (folders := os.path.dirname(folders)) and glob.has_magic(folders):
        for folder in glob.glob(f"{folders}/", recursive=True):
            if not os.access(folder, os.R_OK | os.X_OK):
                raise UserError("folders that can be read", f"{folder}, which cannot",
                                "correct its permissions")


def _in_a_loop(path: str) -> bool:
    """Whether a link on the way leads back to a folder above it."""
    names = os.path.abspath(os.path.dirname(path)).split(os.sep)
    real = [os.path.realpath(folder)
            for folder in itertools.accumulate(names, lambda a, b: f"{a}/{b}") if folder]
    return len(set(real)) < len(real)


def _name(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace").replace(os.sep, "/")
