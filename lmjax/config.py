"""Strict configs: a `ConfigDict` in files and on the command line, frozen dataclasses in the code.

Every part of lmjax declares one frozen dataclass beside its factory. That dataclass is the only
place where the part's defaults live. `build` turns nested dicts into these dataclasses. It refuses
an unknown key, a NaN or a wrong type with one line that names the key.
"""

import dataclasses
import difflib
import json
import math
import os
import runpy
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lmjax.errors import UserError

T = TypeVar("T")
MAX_FLOAT32 = 3.4028234663852886e38  # the largest float: training computes in float32


class Text(str):
    """A value from the command line that is not parsed yet: the type of its field decides how."""


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
    path, _, variant = spec.partition(":")
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


def build(cls: type[T], value: Any, path: str = "config") -> T:
    """Makes the dataclass `cls` from a nested mapping.

    Args:
      cls: a frozen dataclass. It may hold other dataclasses, tuples, dicts and scalars.
      value: a mapping or a ConfigDict. A finished `cls` is returned as it is.
      path: the name of `value` in error messages.

    Raises:
      UserError: an unknown key, a NaN, a value of the wrong type, or a value that `cls` refuses.
    """
    if isinstance(value, cls):
        return value
    if hasattr(value, "to_dict"):  # a ConfigDict, which is no Mapping
        value = plain(value)
    if not isinstance(value, Mapping):
        raise _wrong(path, f"a group of keys ({_keys(cls)})", value, "set the keys one by one")
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            fix = f"did you mean {near[0]!r}?" if near else "remove it"
            raise UserError(f"one of {_keys(cls)}", "an unknown key", fix, where=f"{path}.{key}")
    fields = {key: _convert(hints[key], item, f"{path}.{key}") for key, item in value.items()}
    if missing := [name for name in _required(cls) if name not in fields]:
        raise UserError(f"a value for {', '.join(missing)}", "none", "set it", where=path)
    try:
        return cls(**fields)
    except UserError as error:  # from __post_init__, which names a key without its path
        where = f"{path}.{error.where}" if error.where else path
        raise UserError(error.expected, error.got, error.fix, where=where) from None


def plain(value: Any) -> Any:
    """Turns ConfigDicts and dataclasses, at any depth, into dicts, lists and scalars for JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Compares two plain configs: one line `key: old -> new` for every leaf that differs."""
    out = []
    for key in dict.fromkeys([*old, *new]):
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{name}.")
        elif a != b:
            out.append(f"{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return out


def choice(key: str, value: str, options: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises a `UserError` if `value` is not one of `options`. For use in `__post_init__`."""
    if value not in options:
        raise UserError(f"one of {', '.join(options)}", repr(value), "choose one of them",
                        where=key)


def at_least(low: float, **values: float) -> None:
    """Raises a `UserError` that names the first of `values` below `low`. For `__post_init__`."""
    for key, value in values.items():
        if value < low:
            raise UserError(f"at least {low}", value, "raise it", where=key)


def at_most(high: float, **values: float) -> None:
    """Raises a `UserError` that names the first of `values` above `high`. For `__post_init__`."""
    for key, value in values.items():
        if value > high:
            raise UserError(f"at most {high:,}", f"{value:,}", "lower it", where=key)


def scalar(kind: type, value: Any, path: str) -> Any:
    """Returns `value` as an int, a float, a bool or a str.

    Raises:
      UserError: `value` has another type, or is a NaN or infinite; `path` is its name.
    """
    return _SCALARS[kind](value, path)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Converts `value` to the type `hint`: a scalar, a dataclass, a tuple, a dict, or a union."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if all(map(dataclasses.is_dataclass, args)):
            return build(_variant(args, value, path), value, path)
        if value is None or (isinstance(value, Text) and value == "None"):
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    if origin is tuple:
        items = _items(value, path)
        return tuple(_convert(args[0], item, f"{path}.{i}") for i, item in enumerate(items))
    if origin is dict:
        if isinstance(value, Text):
            value = _parse_json(value, path, "a JSON object")
        if not isinstance(value, Mapping):
            raise _wrong(path, "a mapping", value, "write it as a dict")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    return _SCALARS[hint](value, path)


def _variant(classes: Sequence[Any], value: Any, path: str) -> type:
    """Chooses a dataclass of a union by the key `family` of `value`; the first if there is none."""
    by_family, keys = {cls.family: cls for cls in classes}, plain(value)
    default = classes[0].family
    family = keys.get("family", default) if isinstance(keys, Mapping) else default
    if family not in by_family:
        options = ", ".join(by_family)
        raise _wrong(f"{path}.family", f"one of {options}", family, "choose one of them")
    return by_family[family]


def _items(value: Any, path: str) -> Sequence[Any]:
    """Reads a list: a sequence, `[...]` as JSON, `a,b`, or a mapping of all indices."""
    if isinstance(value, Text):
        if value.startswith("["):
            value = _parse_json(value, path, "a JSON list")
        else:
            value = [Text(item) for item in value.split(",")] if value else []
    # `sources.0.weight=2` makes a mapping of indices where the file sets no list.
    if isinstance(value, Mapping) and set(value) == {str(i) for i in range(len(value))}:
        value = [value[str(i)] for i in range(len(value))]
    if not isinstance(value, (tuple, list)):
        raise _wrong(path, "a list", value, "write it as [a, b]")
    return value


def _parse_json(text: str, path: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise _wrong(path, expected, str(text), "check its quotes and brackets") from None


def _integer(value: Any, path: str) -> int:
    if isinstance(value, Text):
        try:
            value = int(value.replace("_", ""))
        except ValueError:
            raise _wrong(path, "an integer", str(value), _integer_fix(value)) from None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _wrong(path, "an integer", value, _integer_fix(value))
    if abs(int(value)) >= 1 << 63:
        raise _wrong(path, "an integer of 64 bits", value, "write a smaller one")
    return int(value)


def _integer_fix(value: Any) -> str:
    try:
        number = float(value)
        return f"write {int(number)}" if number == int(number) else "write a whole number"
    except (TypeError, ValueError, OverflowError):
        return "write a whole number"


def _real(value: Any, path: str) -> float:
    if isinstance(value, Text):
        try:
            value = float(value)
        except ValueError:
            raise _wrong(path, "a number", str(value), "write it as 0.001 or 1e-3") from None
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise _wrong(path, "a number", value, "write it as 0.001 or 1e-3")
    try:
        value = float(value)
    except OverflowError:  # an integer beyond the largest float
        value = math.inf
    if not abs(value) <= MAX_FLOAT32:
        raise _wrong(path, "a finite number", value, "write a number; 0 switches most options off")
    return value


def _boolean(value: Any, path: str) -> bool:
    if isinstance(value, Text) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _wrong(path, "true or false", value, "write true or false")
    return value


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(path, "a string", value, "put it in quotes")
    return str(value)


_SCALARS = {int: _integer, float: _real, bool: _boolean, str: _string}


def _wrong(path: str, expected: str, got: Any, fix: str) -> UserError:
    return UserError(expected, repr(got), fix, where=path)


def _keys(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _required(cls: Any) -> list[str]:
    """The fields without a default."""
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is none]


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
