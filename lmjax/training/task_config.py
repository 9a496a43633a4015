"""What a config takes from the model that it names: architecture, tokenizer, objective."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lmjax.config import group_of, plain
from lmjax.config.paths import expand
from lmjax.errors import UserError
from lmjax.training.pretrained import Pretrained, find


def with_source(config: Mapping[str, Any], workdir: str | Path | None = None) -> dict[str, Any]:
    """Fills the config of a task with what the model of `train.init_from` has and it leaves open.

    That is the architecture (model), the tokenizer, and the objective, which may have ids of its
    own. Keys that the config gives stay. A config without a task takes only the tokenizer of
    `distill.teacher`.

    Args:
      config: as `config.load` gives it.
      workdir: of the run. Its config.json stands in for a source that is gone since.

    Raises:
      UserError: there is no such model.
    """
    config = dict(config)
    task, train = (_group(config, key) for key in ("task", "train"))
    path = train.get("init_from")
    if not task.get("name") or not path:
        return _with_teacher(config)
    taken = _recorded(workdir)
    try:
        taken = _of(find(expand(str(path), "config.train.init_from")), str(path))
    except UserError:
        if taken is None:
            raise
    assert taken is not None
    data = _group(config, "data")
    for key in ("objective", "tokenizer"):
        if not data.get(key):
            data[key] = taken[key]
    model = {**taken["model"], **_group(config, "model")}
    return {**config, "model": model, "data": data}


def _with_teacher(config: dict[str, Any]) -> dict[str, Any]:
    """Takes the tokenizer of distill.teacher for text that is to be prepared anew."""
    path, data = _group(config, "distill").get("teacher"), _group(config, "data")
    tokenizer = _group(data, "tokenizer")
    if not path or tokenizer.get("path") or _has_own_tokenizer(data.get("directory")):
        return config
    found = find(expand(str(path), "config.distill.teacher"))
    if found.tokenizer is None:
        return config
    tokenizer = {"vocab_size": found.tokenizer.vocab_size, **tokenizer, "path": str(path)}
    return {**config, "data": {**data, "tokenizer": tokenizer}}


def _has_own_tokenizer(directory: Any) -> bool:
    """Whether there is prepared text whose tokenizer was trained on it, rather than named."""
    if not directory:
        return False
    file = epath.Path(expand(str(directory), "config.data.directory")) / "manifest.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return not json.loads(file.read_text())["config"]["tokenizer"]["path"]
    return False


def _group(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A group of a config; empty where there is none, or something else, which is refused later."""
    found = group_of(config.get(key), f"config.{key}")
    return dict(found) if isinstance(found, Mapping | ConfigDict) else {}


def _of(found: Pretrained, path: str) -> dict[str, Any]:
    """What a model gives to a task, as plain values."""
    recipe = plain(found.recipe)
    tokenizer = {}
    if found.tokenizer is not None:
        tokenizer = {"path": path, "vocab_size": found.tokenizer.vocab_size}
    return {"model": {**recipe["model"], "head": {}}, "objective": recipe["data"]["objective"],
            "tokenizer": tokenizer}


def _recorded(workdir: str | Path | None) -> dict[str, Any] | None:
    """The same from what an earlier start of the run recorded."""
    if workdir is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        recipe = json.loads((Path(workdir) / "config.json").read_text())
        return {"model": recipe["model"], **{key: recipe["data"][key]
                                             for key in ("objective", "tokenizer")}}
    return None
