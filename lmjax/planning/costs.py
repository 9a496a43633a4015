"""Adds up what a compiled step costs, from its HLO: cycles, FLOPs, collectives and kernels.

A loop's body counts once per trip. On TPU every fusion carries the compiler's `estimated_cycles`;
on other platforms cycles are 0 and the rest holds. Needs no JAX.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.planning.collectives import Collective, between_slices, collectives
from lmjax.planning.hlo import NO_CYCLES, Computation, Instruction, Module, arrays, trip_count

REMAT = "rematted_computation"  # jax.checkpoint names with it what the backward pass recomputes
MATMULS = ("dot", "convolution")


class CustomCall(NamedTuple):
    """A call of a function that XLA does not know, such as a Pallas kernel.

    operands, results: (dtype, dimensions) of each array. times: executions per step.
    """

    target: str
    op_name: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    results: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclasses.dataclass
class StepCosts:
    """The sums over one step on one device."""

    cycles: dict[str, int]  # of fusions with a matmul ("matmul") and without one ("other")
    flops: float  # of matmuls
    recomputed_flops: float  # the part of `flops` that jax.checkpoint has the step compute again
    collectives: list[Collective]
    calls: list[CustomCall]
    unknown_loops: int = 0  # loops of unknown length, whose bodies count once
    unrated: int = 0  # instructions whose cycles the compiler cannot estimate


def step_costs(module: Module, num_devices: int, slices: int = 1) -> StepCosts:
    """Adds up a step on `num_devices` devices, which lie in `slices` slices of equal size."""
    total = StepCosts({"matmul": 0, "other": 0}, 0.0, 0.0, [], [])
    known: dict[str, bool] = {}
    for computation, instruction, times in _schedule(module, module.entry, 1):
        matmul = _holds_matmul(module, instruction, known)
        if instruction.cycles == NO_CYCLES:
            total.unrated += 1
        else:
            total.cycles["matmul" if matmul else "other"] += times * instruction.cycles
        if matmul:
            for where, inner in _matmuls(module, computation, instruction):
                flops = times * matmul_flops(inner, where)
                total.flops += flops
                total.recomputed_flops += flops if REMAT in inner.op_name else 0.0
        if instruction.opcode == "custom-call":
            total.calls.append(_custom_call(instruction, computation, times))
        if instruction.opcode == "while" and trip_count(module, instruction) is None:
            total.unknown_loops += 1
        total.collectives += between_slices(computation, instruction, times, slices)
        # Groups in the text lie within one slice; the hosts send what crosses slices.
        total.collectives += collectives(module, computation, instruction, times,
                                         num_devices // slices)
    return total


def _schedule(module: Module, name: str,
              times: int) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction that runs by itself, with its computation and its executions per step.

    The instructions in a fusion do not run by themselves.
    """
    computation = module.computations[name]
    for instruction in computation.values():
        yield computation, instruction, times
        # `collectives` looks into an async-start itself.
        if instruction.opcode not in ("fusion", "async-start"):
            trips = (trip_count(module, instruction) or 1) if instruction.opcode == "while" else 1
            for inner in module.called(instruction):
                yield from _schedule(module, inner, times * trips)


def _holds_matmul(module: Module, instruction: Instruction, known: dict[str, bool]) -> bool:
    """Whether it is a matmul or a fusion with one; `known` keeps the answers by computation."""
    if instruction.opcode in MATMULS:
        return True
    if instruction.opcode != "fusion":
        return False
    names = module.called(instruction)
    for name in names:
        if name not in known:
            known[name] = any(_holds_matmul(module, inner, known)
                              for inner in module.computations[name].values())
    return any(known[name] for name in names)


def _matmuls(module: Module, computation: Computation,
             instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    if instruction.opcode in MATMULS:
        yield computation, instruction
    for where, inner in module.inside(instruction):
        if inner.opcode in MATMULS:
            yield where, inner


def _custom_call(instruction: Instruction, computation: Computation, times: int) -> CustomCall:
    operands = tuple(array for name in instruction.operands if name in computation
                     for array in arrays(computation[name].shape))
    return CustomCall(instruction.target, instruction.op_name, operands, times,
                      tuple(arrays(instruction.shape)))


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a dot or convolution: 2 per multiply-add, those with padding left out."""
    out = arrays(instruction.shape)[0][1]
    left, right = (arrays(computation[name].shape)[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, f"a convolution without dimension labels: {instruction.name}"
    lhs, rhs, result = labels.groups()
    window = "".join(re.findall(r"window=\{([^}]*)\}", instruction.attributes))
    settings = {key: value.split("x") for key, value in re.findall(
        r"\b(size|stride|pad|lhs_dilate|rhs_dilate|rhs_reversal)=([\dx_-]+)", window)}
    flops = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for i in range(len(lhs) - 2):
        label = str(i)
        flops *= _products(left[lhs.index(label)], right[rhs.index(label)],
                           out[result.index(label)],
                           {key: values[i] for key, values in settings.items()})
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return flops / (int(groups[1]) if groups else 1)


def _products(left: int, size: int, out: int, window: dict[str, str]) -> int:
    """The pairs (output, kernel position) along one dimension that meet an element of the input.

    Args:
      left, size, out: the input's, the kernel's and the output's length.
    """
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilate = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    kernel = np.arange(size)[None, :] * int(window.get("rhs_dilate", 1))
    at = np.arange(out)[:, None] * stride - low + kernel
    return int(np.sum((at >= 0) & (at < (left - 1) * dilate + 1) & (at % dilate == 0)))


def _numbers(attributes: str, key: str) -> Sequence[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []
