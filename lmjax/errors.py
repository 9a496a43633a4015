"""A user's mistake: one line that says what was expected, what was got, and the fix."""

import re

# What no message and no file may show: the name and password of an address, the value of an option
# or a parameter that is named like a credential, and credentials that are known by their shape.
SECRETS = (
    (re.compile(r"(://)[^\s/@'\"]+@"), r"\1***@"),
    (re.compile(r"(?i)(?<![a-z_])("
                r"(?:[\w.-]*(?:auth|access|session|security|refresh|api|hf)[_-]?)?token"
                r"|[\w.-]*(?:secret|passw(?:or)?d|signature|credential|(?:api|access)[_-]?key)"
                r"|sig)(=|%3D)[^\s&,;'\")}]+"), r"\1\2***"),
    (re.compile(r"(?i)(bearer )[\w.~+/-]{8,}"), r"\1***"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|AKIA|AIza|ya29\.)[\w-]{16,}"), "***"),
)


def masked(text: str) -> str:
    """Returns `text` with *** in the place of credentials."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


class UserError(ValueError):
    """A command cannot run as asked, for a reason that its user can mend.

    The command prints this error as one line and exits with code 2, without a traceback. The line
    reads `WHERE: expected EXPECTED, got GOT; FIX`. Any other exception is a fault of lmjax or of
    the machine: the command exits with code 1 and shows the traceback.
    """

    def __init__(self, expected: str, got: object, fix: str, where: str = "") -> None:
        """
        Args:
          expected: what would have been right.
          got: what was there instead.
          fix: what the user can do about it, as an imperative.
          where: the config key, option, file or feature that the error is about; "" leaves it out.
        """
        super().__init__(expected, got, fix, where)  # pickle restores an exception from its `args`
        self.expected, self.got, self.fix, self.where = expected, got, fix, where

    def __str__(self) -> str:
        subject = f"{self.where}: " if self.where else ""
        return masked(f"{subject}expected {self.expected}, got {self.got}; {self.fix}")


class Fault(UserError):
    """A run cannot go on, and may if it is started again: the exit code is 1, not 2."""


def first_line(error: object) -> str:
    """The first line of an error's text, without a final stop, to be quoted in another message.

    It is cut after 300 characters. If nothing is left, it is the name of the error's type.
    """
    line = next(iter(masked(str(error)).strip().splitlines()), "")
    return line.rstrip(".;")[:300] or type(error).__name__
