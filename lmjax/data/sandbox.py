"""Jinja's sandbox with what chat templates of Hugging Face use; it needs the package jinja2."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
    raise ImportError("jinja2 before 3.1.6, whose sandbox has known holes")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant writes, between two marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        marks: Any = self.environment.globals["_marks"]
        return f"{marks[0]}{caller()}{marks[1]}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name a value `self`
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def environment(begin: str, end: str) -> jinja2.Environment:
    """The environment of chat templates; `begin` and `end` mark what the assistant writes."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace,
                     "dict": lambda *args, **kwargs: dict(*args, **kwargs),
                     "_marks": (begin, end)}
    return made


def _check(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with {name!r}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
