"""Reads what a compiled step will do from its optimized HLO text: cycles, FLOPs and collectives, loops counted in full.

Pure functions of text; nothing here imports JAX. The text is what `compiled.as_text()` gives. On TPU every fused
computation carries the compiler's own `estimated_cycles`; on other platforms cycles are 0 and the rest holds.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16,
        "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # f8*: 8
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")
CALLERS = ("while", "call", "conditional", "async-start", "fusion")
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]"
                          r"(?:, device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))? \{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')
CONTINUED = re.compile(r'\n(?="|\}\})')  # Pallas calls carry metadata of several lines
TARGET = re.compile(r'custom_call_target="([^"]*)"')
# What goes to other slices: TPU's compiler gives it to the hosts, by a send and a receive that name the collective.
BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
NO_CYCLES = 2**63 - 1
REMAT = "rematted_computation"  # what jax.checkpoint puts into the names of what it computes again


class Instruction(NamedTuple):
    """One line: `name = shape opcode(operands), attributes`. operands: names, or a constant's or parameter's text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program, "" if unknown."""
        found = OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it makes none, `NO_CYCLES` where it says that it cannot."""
        found = CYCLES.search(self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each its instructions by name in scheduled order; `entry` is where it starts."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def called(self, instruction: Instruction) -> list[str]:
        """Computations that `instruction` runs: a loop's body, a fusion's computation, a conditional's branches."""
        if instruction.opcode not in CALLERS:
            return []
        names = CALLED.findall(instruction.attributes)
        for branches in BRANCHES.findall(instruction.attributes):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return [name for name in names if name in self.computations]


class Collective(NamedTuple):
    """A collective of the schedule.

    bytes: of the whole array that a group holds together (all-gather: its result; the others: their operand), per
    execution. groups: their devices' positions in the mesh (of a permutation, its pairs); () for one of all devices.
    times: executions a step. asynchronous: started and awaited apart, so that other work can run in between.
    by_hosts: between slices, a group one chip of each.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    group_size: int
    times: int
    asynchronous: bool
    op_name: str
    by_hosts: bool = False

    @property
    def traffic(self) -> float:
        """Bytes that a chip sends per execution on a ring: (n-1)/n of the array, twice that for an all-reduce."""
        n = max(self.group_size, 1)
        if self.kind == "collective-permute":
            return float(self.bytes)
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


class Call(NamedTuple):
    """A custom call: what it calls, from where, on arrays of which shapes, how often a step, and what it makes."""

    target: str
    op_name: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    results: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclasses.dataclass
class Costs:
    """Sums over the schedule of one step on one device.

    cycles: by kind, matmul and other. flops: of matmuls. recomputed_flops: of those, what `jax.checkpoint` made the
    backward pass compute again. unknown_loops: how many loops' bodies count once because their length is not known.
    unrated: how many instructions the compiler cannot put cycles to.
    """

    cycles: dict[str, int]
    flops: float
    recomputed_flops: float
    collectives: list[Collective]
    calls: list[Call]
    unknown_loops: int = 0
    unrated: int = 0


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
      ValueError: there is no ENTRY computation in it.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in CONTINUED.sub(" ", text).splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (instruction := _instruction(line.strip())):
                current[instruction.name] = instruction
        elif line.endswith("{") and "->" in line:
            head = line.removeprefix("ENTRY ")
            name = re.split(r"[ (]", head.lstrip("%"), maxsplit=1)[0]
            current = computations.setdefault(name, {})
            entry = name if head is not line and line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("expected the text of an HLO module, got one without ENTRY; pass compiled.as_text()")
    return Module(computations, entry)


def costs(module: Module, num_devices: int, slices: int = 1) -> Costs:
    """Adds up a step on `num_devices` of `slices`: loop bodies times their trip counts, fusions once, as a whole."""
    total = Costs({"matmul": 0, "other": 0}, 0.0, 0.0, [], [])
    holds: dict[str, bool] = {}
    for computation, instruction, times in _schedule(module, module.entry, 1):
        matmul = _holds_matmul(module, instruction, holds)
        total.unrated += (unrated := instruction.cycles == NO_CYCLES)
        total.cycles["matmul" if matmul else "other"] += 0 if unrated else times * instruction.cycles
        if matmul:
            for where, inner in _matmuls(module, computation, instruction):
                flops = times * matmul_flops(inner, where)
                total.flops += flops
                total.recomputed_flops += flops if REMAT in inner.op_name else 0.0
        if instruction.opcode == "custom-call":
            total.calls.append(_call(instruction, computation, times))
        total.unknown_loops += instruction.opcode == "while" and trip_count(module, instruction) is None
        if instruction.opcode == "send" and (kind := BETWEEN_SLICES.search(instruction.attributes)):
            total.collectives.append(_between_slices(instruction, computation, kind[1], times, slices))
        # The groups are those of one slice where there are several: what spans them is sent.
        total.collectives += _collectives(module, computation, instruction, times, num_devices // slices)
    return total


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs: what the compiler says, or else the bound that its condition compares with; None where
    that is no constant."""
    if known := TRIPS.search(loop.attributes):
        return int(known[1])
    condition = module.computations[re.search(r"\bcondition=%?([\w.-]+)", loop.attributes)[1]]
    *_, root = condition.values()
    bounds = [int(i.operands[0]) for i in condition.values()
              if i.opcode == "constant" and i.shape.startswith(("s32", "u32", "s64", "u64"))]
    direct = [i.operands[0] for i in map(condition.get, root.operands) if i is not None and i.opcode == "constant"]
    found = [int(n) for n in direct if n.lstrip("-").isdigit()] or (bounds if root.opcode != "compare" else [])
    inclusive = "direction=LE" in root.attributes or "direction=GE" in root.attributes
    return max(found[-1] + inclusive, 1) if found else None


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in a shape or a tuple of shapes, layouts and comments left out."""
    bare = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)
    return [(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
            for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", bare)]


def num_bytes(shape: str) -> int:
    """Bytes of a shape or of all in a tuple, without the padding of tiled layouts."""
    return sum(math.prod(dims) * _bits(dtype) // 8 for dtype, dims in arrays(shape))


def matmul_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """FLOPs of a dot or convolution: 2 for each multiply-add that is not with padding."""
    out = arrays(instruction.shape)[0][1]
    left, right = (arrays(computation[name].shape)[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    windows = dict(re.findall(r"\b(size|stride|pad|lhs_dilate|rhs_dilate|rhs_reversal)=([\dx_-]+)",
                              "".join(re.findall(r"window=\{([^}]*)\}", instruction.attributes))))
    lhs, rhs, result = labels.groups()
    flops = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for i in range(len(lhs) - 2):
        values = {key: windows[key].split("x")[i] for key in windows}
        flops *= _products(left[lhs.index(str(i))], right[rhs.index(str(i))], out[result.index(str(i))], values)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return flops / (int(groups[1]) if groups else 1)


def _products(left: int, size: int, out: int, window: dict[str, str]) -> int:
    """Pairs of (output, kernel position) along one dimension that meet an element of the input."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilate = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    at = (np.arange(out)[:, None] * stride - low + np.arange(size)[None, :] * int(window.get("rhs_dilate", 1)))
    return int(np.sum((at >= 0) & (at < (left - 1) * dilate + 1) & (at % dilate == 0)))


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1:close - 1]
    names = re.findall(r"%([\w.-]+)", inside)
    # Text without "%" names operands plainly, behind their shapes or alone.
    plain = tuple(names) or tuple(part.split()[-1] for part in re.sub(r"[\[{(][^\]})]*[\]})]|/\*.*?\*/", "", inside)
                                  .split(",") if part.strip())
    return Instruction(name.lstrip("%"), shape, opcode, plain, rest[close:])


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _schedule(module: Module, name: str, times: int) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
    """Every instruction that runs on its own, its computation, and how often; fused ones are inside their fusion."""
    computation = module.computations[name]
    for instruction in computation.values():
        yield computation, instruction, times
        if instruction.opcode != "fusion":
            trips = (trip_count(module, instruction) if instruction.opcode == "while" else 1) or 1
            for inner in module.called(instruction):
                if instruction.opcode != "async-start":  # its collective is read off at the start itself
                    yield from _schedule(module, inner, times * trips)


