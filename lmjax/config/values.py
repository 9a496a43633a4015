"""The values of a config: what a field of a type takes, from Python and as text.

On the command line a number is written as in Python, a boolean as true or false, a list and a dict
as JSON. Where a list of strings is wanted, any other text is one string: a comma may belong to it.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from lmjax.errors import UserError

MAX_FLOAT32 = 3.4028234663852886e38  # the largest float: training computes in float32
# Fields that hold a path. `expand_paths` replaces what a user wrote by what it means.
PathText = Annotated[str, "a local path or a bucket's"]
LocalPathText = Annotated[str, "a local path"]
NOTHING = ("None", "null")  # on the command line, where a value is possible but not given
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+")
BOOLEAN_WORDS = {"true": ("true", "yes", "y", "on", "1"), "false": ("false", "no", "n", "off", "0")}


class Text(str):
    """A value from the command line that is not parsed yet: the type of its field decides how."""


def parse_items(value: Any, path: str, hint: Any) -> Sequence[Any]:
    """Reads a list: a sequence, `[...]` as JSON, one string, "", or a mapping of all indices."""
    if isinstance(value, Text):
        if value.startswith("[") or (value and hint is not str) or _literal(value) is not None:
            value = parse_json(value, path, "a JSON list")
        else:
            # One string, whatever is in it: a comma may belong to a prompt.
            value = [value] if value else []
    # `sources.0.weight=2` makes a mapping of indices where the file sets no list.
    if isinstance(value, Mapping) and set(value) == {str(i) for i in range(len(value))}:
        value = [value[str(i)] for i in range(len(value))]
    if not isinstance(value, (tuple, list)):
        raise wrong(path, "a list", value, "write it as [a, b]")
    return value


def parse_json(text: str, path: str, expected: str) -> Any:
    """Reads JSON strictly; `expected` names what is wanted, for the error."""
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise wrong(path, "each key once", twice[0], "leave one of the two out")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError):
        raise wrong(path, expected, str(text), _json_fix(text)) from None


def _json_fix(text: str) -> str:
    """What to write in place of `text`, which is no JSON: Python's spelling, or bare items."""
    value = _literal(text)
    if value is None and (value := _literal(f"[{text}]")) is None:
        one = f" (one string: {json.dumps([text])})" if text.startswith("[") else ""
        return f"check its quotes and brackets{one}"
    try:
        return f"write {json.dumps(value, allow_nan=False)}"
    except (ValueError, TypeError):  # NaN, a set
        return "check its values"


def _literal(text: str) -> tuple | list | dict | None:
    """The tuple, list or dict that `text` spells in Python with its brackets, if it is one."""
    try:
        value = ast.literal_eval(text) if text.startswith(("(", "[", "{")) else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, tuple | list | dict) else None


def _integer(value: Any, path: str) -> int:
    if isinstance(value, Text):
        try:
            value = int(value)
        except ValueError:
            raise wrong(path, "an integer", str(value), _integer_fix(value)) from None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong(path, "an integer", value, _integer_fix(value))
    if abs(int(value)) >= 1 << 63:
        raise wrong(path, "an integer of 64 bits", value, "write a smaller one")
    return int(value)


def _integer_fix(value: Any) -> str:
    text = str(value).strip("\"'")
    try:
        number = float(text.replace(",", "") if THOUSANDS.fullmatch(text) else text)
        return f"write {int(number)}" if number == int(number) else "write a whole number"
    except (ValueError, OverflowError):
        return "write a whole number"


def _real(value: Any, path: str) -> float:
    if isinstance(value, Text):
        try:
            value = float(value)
        except ValueError:
            raise wrong(path, "a number", str(value), "write it as 0.001 or 1e-3") from None
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise wrong(path, "a number", value, "write it as 0.001 or 1e-3")
    try:
        value = float(value)
    except OverflowError:  # an integer beyond the largest float
        value = math.inf
    if not abs(value) <= MAX_FLOAT32:
        raise wrong(path, "a finite number", value, "write a number; 0 switches most options off")
    return value


def _boolean(value: Any, path: str) -> bool:
    if isinstance(value, Text) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        word = str(value).lower().strip("\"'")
        fix = next((f"write {name}" for name, words in BOOLEAN_WORDS.items() if word in words),
                   "write true or false")
        raise wrong(path, "true or false", value, fix)
    return value


def _string(value: Any, path: str) -> str:
    if value is None or (isinstance(value, Text) and value in NOTHING):
        raise UserError("a string", str(value), 'write "", or leave the key out', where=path)
    if not isinstance(value, str):
        raise wrong(path, "a string", value, "put it in quotes")
    if isinstance(value, Text) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        raise wrong(path, "a string", str(value), f"leave out the quotes around it, or write "
                     f"a JSON list of strings where a list is possible: {json.dumps([value])}")
    return str(value)


SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    int: _integer, float: _real, bool: _boolean, str: _string, PathText: _string,
    LocalPathText: _string}


def wrong(path: str, expected: str, got: Any, fix: str) -> UserError:
    """The error for the value `got` of the key `path`."""
    return UserError(expected, repr(got), fix, where=path)
