"""Refuses a command that lmjax would refuse, before any chips are paid for.

Needs only Python.
"""

import pathlib
import sys
from collections.abc import Collection

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lmjax.cli.main import COMMANDS  # noqa: E402  (from the checkout; it does not import JAX)
from lmjax.errors import UserError  # noqa: E402


def option(command: list[str], flag: str) -> str:
    """The value of the option `flag` in a command, or "" if it has none."""
    found = ""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            found = "" if following.startswith("--") else following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def check(command: list[str], files: Collection[str] | None = None) -> None:
    """Checks the arguments of `lmjax`.

    Args:
      command: the arguments.
      files: the files that the hosts will have, relative to the checkout; by default all that the
        checkout has. A config with an absolute path, or one that the hosts expand (~ and $NAME),
        belongs to the hosts and is not looked for.

    Raises:
      UserError: lmjax would refuse the command.
    """
    name = command[0]
    if name == "lmjax":
        raise UserError("a command of lmjax after --", "lmjax itself",
                        f"leave it out: -- {' '.join(command[1:2] or ['train'])} ...")
    if name not in COMMANDS:
        raise UserError("a command of lmjax after --", repr(name),
                        f"give one of {', '.join(COMMANDS)}")
    for flag, value in {"--config": "FILE", "--workdir": "DIR"}.items():
        if name == "train" and not option(command, flag):
            raise UserError(f"a {value.lower()} for train", "none", f"write {flag} {value}", flag)
    written = option(command, "--config")
    if not written or written.startswith(("/", "~", "file:")) or "$" in written:
        return
    config = str(pathlib.PurePath(written.partition(":")[0]))
    if files is None:
        found, kind = (ROOT / config).is_file(), "of this checkout"
    else:
        found, kind = config in files, "of this checkout that git does not ignore"
    if not found:
        raise UserError(f"a file {kind}", config, "the hosts would not have it", "--config")


if __name__ == "__main__":
    try:
        check(sys.argv[1:])
    except UserError as error:
        sys.exit(f"lmjax: {error}")
