"""The arguments of a command: expands paths, separates overrides, refuses typing errors."""

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from lmjax.config import paths
from lmjax.errors import UserError

PREFIX = "--config."


class AnyPath(str):
    """The type of an argument that is a path, local or in a bucket. `parse` expands it."""


class LocalPath(str):
    """The type of an argument that is a local path. `parse` expands it."""


def parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Parses the arguments of `lmjax`.

    Returns:
      the arguments, with their paths expanded, and the overrides: KEY=VALUE of each
      --config.KEY=VALUE.

    Raises:
      UserError: an unknown option, an option given twice, an override without a value, or an error
        of `paths.expand`.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word.startswith(PREFIX) and "=" not in word:
            value = "VALUE" if following.startswith("--") or not following else following
            raise UserError(f"{word}=VALUE", "no '='", f"write {word}={value.lstrip('=')}",
                            where=word)
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word.removeprefix(PREFIX) for word in rest if word.startswith(PREFIX)]
    unknown = [word for word in rest if not word.startswith(PREFIX)]
    if overrides and not hasattr(arguments, "config"):
        unknown.append(PREFIX + overrides[0])
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], _options(arguments), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"an option of `lmjax {arguments.command}`", "an unknown one",
                        f"{hint}see lmjax {arguments.command} --help", where=unknown[0])
    given = [word.partition("=")[0] for word in argv]
    for name, value in vars(arguments).items():
        where = option = f"--{name.replace('_', '-')}"
        if option not in given:  # the default, or an argument without a name
            where = name.upper()
        elif given.count(option) > 1 and not isinstance(value, list | bool):
            raise UserError(f"one {option}", given.count(option), "leave out all but one",
                            where=option)
        setattr(arguments, name, [_expanded(where, item) for item in value]
                if isinstance(value, list) else _expanded(where, value))
    return arguments, overrides


def _options(arguments: Namespace) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in vars(arguments)]


def _expanded(where: str, value: object) -> object:
    """Expands the value of an argument, if it is a path."""
    if not isinstance(value, AnyPath | LocalPath):
        return value
    return paths.expand(value, where, bucket=isinstance(value, AnyPath))


def add_kv_cache(parser: ArgumentParser) -> None:
    """Adds `--kv-cache`, which every command that decodes has."""
    parser.add_argument(
        "--kv-cache", choices=("float", "int8"), default="float",
        help="how keys and values are kept: in the dtype of the model, or as 8-bit integers "
        "(default: float)")


def read_text(path: str) -> str:
    """The text of a file, with its line ends as they are.

    Raises:
      UserError: it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError("UTF-8 text", error, "convert it, for example with `iconv -t UTF-8`",
                        where=path) from None
