"""The recipe of a command: its config file and overrides, and what was understood by them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmjax.config import load, plain
from lmjax.monitoring.progress import to_stderr
from lmjax.runtime.distributed import process
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.training.task_config import with_source


def recipe_of(spec: str, overrides: Sequence[str], workdir: str | Path | None = None) -> Recipe:
    """Makes the recipe of `--config SPEC --config.KEY=VALUE ...`.

    A task takes what it leaves open of its model from `train.init_from`, or, where that is gone,
    from what an earlier start recorded in `workdir`.

    Process 0 prints how it understood the overrides whose text leaves a doubt.

    Raises:
      UserError: an error of `config.load` or `build_recipe`.
    """
    recipe = build_recipe(with_source(load(spec, overrides), workdir))
    if process() == 0:
        for line in understood(plain(recipe), overrides):
            to_stderr(line)
    return recipe


def understood(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Says how overrides were understood, one line for each whose text leaves a doubt.

    These are values that are no JSON and mean something else than their text, such as a list of one
    string or an expanded path, and overrides that a later one replaces.

    Args:
      values: the plain recipe that they made.
      overrides: those of `config.load`.
    """
    lines, given = [], [item.partition("=") for item in overrides]
    for i, (key, _, text) in enumerate(given):
        later = [other for other, _, _ in given[i + 1 :] if f"{key}.".startswith(f"{other}.")]
        value = _at(values, key)
        is_list = isinstance(value, list) and not text.startswith("[")
        if later:
            lines.append(f"config.{key}={text} does not count: config.{later[-1]} comes after it")
        elif is_list or (isinstance(value, str) and value != text):
            lines.append(f"config.{key} = {json.dumps(value, ensure_ascii=False)}")
    return lines


def _at(values: Any, key: str) -> Any:
    """The value at a.b.0; None where nothing is, as at a preset, which has become its keys."""
    for name in key.split("."):
        if isinstance(values, list) and name.isdigit() and int(name) < len(values):
            values = values[int(name)]
        else:
            values = values.get(name) if isinstance(values, dict) else None
    return values
