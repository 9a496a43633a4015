"""Strict configs: a `ConfigDict` in the file and on the command line, frozen dataclasses in the code.

Every part of lmjax declares one frozen dataclass next to its factory, and that dataclass is the only
place where its defaults live. `build` turns plain nested dicts into these, and refuses a misspelt key,
a NaN or a wrong type with one line that names the key.
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

T = TypeVar("T")
MAX_FLOAT32 = 3.4028234663852886e38  # what is computed with is float32


class ConfigError(ValueError):
    """A config that cannot be run. The message holds what was expected, what was got, and the fix."""


class Text(str):
    """A value from the command line: still text, parsed by the type of the field that it lands in."""


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs `path.py` or `path.py:variant` and returns its `get_config([variant])` as a plain dict.

    Args:
      spec: the config file, with an optional variant behind a colon (`configs/quickstart.py:tiny`).
      overrides: `key.path=value` strings, applied on top, in order. They stay `Text` until `build`.

    Raises:
      ConfigError: no such file, no `get_config` in it, or an override without `=`.
    """
    path, _, variant = spec.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"--config: expected a Python file, got {path!r}, which does not exist; "
                          "pass a path such as configs/quickstart.py")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = plain(get_config(variant) if variant else get_config()) if callable(get_config) else get_config
    except Exception as error:  # whatever the user's code raises
        lines = [str(f.lineno) for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        at = f"line {lines[-1]}: " if lines else ""
        raise ConfigError(f"--config: expected {path} to be a Python file that runs, got {at}{type(error).__name__}: "
                          f"{error}; correct it") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--config: expected {path} to define get_config(), which returns a ConfigDict, got "
                          f"{config!r}; add one")
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--config.{key}: expected --config.{key}=VALUE, got no '='; write "
                              "the value behind an equals sign")
        _assign(config, key.split("."), Text(value), key)
    return config


def build(cls: type[T], value: Any, path: str = "config") -> T:
    """Makes the dataclass `cls` from a nested mapping, strictly.

    Raises:
      ConfigError: an unknown key, a NaN, a value of the wrong type, or one that the class refuses.
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
            raise ConfigError(f"{path}.{key}: expected one of {_keys(cls)}, got an unknown key; {fix}")
    fields = {key: _convert(hints[key], item, f"{path}.{key}") for key, item in value.items()}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}.{error}") from None
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in fields and _required(f)]
        raise ConfigError(f"{path}: expected a value for {', '.join(missing)}, got none; set it") from None


def plain(value: Any) -> Any:
    """Nested dicts, lists and scalars of a ConfigDict, a dataclass or a mix of them (for JSON)."""
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
    """`key: old -> new` for every leaf that differs between two plain configs."""
    out = []
    for key in dict.fromkeys([*old, *new]):
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{name}.")
        elif a != b:
            out.append(f"{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return out


def choice(key: str, value: str, options: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises a `ValueError` that lists `options` when `value` is not one of them (for `__post_init__`)."""
    if value not in options:
        raise ValueError(f"{key}: expected one of {', '.join(options)}, got {value!r}; choose one of them")


def at_least(low: float, **values: float) -> None:
    """Raises a `ValueError` that names the first of `values` below `low` (for `__post_init__`)."""
    for key, value in values.items():
        if value < low:
            raise ValueError(f"{key}: expected at least {low}, got {value}; raise it")


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if all(map(dataclasses.is_dataclass, args)):
            return build(_variant(args, value, path), value, path)
        if value is None or (isinstance(value, Text) and value == "None"):
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if origin is tuple:
        value = _items(value, path)
        return tuple(_convert(args[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if isinstance(value, Text):
            value = _parse_json(value, path, "a JSON object")
        if not isinstance(value, Mapping):
            raise _wrong(path, "a mapping", value, "write it as a dict")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    return _SCALARS[hint](value, path)


def _variant(classes: Sequence[type], value: Any, path: str) -> type:
    """The one of `classes` whose default `family` is that of `value`; the first where `value` has none."""
    by_family, keys = {cls.family: cls for cls in classes}, plain(value)
    family = keys.get("family", classes[0].family) if isinstance(keys, Mapping) else classes[0].family
    if family not in by_family:
        raise _wrong(f"{path}.family", f"one of {', '.join(by_family)}", family, "choose one of them")
    return by_family[family]


def _items(value: Any, path: str) -> Sequence[Any]:
    if isinstance(value, Text):
        value = _parse_json(value, path, "a JSON list") if value.startswith("[") else (
            [Text(item) for item in value.split(",")] if value else [])
    if isinstance(value, Mapping) and set(value) == {str(i) for i in range(len(value))}:  # sources.0.weight=2
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
    if isinstance(value, bool) or not (hasattr(value, "__float__") and not isinstance(value, str)):
        raise _wrong(path, "a number", value, "write it as 0.001 or 1e-3")
    try:
        value = float(value)
    except OverflowError:  # an integer beyond the greatest float
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


def _wrong(path: str, expected: str, got: Any, fix: str) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {got!r}; {fix}")


def _keys(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _assign(config: Any, keys: Sequence[str], value: Any, path: str) -> None:
    for key in keys[:-1]:
        config = _child(config, key, path)
    if isinstance(config, list):
        config[_index(config, keys[-1], path)] = value
    else:
        config[keys[-1]] = value


def _child(config: Any, key: str, path: str) -> Any:
    if isinstance(config, list):
        return config[_index(config, key, path)]
    child = config.setdefault(key, {})
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"config.{path}: expected a group of keys at {key!r}, got the value {child!r}; "
                          "check the key's path")
    return child


def _index(items: list, key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"config.{path}: expected an index below {len(items)}, got {key!r}; check the key's path")
    return int(key)
