"""The kinds of path that the doctor knows, as a table."""

import difflib
import os
from collections.abc import Callable
from typing import NamedTuple

from lmjax.cli.doctor import corpora, data, models, runs
from lmjax.cli.doctor.diagnosis import BAD, NOTE, Diagnosis, Finding
from lmjax.config.paths import expand, is_bucket
from lmjax.errors import UserError
from lmjax.runtime.files import check_writable


def is_recipe(path: str) -> bool:
    """Whether `path` is a Python file with a get_config()."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return "def get_config(" in file.read()


def examine_recipe(path: str, whole: bool) -> Diagnosis:
    """Says what a recipe is for. It is not run: it is a program."""
    found = Diagnosis(path, "a recipe: a Python file with get_config()")
    found.add(NOTE, "content", "not run; `lmjax plan` builds its config and tells of mistakes")
    found.uses += [f"lmjax train --config {path} --workdir DIR",
                   f"lmjax plan --config {path} --topology cpu"]
    return found


class Kind(NamedTuple):
    """A kind of path: how it is recognised, and what examines it."""

    recognises: Callable[[str], bool]  # cheap: looks at names and at the first bytes of a file
    examine: Callable[[str, bool], Diagnosis]  # (path, whether to read all of it)


# In the order in which they are tried: the first row that recognises a path examines it.
KINDS = (
    Kind(corpora.is_source, corpora.examine_source),
    Kind(data.is_prepared, data.examine_prepared),
    Kind(data.is_unfinished, data.examine_unfinished),
    Kind(runs.is_checkpoint, runs.examine_checkpoint),
    Kind(runs.is_run, runs.examine_run),
    Kind(runs.is_checkpoints, runs.examine_checkpoints),
    Kind(models.is_huggingface, models.examine_huggingface),
    Kind(is_recipe, examine_recipe),
    Kind(corpora.is_corpus, corpora.examine_corpus),
)


def diagnose(path: str, *, whole: bool = True) -> Diagnosis:
    """Says what `path` is.

    Args:
      path: a local path, a bucket, a model's name on the hub, or a source of text such as
        jsonl:books/*.jsonl.
      whole: whether to read weights and tokens to their end.
    """
    try:
        path = path if corpora.is_source(path) else expand(path, "PATH")
    except UserError as error:
        return Diagnosis(path, "no path that lmjax takes", [Finding(BAD, "path", str(error))])
    for kind in KINDS:
        if kind.recognises(path):
            return kind.examine(path, whole)
    return _unknown(path)


def _room(path: str) -> str:
    check_writable(path, path)
    return "none; a run or prepared data may be made here"


def _unknown(path: str) -> Diagnosis:
    """Says what there is instead of something that lmjax knows."""
    if is_bucket(path):
        found = Diagnosis(path, "no run, checkpoint or prepared data")
        found.add(BAD, "path", "there is none, or the bucket cannot be reached from here")
    elif not os.path.lexists(path):
        found = Diagnosis(path, "not there")
        parent = os.path.dirname(os.path.abspath(path))
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent)
        parts = path.split(",")
        if len(parts) > 1 and all(map(os.path.exists, parts)):
            found.add(BAD, "path", f"these are {len(parts)} paths: write them with spaces between "
                      "them, not commas")
            return found
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(parent), n=3)
        found.add(BAD, "path", f"the last part that exists is {parent}"
                  + f"; similar names there: {', '.join(near)}" * bool(near))
    elif os.path.isdir(path):
        found = Diagnosis(path, "an empty directory")
        found.check("files", lambda: _room(path))
    elif os.path.islink(path):
        found = Diagnosis(path, "a link to nothing")
        found.add(BAD, "path", f"it leads to {os.readlink(path)}, which is not there")
    else:
        found = Diagnosis(path, "neither a file nor a directory")
        found.add(BAD, "path", "nothing can be read from it")
    return found

