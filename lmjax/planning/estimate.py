"""From a compiled step to time, memory and money: the arithmetic of `lmjax plan`, without JAX.

The time of a step lies between two figures. Hidden: the cycles of matmuls, plus the attention kernels, as if all else
ran beside them. Exposed: all cycles, the kernels, and every synchronous collective at its ring's bandwidth. What
neither sees: asynchronous collectives that take longer than what runs beside them, congestion, stragglers, and
whatever the compiler's model of its own chip has wrong.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lmjax.planning import hlo
from lmjax.runtime.chips import GIB, Chip, parse_topology

Result = dict[str, Any]

# Pallas kernels carry no cycles. Attention: the matmuls of a visited tile, at half of peak. Grouped matmuls: 70%.
ATTENTION_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4, "dq, dkv": 5}
RULE = ("window", "causal", "spread")  # of a `Result`: which tiles are visited
SHARES = {"attention": 0.5, "grouped": 0.7}
LEAST = "matmuls alone, at the rate measured now"  # what a time for the devices at hand is


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """A kind of collective over a kind of link: executions a step, bytes that a chip sends, seconds at bandwidth."""

    kind: str
    link: str  # ici or dcn
    asynchronous: bool
    count: int
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step on one chip of a topology, in seconds, bytes and FLOPs.

    hidden, exposed: the two ends of the step's time. memory: bytes by kind; limit: what a program may use, 0 unknown.
    seconds: cycles by kind (matmul, other), attention and grouped (Pallas), and exposed (synchronous collectives).
    model_flops: of a step on one chip, by the model's formula; flops: those compiled; recomputed: of these, again.
    basis: what the times rest on. unknown: what is not counted, so that FLOPs and times are at least those given.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    memory: dict[str, int]
    limit: float
    hidden: float
    exposed: float
    seconds: dict[str, float]
    model_flops: float
    flops: float
    recomputed: float
    collectives: list[CollectiveRow]
    tokens: int
    peak_flops: float
    basis: str
    unknown: list[str]

    @property
    def fits(self) -> bool:
        """Whether the step's peak is within what a chip has."""
        return not self.limit or self.memory["peak"] <= self.limit

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs by peak FLOPs, with communication exposed and hidden."""
        return tuple(self.model_flops / self.peak_flops / t if t else math.nan for t in (self.exposed, self.hidden))

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Per chip, with communication exposed and hidden."""
        return tuple(self.tokens / self.chips / t if t else math.nan for t in (self.exposed, self.hidden))

    def days(self, tokens: float) -> tuple[float, float]:
        """To train on so many tokens, with communication hidden and exposed."""
        return tuple(tokens / self.tokens * t / 86400 for t in (self.hidden, self.exposed))


def estimate(result: Result, text: str) -> Estimate:
    """Of what `plan_compile.compiled` gives."""
    chip = chip_of(result)
    found = hlo.costs(hlo.parse(text), result["devices"], num_slices(result))
    rows = _collective_rows(found.collectives, result["slices"], chip)
    seconds = {"matmul": 0.0, "other": 0.0, "attention": 0.0, "grouped": 0.0}
    unknown: list[str] = []
    if chip is not None:
        seconds |= {kind: n / chip.clock for kind, n in found.cycles.items()}
        unknown = _add_kernels(seconds, found.calls, result, chip)
        rate, basis = chip.flops, "the compiler's cycles"
    else:
        rate = result["matmul_flops_per_second"]
        seconds["matmul"], basis = found.flops / rate, f"matmuls alone, at the {rate / 1e9:,.0f} GFLOP/s measured here"
    seconds["exposed"] = sum(row.seconds for row in rows if not row.asynchronous)
    hidden = seconds["matmul"] + seconds["attention"] + seconds["grouped"]
    work = [(call, call.times * kernel_flops(call, result)[1]) for call in filter(is_kernel, found.calls)]
    return Estimate(
        topology=result["topology"], chips=result["devices"], mesh=result["mesh"], memory=result["memory"],
        limit=chip.hbm if chip else 0.0, hidden=hidden, exposed=hidden + seconds["other"] + seconds["exposed"],
        seconds=seconds, model_flops=result["flops_per_token"] * result["tokens"] / result["devices"],
        flops=found.flops + sum(flops for _, flops in work),
        recomputed=found.recomputed_flops + sum(flops for call, flops in work if runs_again(call)), collectives=rows,
        tokens=result["tokens"], peak_flops=rate, basis=basis, unknown=unknown + _not_counted(found))


