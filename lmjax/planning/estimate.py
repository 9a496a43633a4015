"""From a compiled step to its time, memory and rates: the arithmetic of `lmjax plan`, without JAX.

The time of a step lies between two figures:

- hidden: the matmuls' cycles plus the attention and grouped kernels, as if all else ran beside
  them.
- exposed: all cycles, the kernels, and each synchronous collective at the bandwidth of its ring,
  one after another.

Neither figure includes an asynchronous collective that takes longer than the work beside it,
congestion, stragglers, or errors of the compiler's model of the chip.
"""

import dataclasses
import math
from collections.abc import Sequence

from lmjax.planning.collectives import Collective
from lmjax.planning.costs import CustomCall, StepCosts, step_costs
from lmjax.planning.hlo import parse
from lmjax.planning.kernels import PEAK_SHARES, StepFacts, is_kernel, is_recomputed, kernel_flops
from lmjax.runtime.chips import Chip, parse_topology

LEAST = "matmuls alone, at the rate measured now"  # the basis of times for the devices at hand


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """All collectives of one kind over one kind of link, on one chip and in one step."""

    kind: str
    link: str  # "ici", within a slice, or "dcn", between slices
    asynchronous: bool
    count: int  # executions
    bytes: float  # sent by the chip
    seconds: float  # at the link's bandwidth


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step on one device of a topology, in seconds, bytes and FLOPs."""

    topology: str
    devices: int  # of JAX, on all chips
    chips: int
    mesh: dict[str, int]
    memory: dict[str, int]  # bytes by kind
    limit: float  # bytes that a program may use; 0 if unknown
    hidden: float  # seconds; the lower end of the step's time
    exposed: float  # seconds; the upper end
    # By kind: cycles (matmul, other), Pallas kernels (attention, grouped) and synchronous
    # collectives (exposed).
    seconds: dict[str, float]
    model_flops: float  # by the model's formula
    flops: float  # of the compiled program
    recomputed: float  # the part of `flops` that the backward pass computes again
    collectives: list[CollectiveRow]
    tokens: int  # per step on all devices
    peak_flops: float  # FLOP/s
    basis: str  # what the times rest on
    unknown: list[str]  # what is not counted: FLOPs and times are then lower bounds

    @property
    def fits(self) -> bool:
        """Whether the step's peak is within the memory of a device."""
        return not self.limit or self.memory["peak"] <= self.limit

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs divided by peak FLOPs, with communication exposed and hidden."""
        return (self._per_second(self.model_flops / self.peak_flops, self.exposed),
                self._per_second(self.model_flops / self.peak_flops, self.hidden))

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Per device, with communication exposed and hidden."""
        return (self._per_second(self.tokens / self.devices, self.exposed),
                self._per_second(self.tokens / self.devices, self.hidden))

    def days(self, tokens: float) -> tuple[float, float]:
        """Days to train on so many tokens, with communication hidden and exposed."""
        steps = tokens / self.tokens
        return steps * self.hidden / 86400, steps * self.exposed / 86400

    @staticmethod
    def _per_second(amount: float, seconds: float) -> float:
        return amount / seconds if seconds else math.nan


def estimate_step(facts: StepFacts, text: str) -> Estimate:
    """The estimate of a compiled step.

    Args:
      facts, text: the two results of `compile.compiled`; text is the optimized HLO.
    """
    chip = chip_of(facts)
    costs = step_costs(parse(text), facts["devices"], num_slices(facts))
    rows = _collective_rows(costs.collectives, facts["slices"], chip)
    kernels = [call for call in costs.calls if is_kernel(call)]
    seconds = {"matmul": 0.0, "other": 0.0, "attention": 0.0, "grouped": 0.0}
    unknown: list[str] = []
    if chip is not None:
        seconds |= {kind: n / chip.clock for kind, n in costs.cycles.items()}
        unknown = _add_kernels(seconds, kernels, facts, chip)
        rate, basis = chip.flops, "the compiler's cycles"
    else:
        rate = facts["matmul_flops_per_second"]
        seconds["matmul"] = costs.flops / rate
        basis = f"matmuls alone, at the {rate / 1e9:,.0f} GFLOP/s measured here"
    seconds["exposed"] = sum(row.seconds for row in rows if not row.asynchronous)
    hidden = seconds["matmul"] + seconds["attention"] + seconds["grouped"]
    work = [(call, call.times * kernel_flops(call, facts)[1]) for call in kernels]
    return Estimate(
        topology=facts["topology"], devices=facts["devices"],
        chips=facts["devices"] // (chip.devices if chip else 1), mesh=facts["mesh"],
        memory=facts["memory"], limit=chip.hbm if chip else 0.0, seconds=seconds,
        hidden=hidden, exposed=hidden + seconds["other"] + seconds["exposed"],
        model_flops=facts["flops_per_token"] * facts["tokens"] / facts["devices"],
        flops=costs.flops + sum(flops for _, flops in work),
        recomputed=costs.recomputed_flops + sum(flops for call, flops in work
                                                if is_recomputed(call)),
        collectives=rows, tokens=facts["tokens"], peak_flops=rate, basis=basis,
        unknown=unknown + _not_counted(costs))


def chip_of(facts: StepFacts) -> Chip | None:
    """The chip that a step was compiled for; None for the devices at hand."""
    return parse_topology(facts["topology"]).chip if ":" in facts["topology"] else None


def num_slices(facts: StepFacts) -> int:
    """The number of slices that the step runs on."""
    return len(set(facts["slices"]))


def _not_counted(costs: StepCosts) -> list[str]:
    loops, fusions = costs.unknown_loops, costs.unrated
    missing = []
    if loops:
        missing.append(f"all rounds but one of {loops} loop{'s'[:loops > 1]} whose length is not "
                       "known before they run, such as those of attention=chunked and ring")
    if fusions:
        missing.append(f"time of {fusions} fusion{'s'[:fusions > 1]} that the compiler puts no "
                       "cycles to")
    return missing


def _collective_rows(collectives: Sequence[Collective], slices: Sequence[int],
                     chip: Chip | None) -> list[CollectiveRow]:
    """Sums by kind and link, the most bytes first; `slices`: the slice of each device."""

    def link(c: Collective) -> str:
        crosses = any(len({slices[i] for i in group}) > 1 for group in c.groups)
        return "dcn" if c.by_hosts or crosses else "ici"

    counts: dict[tuple[str, str, bool], int] = {}
    sizes: dict[tuple[str, str, bool], float] = {}
    for c in collectives:
        key = c.kind, link(c), c.asynchronous
        counts[key] = counts.get(key, 0) + c.times
        sizes[key] = sizes.get(key, 0.0) + c.times * c.traffic
    bandwidth = {"ici": chip.ici if chip else math.inf, "dcn": chip.dcn if chip else math.inf}
    rows = [CollectiveRow(*key, counts[key], size, size / bandwidth[key[1]])
            for key, size in sizes.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _add_kernels(seconds: dict[str, float], kernels: Sequence[CustomCall], facts: StepFacts,
                 chip: Chip) -> list[str]:
    """Adds the kernels' time to `seconds`; returns the names of the unknown ones."""
    unknown = set()
    for call in kernels:
        kind, flops = kernel_flops(call, facts)
        if not flops:
            unknown.add(call.op_name or call.target)
        seconds[kind] += call.times * flops / (PEAK_SHARES[kind] * chip.flops)
    return sorted(unknown)