def _inside(module: Module, instruction: Instruction) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
    for name in module.called(instruction):
        for inner in module.computations[name].values():
            yield module.computations[name], inner
            yield from _inside(module, inner)


def _holds_matmul(module: Module, instruction: Instruction, known: dict[str, bool]) -> bool:
    if instruction.opcode in ("dot", "convolution"):
        return True
    if instruction.opcode != "fusion":
        return False
    names = module.called(instruction)
    for name in names:
        if name not in known:
            known[name] = any(_holds_matmul(module, i, known) for i in module.computations[name].values())
    return any(known[name] for name in names)


def _matmuls(module: Module, computation: dict[str, Instruction],
             instruction: Instruction) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
    if instruction.opcode in ("dot", "convolution"):
        yield computation, instruction
    for where, inner in _inside(module, instruction):
        if inner.opcode in ("dot", "convolution"):
            yield where, inner


def _collectives(module: Module, computation: dict[str, Instruction], instruction: Instruction, times: int,
                 num_devices: int) -> Iterator[Collective]:
    """The collective that `instruction` is or starts.

    TPU's asynchronous collective fusions appear as a fusion that starts one, fusions that carry it along beside
    other work, and one that ends it; only the first counts. A fused all-reduce and slice is a reduce-scatter.
    """
    if instruction.opcode in ("fusion", "async-start"):
        inside = list(_inside(module, instruction))
        targets = {t for _, i in inside if i.opcode == "custom-call" for t in TARGET.findall(i.attributes)}
        carried = "AsyncCollectiveDone" in targets or any("async_collective_fusion" in n
                                                          for n in module.called(instruction))
        started = "AsyncCollectiveStart" in targets or instruction.opcode == "async-start"
        if carried and not started:
            return
        scattered = any("all-reduce-scatter" in n for n in (instruction.name, *module.called(instruction)))
        for where, inner in inside:
            if inner.opcode in COLLECTIVES:
                kind = "reduce-scatter" if scattered and inner.opcode == "all-reduce" else inner.opcode
                yield _collective(inner, where, kind, times, started, num_devices)
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield _collective(instruction, computation, kind, times, kind != instruction.opcode, num_devices)


