"""Frozen dataclasses from nested dicts, strictly, and back."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lmjax.config import paths
from lmjax.config.values import (
    NOTHING,
    SCALARS,
    LocalPathText,
    PathText,
    Text,
    parse_items,
    parse_json,
    wrong,
)
from lmjax.errors import UserError

T = TypeVar("T")


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
    value = group_of(value, path)
    if not isinstance(value, Mapping):
        raise wrong(path, f"a group of keys ({_keys(cls)})", value, "set the keys one by one")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in value:
        if key not in hints:
            raise UserError(f"one of {_keys(cls)}", "an unknown key", _nearest(str(key), cls),
                            where=f"{path}.{key}")
    fields = {key: _convert(hints[key], item, f"{path}.{key}") for key, item in value.items()}
    if missing := [name for name in _required(cls) if name not in fields]:
        raise UserError(f"a value for {', '.join(missing)}", "none", "set it", where=path)
    try:
        return cls(**fields)
    except UserError as error:  # from __post_init__, which names a key without its path
        where = f"{path}.{error.where}" if error.where else path
        raise UserError(error.expected, error.got, error.fix + _as_list(value, error.where),
                        where=where) from None


def group_of(value: Any, path: str) -> Any:
    """A group of keys that the command line gives as a JSON object; any other value as it is.

    Raises:
      UserError: it begins like a JSON object and is none.
    """
    if isinstance(value, Text) and value.startswith("{"):
        return parse_json(value, path, "a JSON object")
    return value


def expand_paths(config: T, path: str = "config") -> T:
    """Returns a finished dataclass whose paths are expanded, as `paths.expand` says.

    Records of a run hold expanded paths. They are not expanded again: a path that a checkpoint
    remembers need not exist, or make sense, on the machine that loads it.

    Args:
      config: the dataclass, which may hold others.
      path: its name in error messages.

    Raises:
      UserError: an error of `paths.expand`, with the key.
    """
    changed: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, where = getattr(config, name), f"{path}.{name}"
        if hint in (PathText, LocalPathText):
            changed[name] = paths.expand(value, where, bucket=hint == PathText)
        elif dataclasses.is_dataclass(value):
            changed[name] = expand_paths(value, where)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changed[name] = tuple(expand_paths(item, f"{where}.{i}")
                                  for i, item in enumerate(value))
    return dataclasses.replace(typing.cast(Any, config), **changed) if changed else config


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
        if (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
                and all(isinstance(item, Mapping) for item in [*a, *b])):
            a, b = dict(enumerate(a)), dict(enumerate(b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{name}.")
        elif a != b:
            out.append(f"{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return out


def pattern(key: str, value: str) -> None:
    """Raises a UserError if `value` is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise UserError("a regular expression", f"{value!r} ({error})", "correct it",
                        where=key) from None


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
    return SCALARS[kind](value, path)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Converts `value` to the type `hint`: a scalar, a dataclass, a tuple, a dict, or a union."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if all(map(dataclasses.is_dataclass, args)):
            value = group_of(value, path)
            return build(_variant(args, value, path), value, path)
        if value is None or (isinstance(value, Text) and value in NOTHING):
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    if origin is tuple:
        items = parse_items(value, path, args[0])
        return tuple(_convert(args[0], item, f"{path}.{i}") for i, item in enumerate(items))
    if origin is dict:
        if isinstance(value, Text):
            value = parse_json(value, path, "a JSON object")
        if not isinstance(value, Mapping):
            raise wrong(path, "a mapping", value, "write it as a dict")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    return SCALARS[hint](value, path)


def _variant(classes: Sequence[Any], value: Any, path: str) -> type:
    """Chooses a dataclass of a union by the key `family`, or `name`; the first if it is missing."""
    key = "family" if hasattr(classes[0], "family") else "name"
    by_key, keys = {getattr(cls, key): cls for cls in classes}, plain(value)
    default = getattr(classes[0], key)
    chosen = keys.get(key, default) if isinstance(keys, Mapping) else default
    if chosen not in by_key:
        options = ", ".join(filter(None, by_key))
        raise wrong(f"{path}.{key}", f"one of {options}", chosen, "choose one of them")
    return by_key[chosen]


def _as_list(value: Any, where: str) -> str:
    """The end of a fix, if the refused value at `where` is text that may have meant a list."""
    for name in where.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, Text) or "," not in value or value.startswith(("[", "{")):
        return ""
    items = [item.strip() for item in value.split(",") if item.strip()]
    return f"; several items are a JSON list: {json.dumps(items)}"


def _keys(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _nearest(key: str, cls: Any) -> str:
    """The fix for an unknown key: a similar one of `cls`, or of the groups below it."""
    near = difflib.get_close_matches(key, [f.name for f in dataclasses.fields(cls)], 1)
    if not near:
        leaves = list(_leaves(cls))
        names = difflib.get_close_matches(key, {leaf.split(".")[-1] for leaf in leaves}, 1, 0.8)
        near = [leaf for leaf in leaves if leaf.split(".")[-1] in names]
    return f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else "remove it"


def _leaves(cls: Any) -> Iterator[str]:
    """The keys of all groups in `cls`, as a.b; of a union of groups those of the first."""
    for name, hint in typing.get_type_hints(cls).items():
        group = next((kind for kind in (hint, *typing.get_args(hint))
                      if dataclasses.is_dataclass(kind)), None)
        if group and typing.get_origin(hint) is not tuple:
            yield from (f"{name}.{leaf}" for leaf in _leaves(group))
        else:
            yield name


def _required(cls: Any) -> list[str]:
    """The fields without a default."""
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is none]
