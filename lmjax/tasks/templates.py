"""Texts made of the columns of a record: `question: {q} context: {c}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lmjax.data.text.records import value_of
from lmjax.errors import UserError

_COLUMN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in order, each once."""
    return list(dict.fromkeys(m[1] for m in _COLUMN.finditer(template) if m[1]))


def check_template(template: str, where: str) -> None:
    """Refuses a template that names no column, or that has a brace without its other half.

    Raises:
      UserError: it does; `where` is its key.
    """
    rest = _COLUMN.sub("", template)
    if "{" in rest or "}" in rest or not columns_of(template):
        raise UserError("a text with columns in braces, such as 'question: {q}'", repr(template),
                        "write the name of a column in braces ({{ and }} are braces)", where=where)


def fill(template: str, record: Mapping[str, Any]) -> str:
    """The text of a record. Numbers are written as in JSON, a list of texts as its lines.

    Raises:
      UserError: the record lacks a column, or has null there.
    """
    def text(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        found = value(record, match[1])
        if isinstance(found, dict) or isinstance(found, list) and not all(
                isinstance(item, str) for item in found):
            raise UserError("a text, a number or a list of texts", f"{str(found)[:60]!r} under "
                            f"{match[1]!r}", "name a key inside it, as in {a.b}; conversations "
                            "are read by the task chat")
        return as_text(found)

    return _COLUMN.sub(text, template)


def value(record: Mapping[str, Any], column: str) -> Any:
    """What a record has in a column; `a.b` is the key b of what is under a.

    Raises:
      UserError: nothing.
    """
    found = value_of(record, column)
    if found is None:
        has = ", ".join(map(repr, record))
        raise UserError(f"a column {column!r}", f"null under {column!r}" if column in record
                        else f"a record with {has[:200]}", "correct the column's name in "
                        "config.task (or for lmjax predict, with --column), or the file")
    return found


def as_text(found: Any) -> str:
    """A value of a record as text."""
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return "\n".join(found)
    return json.dumps(found, ensure_ascii=False)
