"""The table that `lmjax plan` prints."""

from lmjax.monitoring.units import human_count, human_range, size_unit, time_unit
from lmjax.planning.estimate import LEAST, Estimate, num_slices
from lmjax.planning.kernels import PEAK_SHARES, StepFacts
from lmjax.runtime.chips import GIB
from lmjax.training.recipe import Recipe

WORK = {  # the rows of a step's time, by the kinds of `Estimate.seconds`
    "matmul": "matmuls",
    "attention": f"attention kernels, at {PEAK_SHARES['attention']:.0%} of peak",
    "grouped": f"grouped matmuls, at {PEAK_SHARES['grouped']:.0%} of peak",
    "other": "other compute",
    "exposed": "synchronous collectives",
}


def table(recipe: Recipe, facts: StepFacts, estimate: Estimate, tokens: float) -> str:
    """All figures as text; `tokens`: a budget to compute the training time for, 0 for none."""
    axes = [f"{axis}={n}" for axis, n in estimate.mesh.items() if n > 1]
    packages = ("jax", "libtpu") if estimate.limit else ("jax",)
    used = [f"{name} {facts['versions'][name]}" for name in packages if name in facts["versions"]]
    attention, seconds = facts["attention"], facts["seconds"]
    lines = [
        f"{estimate.topology}: {estimate.devices} x {facts['device_kind']}; "
        f"mesh {', '.join(axes) or 'one device'}; {facts['compute_dtype']}; {', '.join(used)}",
        f"model: {human_count(facts['parameters'])} parameters; "
        f"{human_count(estimate.tokens)} tokens per step, "
        f"{estimate.tokens // estimate.devices:,} per device; attention {attention['kernel']} "
        f"({attention['reason'].partition(';')[0]})",
        "", *_memory(estimate),
        "", *_compute(estimate),
        "", *_communication(estimate), *_between_slices(recipe, facts),
        "", *_time(recipe, estimate, tokens),
        "", f"compiled in {seconds['trace'] + seconds['compile']:.0f} s with "
        f"{facts['host_bytes'] / GIB:.1f} GiB of host memory",
    ]
    return "\n".join([*lines, in_short(estimate)] if estimate.limit else lines)


def in_short(estimate: Estimate) -> str:
    """The last line of the table, which recipes for pods record in their docstring."""
    seconds = human_range((estimate.hidden, estimate.exposed), lambda s: f"{s:#.3g}")
    return (f"{_at_least(estimate)}{seconds} s per step, "
            f"MFU {human_range(estimate.mfu, lambda share: f'{share:.1%}')}, "
            f"{estimate.memory['peak'] / GIB:.1f} of {estimate.limit / GIB:.2f} GiB per device")


def _at_least(estimate: Estimate) -> str:
    """The words before times and FLOPs of which a part is not counted."""
    return "at least " if estimate.unknown else ""


def _memory(estimate: Estimate) -> list[str]:
    memory, limit = estimate.memory, estimate.limit
    rows = {
        "trained parameters" if memory["frozen"] else "parameters": memory["parameters"],
        "frozen parameters": memory["frozen"],
        "teacher": memory["teacher"],
        "optimizer state": memory["optimizer"],
        "average of weights": memory["average"],
        "batch": memory["batch"],
        "padding": memory["padding"],
        "activations, gradients, temporaries": memory["temporaries"],
        "other outputs, code": memory["outputs"] + memory["code"],
    }
    unit, scale = size_unit(memory["peak"])
    share = f"  of {limit / GIB:.2f} GiB ({memory['peak'] / limit:.0%})" if limit else ""
    return [f"{'memory per device':36}{unit:>10}",
            *(f"  {name:34}{size / scale:10.3f}" for name, size in rows.items() if size),
            f"  {'peak':34}{memory['peak'] / scale:10.3f}{share}"]


def _compute(estimate: Estimate) -> list[str]:
    unit, scale = ("TFLOP", 1e12) if estimate.flops >= 1e12 else ("GFLOP", 1e9)
    more = estimate.flops / estimate.model_flops - 1
    return [f"{'matmuls per device and step':36}{unit:>10}",
            f"  {'model (6 per weight, causal keys)':34}{estimate.model_flops / scale:10.3f}",
            f"  {'compiled':34}{estimate.flops / scale:10.3f}  {_at_least(estimate)}{more:+.0%}",
            f"  {'of which computed again (remat)':34}{estimate.recomputed / scale:10.3f}"]


def _communication(estimate: Estimate) -> list[str]:
    rows = [row for row in estimate.collectives if row.bytes >= 2**20]
    size, of_size = size_unit(max((row.bytes for row in rows), default=0))
    time, of_time = time_unit(max((row.seconds for row in rows), default=0))
    lines = [f"{'collectives per device and step':36}{'count':>10}{f'{size} sent':>12}"
             f"{f'{time} at bandwidth':>17}"]
    for row in rows:
        way = "asynchronous" if row.asynchronous else "synchronous"
        lines.append(f"  {f'{row.kind}, {row.link}, {way}':34}{row.count:10,}"
                     f"{row.bytes / of_size:12.3f}{row.seconds / of_time:17.4f}")
    return lines if rows else [*lines, "  none of a MiB or more"]


def _between_slices(recipe: Recipe, facts: StepFacts) -> list[str]:
    if num_slices(facts) == 1 or "data" not in recipe.mesh.rules.get("embed", ()):
        return []
    return ["  weights are gathered over dcn, as config.mesh.rules.embed holds data, which spans "
            "slices; leave it out"]


def _time(recipe: Recipe, estimate: Estimate, tokens: float) -> list[str]:
    seconds, rates, mfu = estimate.seconds, estimate.tokens_per_second, estimate.mfu
    unit, scale = time_unit(estimate.exposed)
    lines = [f"{'time of a step':36}{unit:>10}   from {estimate.basis}"]
    lines += [f"  {name:34}{seconds[kind] / scale:10.4f}"
              for kind, name in WORK.items() if seconds[kind]]
    if estimate.limit:
        ends = human_range((estimate.hidden, estimate.exposed), lambda s: f"{s / scale:.4g}")
        whole = (f"{_at_least(estimate) + ends:>10}"
                 "   communication and other compute hidden .. exposed")
    else:
        whole = f"at least {estimate.hidden / scale:.4g} {unit} ({LEAST})"
    per_day = 86400 * estimate.devices * rates[0], 86400 * estimate.devices * rates[1]
    lines += [f"  {'whole step':34}{whole}",
              f"  tokens/s per device {human_range(rates, lambda n: f'{n:,.0f}')}, "
              f"{'MFU' if estimate.limit else 'share of the matmul rate'} "
              f"{human_range(mfu, lambda share: f'{share:.1%}')}, "
              f"tokens per day {human_range(per_day, lambda n: f'{n:.3g}')}"]
    for name, count in (("this recipe", recipe.train.steps * estimate.tokens),
                        ("--tokens", tokens)):
        if count:
            days = estimate.days(count)
            hours = 24 * estimate.chips * days[0], 24 * estimate.chips * days[1]
            lines.append(f"  {name}: {count:.3g} tokens, "
                         f"{human_range(days, lambda d: f'{d:,.3g}')} days, "
                         f"{human_range(hours, lambda h: f'{h:,.3g}')} chip-hours")
    if estimate.limit:
        lines.append("  a compiler's estimate, not a measurement; docs/planning.md lists what it "
                     "leaves out")
    else:
        lines.append("  a lower bound: only matmuls are counted")
    if estimate.unknown:
        lines.append("  a lower bound, for these are not counted: " + ", ".join(estimate.unknown))
    return lines
