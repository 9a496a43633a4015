"""The collectives of an HLO module: what they move, and between which devices."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.planning.hlo import Computation, Instruction, Module, num_bytes

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]"
                    r"(?:, device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))? \{([^}]*)\}")
# TPU's compiler hands what goes to other slices to the hosts, as a send and a receive.
_TO_OTHER_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Collective(NamedTuple):
    """A collective of the step.

    bytes: per execution, of the array that a group holds together: an all-gather's result, the
      operand of the others.
    groups: the devices of each group, as positions in the mesh; a permutation's pairs; () for one
      group of all devices.
    times: executions per step.
    asynchronous: it starts and ends in different places, so that other work runs in between.
    by_hosts: the hosts send it to other slices; a group has one chip of each slice.
    """

    kind: str
    bytes: int
    groups: Groups
    group_size: int
    times: int
    asynchronous: bool
    op_name: str
    by_hosts: bool = False

    @property
    def traffic(self) -> float:
        """Bytes that a chip sends per execution on a ring of n chips.

        A permutation sends the whole array, an all-reduce 2 (n-1)/n of it, the others (n-1)/n.
        """
        n = max(self.group_size, 1)
        if self.kind == "collective-permute":
            return float(self.bytes)
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(module: Module, computation: Computation, instruction: Instruction, times: int,
                num_devices: int) -> Iterator[Collective]:
    """The collectives that an instruction is or starts.

    TPU's compiler spreads an asynchronous collective over several fusions: one starts it, others
    carry it along beside their own work, the last one ends it. Only the first one counts. A fusion
    of an all-reduce and a slice is a reduce-scatter.

    Args:
      times: executions per step.
      num_devices: the size of a group that the text does not spell out.
    """
    if instruction.opcode in ("fusion", "async-start"):
        inside = list(module.inside(instruction))
        called = module.called(instruction)
        targets = {inner.target for _, inner in inside if inner.opcode == "custom-call"}
        carried = ("AsyncCollectiveDone" in targets
                   or any("async_collective_fusion" in name for name in called))
        started = "AsyncCollectiveStart" in targets or instruction.opcode == "async-start"
        if carried and not started:
            return
        scattered = any("all-reduce-scatter" in name for name in (instruction.name, *called))
        for where, inner in inside:
            if inner.opcode in COLLECTIVES:
                reduced = scattered and inner.opcode == "all-reduce"
                kind = "reduce-scatter" if reduced else inner.opcode
                yield _collective(kind, inner, where, times, started, num_devices)
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        asynchronous = kind != instruction.opcode
        yield _collective(kind, instruction, computation, times, asynchronous, num_devices)


def _collective(kind: str, instruction: Instruction, computation: Computation, times: int,
                asynchronous: bool, num_devices: int) -> Collective:
    groups, size = replica_groups(instruction.attributes, num_devices)
    moved = _operand_bytes(instruction, computation) * (size if kind == "all-gather" else 1)
    return Collective(kind, moved, groups, size, times, asynchronous, instruction.op_name)


def between_slices(computation: Computation, instruction: Instruction, times: int,
                   slices: int) -> Iterator[Collective]:
    """The collective over `slices` that a send to the hosts stands for, if it is one."""
    found = _TO_OTHER_SLICES.search(instruction.attributes)
    if instruction.opcode != "send" or not found:
        return
    kind = ("collective-permute" if found[1] == "ONE_TO_ONE"
            else found[1].lower().replace("_", "-"))
    moved = _operand_bytes(instruction, computation) * (slices if kind == "all-gather" else 1)
    yield Collective(kind, moved, (), slices, times, True, instruction.op_name, by_hosts=True)


def _operand_bytes(instruction: Instruction, computation: Computation) -> int:
    return sum(num_bytes(computation[name].shape) for name in instruction.operands
               if name in computation)


def replica_groups(attributes: str, num_devices: int) -> tuple[Groups, int]:
    """The groups of a collective, () for one group of all devices, and the size of a group.

    Members are positions in the mesh. Reads the pairs of a permutation and three notations of
    groups: {{0,1},{2,3}}, [groups,size]<=[dims]T(permutation) and mesh['a'=2,'b'=4] {'a'}.
    """
    if listed := _LISTED.search(attributes):
        groups = tuple(tuple(int(n) for n in group.split(","))
                       for group in re.findall(r"\{([\d,]+)\}", listed[1]))
        return groups, len(groups[0])
    if counted := _COUNTED.search(attributes):
        shape = int(counted[1]), int(counted[2])
        return _rows(_device_ids(counted[3], math.prod(shape)).reshape(shape))
    if named := _NAMED.search(attributes):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _device_ids(named[2] or "", math.prod(sizes.values()))
        return _named_groups(ids, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3]))
    return (), num_devices


def _named_groups(ids: np.ndarray, sizes: dict[str, int],
                  chosen: Sequence[tuple[str, str, str]]) -> tuple[Groups, int]:
    """Groups along the `chosen` axes of a mesh, or along parts of axes.

    'a':(2)4 is the part of axis 'a' whose size is 4, with a part of size 2 outside of it.
    """
    dims: list[int] = []
    inside: list[int] = []  # the indices in `dims` that a group runs along
    for axis, n in sizes.items():
        at = 1
        parts = sorted((int(p or 1), int(size or n)) for name, p, size in chosen if name == axis)
        for before, size in parts:
            inside.append(len(dims) + 1)
            dims += [before // at, size]
            at = before * size
        dims.append(n // at)
    outside = [i for i in range(len(dims)) if i not in inside]
    group_size = math.prod(dims[i] for i in inside)
    return _rows(ids.reshape(dims).transpose(*outside, *inside).reshape(-1, group_size))


def _rows(ids: np.ndarray) -> tuple[Groups, int]:
    return tuple(map(tuple, ids.tolist())), ids.shape[1]


def _device_ids(text: str, size: int) -> np.ndarray:
    """The order of the devices: "" as they come, "3,1,2,0" listed, "[2,4]T(1,0)" transposed."""
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(size).reshape([int(n) for n in iota[1].split(",")])
        return ids.transpose([int(n) for n in iota[2].split(",")]) if iota[2] else ids
    return np.array([int(n) for n in text.split(",")]) if text else np.arange(size)