def chip_of(result: Result) -> Chip | None:
    """The chip of a compilation for a topology; None for the devices at hand."""
    return parse_topology(result["topology"]).chip if ":" in result["topology"] else None


def _not_counted(found: hlo.Costs) -> list[str]:
    loops, unrated = found.unknown_loops, found.unrated
    return ([f"all rounds but one of {loops} loop{'s'[:loops > 1]} whose length is not known before they run, such as "
             "those of attention=chunked and ring"] if loops else []) + (
            [f"time of {unrated} fusion{'s'[:unrated > 1]} that the compiler puts no cycles to"] if unrated else [])


def num_slices(result: Result) -> int:
    """Over how many slices the step runs."""
    return len(set(result["slices"]))


def _collective_rows(collectives: Sequence[hlo.Collective], slices: Sequence[int],
                     chip: Chip | None) -> list[CollectiveRow]:
    def link(c: hlo.Collective) -> str:
        crosses = any(len({slices[i] for i in group}) > 1 for group in c.groups)
        return "dcn" if c.by_hosts or crosses else "ici"

    sums: dict[tuple[str, str, bool], list[float]] = {}
    for c in collectives:
        row = sums.setdefault((c.kind, link(c), c.asynchronous), [0, 0.0])
        row[0] += c.times
        row[1] += c.times * c.traffic
    bandwidth = {"ici": chip.ici, "dcn": chip.dcn} if chip else {"ici": math.inf, "dcn": math.inf}
    rows = [CollectiveRow(*key, int(n), b, b / bandwidth[key[1]]) for key, (n, b) in sums.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def attention_role(call: hlo.Call) -> str:
    """Which pass of an attention kernel a Pallas call is, of `ATTENTION_MATMULS`, by its name; "" for anything else.

    A dkv that makes three arrays makes dq as well, of scores that a dq of its own would compute once more."""
    name = call.op_name.lower()
    if "attention" not in name and "splash" not in name and "flash" not in name and "mha" not in name:
        return ""
    if "dkv" in name:
        return "dq, dkv" if len(call.results) == 3 else "dkv"
    return "dq" if "dq" in name else "fwd"


def attention_flops(call: hlo.Call, window: int, causal: bool = True, spread: bool = False) -> float:
    """FLOPs of a Pallas attention call over the tiles that it visits on the device of the last queries; if these are
    spread (`sequence.balance_sequence`) on every device, which has as many early ones.

    Read off its operands: q is the first array of floats [..., H, T, K], k the next with the same K; a mask table
    [1 or H, tiles of T, tiles of S] of small integers gives the tiles' sizes, without which 512 is taken.
    """
    floats = [dims for dtype, dims in call.operands if dtype in ("bf16", "f32", "f16") and len(dims) >= 3]
    if len(floats) < 2:
        return 0.0
    q, k = floats[:2]
    T, K, S = q[-2], q[-1], k[-2]
    tables = [dims for dtype, dims in call.operands if dtype in ("s8", "s16", "s32") and len(dims) == 3
              and dims[1] != T and dims[2] != S]  # those are segment ids
    tiles_T, tiles_S = (max(t[i] for t in tables) for i in (1, 2)) if tables else (-(-T // 512), -(-S // 512))
    bq, bk = -(-T // tiles_T), -(-S // tiles_S)
    visited = visited_tiles(T // 2 if spread else T, S, bq, bk, window, causal)
    if spread:  # in a window the first pieces of all see less than those behind them, which is not gone into
        visited += visited_tiles(T // 2, S if window else T // 2, bq, bk, window)
    return ATTENTION_MATMULS[attention_role(call)] * 2.0 * math.prod(q[:-2]) * visited * bq * bk * K


def visited_tiles(T: int, S: int, bq: int, bk: int, window: int = 0, causal: bool = True) -> int:
    """Tiles of bq queries and bk keys in which a query sees a key: at most `window` - 1 away (0: all), and not behind
    it if it is causal."""
    count = 0
    for i in range(-(-T // bq)):
        first, last = i * bq + S - T, min((i + 1) * bq, T) - 1 + S - T  # queries end where keys end
        low = max(first - window + 1, 0) // bk if window else 0
        if not causal:
            last = last + window - 1 if window else S - 1
        count += max(min(last, S - 1) // bk - low + 1, 0)
    return count


def is_kernel(call: hlo.Call) -> bool:
    """Whether it is a Pallas call that works, not a buffer or a table of group sizes."""
    return call.target == "tpu_custom_call" and call.op_name != "ragged-dot-metadata"


def kernel_flops(call: hlo.Call, result: Result) -> tuple[str, float]:
    """(its kind, of `SHARES`; its FLOPs each time) of a Pallas call on one device; 0 FLOPs if it is no known one."""
    if attention_role(call):
        return "attention", attention_flops(call, *(result[key] for key in RULE))
    if "gmm" in call.op_name.lower() or "ragged-dot" in call.op_name:
        return "grouped", grouped_flops(call) / result["expert_ways"]  # rows of others' experts are skipped
    return "attention", 0.0


def runs_again(call: hlo.Call) -> bool:
    """Whether `jax.checkpoint` made the backward pass run the kernel again: its name says so, or it is attention's
    forward kernel in the backward pass."""
    return hlo.REMAT in call.op_name or ("transpose(" in call.op_name and attention_role(call) == "fwd")


def _add_kernels(seconds: dict[str, float], calls: Sequence[hlo.Call], result: Result, chip: Chip) -> list[str]:
    """Charges Pallas calls to `seconds`; returns the names of those that it cannot."""
    unknown = []
    for call in filter(is_kernel, calls):
        kind, flops = kernel_flops(call, result)
        if not flops:
            unknown.append(call.op_name or call.target)
        seconds[kind] += call.times * flops / (SHARES[kind] * chip.flops)
    return sorted(set(unknown))


def grouped_flops(call: hlo.Call) -> float:
    """FLOPs of a grouped matmul, rows [M, K] each by one of the matrices [E, K, N] or [E, N, K], or of its transpose,
    [K, M] or [M, K] by [M, N]: all multiply M rows."""
    floats = [dims for dtype, dims in call.operands if dtype in ("bf16", "f32", "f16", "s8") and len(dims) >= 2]
    if len(floats) < 2:
        return 0.0
    a, b = floats[:2]
    shared = max(set(a) & set(b), default=1) if len(b) == 2 else a[-1]
    return 2.0 * math.prod(a) * math.prod(b[-2:]) / shared


def time_unit(seconds: float) -> tuple[str, float]:
    """(name, seconds) of the unit that a time is readable in."""
    return ("s", 1.0) if seconds >= 0.1 else ("ms", 1e-3) if seconds >= 1e-4 else ("us", 1e-6)


def size_unit(size: float) -> tuple[str, float]:
    """(name, bytes) of the unit that a size is readable in."""
    return ("GiB", GIB) if size >= GIB else ("MiB", 2**20)


def readable(size: float) -> str:
    """Bytes in their unit."""
    unit, scale = size_unit(size)
    return f"{size / scale:.1f} {unit}"


def span(values: tuple[float, float], form: Callable[[float], str]) -> str:
    """"a .. b", or one figure where both read the same; the smaller first."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"