def _collective(instruction: Instruction, computation: dict[str, Instruction], kind: str, times: int,
                asynchronous: bool, num_devices: int) -> Collective:
    groups, size = replica_groups(instruction.attributes, num_devices)
    moved = _operand_bytes(instruction, computation) * (size if kind == "all-gather" else 1)
    return Collective(kind, moved, groups, size, times, asynchronous, instruction.op_name)


def _between_slices(instruction: Instruction, computation: dict[str, Instruction], kind: str, times: int,
                    slices: int) -> Collective:
    kind = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
    moved = _operand_bytes(instruction, computation) * (slices if kind == "all-gather" else 1)
    return Collective(kind, moved, (), slices, times, True, instruction.op_name, by_hosts=True)


def _operand_bytes(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    return sum(num_bytes(computation[name].shape) for name in instruction.operands if name in computation)


def replica_groups(attributes: str, num_devices: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """(the groups, () for one of all devices; a group's size) of a collective; members are positions in the mesh.

    Reads pairs and the three notations: {{0,1},{2,3}}, [groups,size]<=[dims]T(permutation), mesh['a'=2,'b'=4] {'a'}.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", attributes):
        groups = tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
        return groups, len(groups[0])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        ids = _device_ids(iota[3], int(iota[1]) * int(iota[2]))
        return _rows(ids.reshape(int(iota[1]), int(iota[2])))
    if named := NAMED_GROUPS.search(attributes):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _device_ids(named[2] or "", math.prod(sizes.values()))
        return _named_groups(ids, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3]))
    return (), num_devices


def _named_groups(ids: np.ndarray, sizes: dict[str, int],
                  chosen: Sequence[tuple[str, str, str]]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Groups along the `chosen` axes of the mesh, or along parts of them: 'a':(2)4 is the 4 inside the first 2."""
    dims: list[int] = []
    inside: list[int] = []  # which of `dims` a group runs along
    for axis, n in sizes.items():
        at = 1
        for before, size in sorted((int(p or 1), int(size or n)) for name, p, size in chosen if name == axis):
            inside.append(len(dims) + 1)
            dims += [before // at, size]
            at = before * size
        dims.append(n // at)
    outside = [i for i in range(len(dims)) if i not in inside]
    return _rows(ids.reshape(dims).transpose(*outside, *inside).reshape(-1, math.prod(dims[i] for i in inside)))


def _rows(ids: np.ndarray) -> tuple[tuple[tuple[int, ...], ...], int]:
    return tuple(map(tuple, ids.tolist())), ids.shape[1]


def _device_ids(text: str, size: int) -> np.ndarray:
    """The order of devices in a named mesh: as they come, listed, or [2,4]T(1,0): counted and transposed."""
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(size).reshape([int(n) for n in iota[1].split(",")])
        return ids.transpose([int(n) for n in iota[2].split(",")]) if iota[2] else ids
    return np.array([int(n) for n in text.split(",")]) if text else np.arange(size)


def _call(instruction: Instruction, computation: dict[str, Instruction], times: int) -> Call:
    target = TARGET.search(instruction.attributes)
    operands = tuple(array for name in instruction.operands if name in computation
                     for array in arrays(computation[name].shape))
    return Call(target[1] if target else "", instruction.op_name, operands, times, tuple(arrays(instruction.shape)))


def _numbers(attributes: str, key: str) -> Sequence[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _bits(dtype: str) -> int:
    return 8 if dtype.startswith("f8") else BITS.get(dtype, 0)  # 0: tokens, opaque
