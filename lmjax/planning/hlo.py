"""Parses the text of an optimized HLO module, as `compiled.as_text()` gives it. Needs no JAX.

HLO is XLA's own program: a module is a set of computations, and a computation is a list of
instructions. `planning/costs.py` adds up what the instructions cost.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bits per element. Every type that begins with f8 has 8; tokens and opaque types have none.
BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8,
    "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
    "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}
CALLERS = ("while", "call", "conditional", "async-start", "fusion")
NO_CYCLES = 2**63 - 1  # the compiler writes this number where it cannot estimate

_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTINUED = re.compile(r'\n(?="|\}\})')  # the metadata of Pallas calls spans several lines


class Instruction(NamedTuple):
    """One line of a computation: `name = shape opcode(operands), attributes`.

    operands: the names of other instructions, or the text of a constant or parameter.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """The place in the traced program that it comes from; "" if unknown."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The function that a custom call runs; "" for other instructions."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate: 0 if it makes none, `NO_CYCLES` if it cannot make one."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else 0


Computation = dict[str, Instruction]  # by name, in scheduled order


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name; it starts at `entry`."""

    computations: dict[str, Computation]
    entry: str

    def called(self, instruction: Instruction) -> list[str]:
        """The computations that an instruction runs: a loop's body, what a fusion fuses."""
        if instruction.opcode not in CALLERS:
            return []
        names = _CALLED.findall(instruction.attributes)
        for branches in _BRANCHES.findall(instruction.attributes):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return [name for name in names if name in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """All instructions that an instruction runs, at any depth, each with its computation."""
        for name in self.called(instruction):
            for inner in self.computations[name].values():
                yield self.computations[name], inner
                yield from self.inside(inner)


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in _CONTINUED.sub(" ", text).splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (instruction := _instruction(line.strip())):
                current[instruction.name] = instruction
        elif line.endswith("{") and "->" in line:
            head = line.removeprefix("ENTRY ")
            name = re.split(r"[ (]", head.lstrip("%"), maxsplit=1)[0]
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("this text has no ENTRY computation, so it is not an HLO module")
    return Module(computations, entry)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How many times a `while` runs its body; None if that is not known before it runs.

    The compiler writes the number down, or the loop's condition compares with a constant.
    """
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    named = _CONDITION.search(loop.attributes)
    assert named, f"a loop without a condition: {loop.name}"
    condition = module.computations[named[1]]
    *_, root = condition.values()
    bounds = [int(i.operands[0]) for i in condition.values()
              if i.opcode == "constant" and i.shape.startswith(("s32", "u32", "s64", "u64"))]
    direct = [i.operands[0] for i in map(condition.get, root.operands)
              if i is not None and i.opcode == "constant"]
    found = ([int(n) for n in direct if n.lstrip("-").isdigit()]
             or (bounds if root.opcode != "compare" else []))
    inclusive = "direction=LE" in root.attributes or "direction=GE" in root.attributes
    return max(found[-1] + inclusive, 1) if found else None


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in a shape or a tuple of shapes, without the layouts."""
    bare = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)
    return [(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
            for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", bare)]


def num_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape, without the padding of tiled layouts."""
    return sum(math.prod(dims) * _bits(dtype) // 8 for dtype, dims in arrays(shape))


def _bits(dtype: str) -> int:
    return 8 if dtype.startswith("f8") else BITS.get(dtype, 0)


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1:close - 1]
    operands = re.findall(r"%([\w.-]+)", inside)
    if not operands:  # some texts leave "%" out: a name stands alone or after its shape
        bare = re.sub(r"[\[{(][^\]})]*[\]})]|/\*.*?\*/", "", inside)
        operands = [part.split()[-1] for part in bare.split(",") if part.strip()]
    return Instruction(name.lstrip("%"), shape, opcode, tuple(operands), rest[close:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)
