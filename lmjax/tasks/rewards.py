"""Rewards that can be verified: functions of an answer and of the right answer."""

import re
from collections.abc import Callable

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def exact_match(answer: str, target: str, pattern: str) -> float:
    """1 if the answer is the target, apart from space around it."""
    return float(answer.strip() == target.strip())


def number(answer: str, target: str, pattern: str) -> float:
    """1 if the last number of the answer equals that of the target."""
    said, right = _NUMBER.findall(answer), _NUMBER.findall(target)
    return float(bool(said) and bool(right) and float(said[-1]) == float(right[-1]))


def matches(answer: str, target: str, pattern: str) -> float:
    """1 if the whole answer has the form of the regular expression `pattern`."""
    return float(re.fullmatch(pattern, answer.strip(), re.DOTALL) is not None)


# (answer, target, task.pattern) -> a number. The file of a recipe may add functions of its own. A
# checkpoint records their names alone, and never runs them.
REWARDS: dict[str, Callable[[str, str, str], float]] = {
    "exact_match": exact_match, "number": number, "pattern": matches}
