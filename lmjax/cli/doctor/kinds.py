"""The kinds of path that the doctor knows, as a table."""

import difflib
import os
from collections.abc import Callable
from typing import NamedTuple

from lmjax.cli.doctor import data, models, runs
from lmjax.cli.doctor.diagnosis import BAD, Diagnosis


class Kind(NamedTuple):
    """A kind of path: how it is recognised, and what examines it."""

    recognises: Callable[[str], bool]  # cheap: looks at names and at the first bytes of a file
    examine: Callable[[str, bool], Diagnosis]  # (path, whether to read all of it)


# In the order in which they are tried: the first row that recognises a path examines it.
KINDS = (
    Kind(data.is_prepared, data.examine_prepared),
    Kind(data.is_unfinished, data.examine_unfinished),
    Kind(runs.is_checkpoint, runs.examine_checkpoint),
    Kind(runs.is_run, runs.examine_run),
    Kind(runs.is_checkpoints, runs.examine_checkpoints),
    Kind(models.is_model, models.examine_model),
)


def diagnose(path: str, *, whole: bool = True) -> Diagnosis:
    """Says what `path` is.

    Args:
      path: a local path, a bucket, or a source of text such as jsonl:books/*.jsonl.
      whole: whether to read weights and tokens to their end.
    """
    for kind in KINDS:
        if kind.recognises(path):
            return kind.examine(path, whole)
    return _unknown(path)


def _unknown(path: str) -> Diagnosis:
    """Says what there is instead of something that lmjax knows."""
    if not os.path.lexists(path):
        found = Diagnosis(path, "not there")
        parent = os.path.dirname(os.path.abspath(path))
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent)
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(parent), n=3)
        found.add(BAD, "path", f"the last part that exists is {parent}"
                  + f"; similar names there: {', '.join(near)}" * bool(near))
    elif os.path.isdir(path):
        names = sorted(os.listdir(path))
        found = Diagnosis(path, "a directory that holds nothing lmjax knows")
        found.add(BAD, "files", ", ".join(names[:8]) + ", ..." * (len(names) > 8) or "none")
    else:
        found = Diagnosis(path, "a file that lmjax does not know")
        found.add(BAD, "content", f"{os.path.getsize(path):,} bytes")
    return found

