"""What the doctor says of a path: its kind, findings, and the commands that take it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lmjax.cli.errors import explain
from lmjax.errors import UserError

GOOD, NOTE, BAD = "ok", "note", "bad"
NAME_WIDTH = 14


class Finding(NamedTuple):
    """One line of a diagnosis."""

    level: str  # GOOD, NOTE (worth knowing, no fault) or BAD (a command would refuse it)
    about: str  # which part of the path the line is about
    text: str


@dataclass
class Diagnosis:
    """What is known of a path after it has been examined."""

    path: str
    kind: str  # completes the sentence "PATH is ..."
    findings: list[Finding] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)  # commands that take the path

    @property
    def is_bad(self) -> bool:
        """Whether something in it is broken."""
        return any(finding.level == BAD for finding in self.findings)

    def add(self, level: str, about: str, text: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(level, about, text))

    def check(self, about: str, look: Callable[[], str]) -> bool:
        """Adds what `look` says as a good finding, or the error that it raises as a bad one.

        Returns whether `look` succeeded. Faults of lmjax are not caught.
        """
        try:
            self.add(GOOD, about, look())
        except (UserError, OSError) as error:
            self.add(BAD, about, explain(error)[1])
            return False
        return True

    def __str__(self) -> str:
        lines = [f"{self.path} is {self.kind}"]
        lines += [f"  {level:<5} {about:<{NAME_WIDTH}} {text}"
                  for level, about, text in self.findings]
        if self.uses and not self.is_bad:
            lines += ["  use it with:", *(f"    {use}" for use in self.uses)]
        return "\n".join(lines)
