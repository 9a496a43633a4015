"""Config files, and the overrides of the command line."""

import os
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from lmjax.config import paths
from lmjax.config.build import plain
from lmjax.config.values import Text
from lmjax.errors import UserError


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a config file and returns what its `get_config` returns, as a plain dict.

    Args:
      spec: `path.py`, or `path.py:variant` to call `get_config(variant)`
        (`configs/quickstart.py:tiny`).
      overrides: `key.path=value` strings, applied in order. They stay `Text` until `build`.

    Raises:
      UserError: the file is missing or fails, it has no `get_config`, or an override has no `=` or
        names a key inside a value that is not a group of keys.
    """
    spec = paths.expand(spec, "--config", bucket=False)
    path, variant = str(spec), ""
    if ":" in spec and not os.path.isfile(spec):
        path, _, variant = spec.rpartition(":")
    if not os.path.isfile(path):
        raise UserError("a Python file", f"{path!r}, which does not exist",
                        "pass a path such as configs/quickstart.py", where="--config")
    try:
        config = get_config = runpy.run_path(path).get("get_config")
        if callable(get_config):
            config = plain(get_config(variant) if variant else get_config())
    except Exception as error:  # anything that the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [str(frame.lineno) for frame in frames if frame.filename == path]
        at = f"line {lines[-1]}: " if lines else ""
        got = f"{at}{type(error).__name__}: {error}"
        raise UserError(f"{path} to be a Python file that runs", got, "correct it",
                        where="--config") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} to define get_config(), which returns a ConfigDict", repr(config),
                        "add one", where="--config")
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--config.{key}=VALUE", "no '='",
                            "write the value after an equals sign", where=f"--config.{key}")
        _assign(config, key.split("."), Text(value), key)
    return config


def _assign(config: Any, keys: Sequence[str], value: Any, path: str) -> None:
    """Sets `config[keys[0]][keys[1]]...` to `value`, making the dicts that are missing."""
    for key in keys[:-1]:
        config = _child(config, key, path)
    if isinstance(config, list):
        config[_index(config, keys[-1], path)] = value
    else:
        config[keys[-1]] = value


def _child(config: Any, key: str, path: str) -> Any:
    if isinstance(config, list):
        child = config[_index(config, key, path)]
    else:
        child = config.setdefault(key, {})
    if not isinstance(child, (dict, list)):
        raise UserError(f"a group of keys at {key!r}", f"the value {child!r}",
                        "check the key's path", where=f"config.{path}")
    return child


def _index(items: list, key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"an index below {len(items)}", repr(key), "check the key's path",
                        where=f"config.{path}")
    return int(key)
