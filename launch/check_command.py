"""Whether lmjax would take a command, before it has chips that cost. Needs nothing but Python."""

import pathlib
import sys
from collections.abc import Collection

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lmjax.cli.main import COMMANDS  # noqa: E402  (of the checkout; it needs no JAX)


def option(command: list[str], flag: str) -> str:
    """What a command has behind `flag`, or nothing."""
    found = ""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            found = "" if after.startswith("--") else after
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def check(command: list[str], files: Collection[str] | None = None) -> None:
    """A config is looked for among `files`, or in this checkout; one with an absolute path is the hosts' own.

    Raises:
      ValueError: lmjax would refuse the command.
    """
    name = command[0]
    if name == "lmjax":
        raise ValueError(f"expected a command of lmjax behind --, got lmjax itself; leave it out: -- "
                         f"{' '.join(command[1:2] or ['train'])} ...")
    if name not in COMMANDS:
        raise ValueError(f"expected a command of lmjax behind --, got {name!r}; give one of {', '.join(COMMANDS)}")
    for flag, what in {"--config": "FILE", "--workdir": "DIR"}.items():
        if name == "train" and not option(command, flag):
            raise ValueError(f"{flag}: expected a {what.lower()} for train, got none; write {flag} {what}")
    config = str(pathlib.PurePath(option(command, "--config").partition(":")[0]))
    if config == "." or config.startswith("/"):
        return
    if not (ROOT / config).is_file() if files is None else config not in files:
        ours = "of this checkout" if files is None else "of this checkout that git does not ignore"
        raise ValueError(f"--config: expected a file {ours}, got {config}; the hosts would not have it")


if __name__ == "__main__":
    try:
        check(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"lmjax: {error}")
