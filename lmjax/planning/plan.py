"""`lmjax plan`: what a run would need and take on a topology, from compiling its real step, without hardware."""

import dataclasses
import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any

from lmjax.config import plain
from lmjax.monitoring.units import human_count
from lmjax.planning.compile import HERE, Log, Result, compiled
from lmjax.planning.estimate import (
    LEAST,
    Estimate,
    estimate,
    num_slices,
    size_unit,
    span,
    time_unit,
)
from lmjax.planning.plots import draw
from lmjax.planning.search import ranked, same_tokens, search
from lmjax.runtime.chips import GIB, Topology, parse_topology
from lmjax.training.recipe import Recipe


def plan(recipe: Recipe, topology: str, *, out: str = "", tokens: float = 0.0, find: bool = False,
         log: Log = lambda line: print(line, file=sys.stderr, flush=True)) -> dict[str, Any]:
    """Compiles the step of `recipe` for `topology` (see `chips.parse_topology`, or cpu, gpu: the devices here).

    Prints a table and returns its figures. out: a directory for plan.json, plan.svg and step.hlo.gz. tokens: a
    budget to reckon days for, besides the recipe's own. find: search for the best mesh, remat and batch first.

    Raises:
      ValueError: an unknown topology, a budget below 0, an `out` that is a file, a mesh that does not fit the
        topology, a step that does not fit into a chip's memory, or no TPU compiler installed.
    """
    where, found = named(topology), None
    if not 0 <= tokens < math.inf:
        raise ValueError(f"--tokens: expected 0 or more, got {tokens:g}; name a budget such as 2e12")
    if out:
        _make_folder(out)
    if find:
        if not isinstance(where, Topology):
            raise ValueError(f"--search: expected a TPU topology to search on, got {topology}; name one")
        best, found = search(recipe, where, log=log)
        print(*ranked(found), f"the best of {len(found)} compiled:", f"  {' '.join(best.overrides)}",
              *same_tokens(recipe, best.recipe), "", sep="\n")
        recipe = best.recipe
    result, text = compiled(recipe, where, log)
    if not text:
        raise ValueError(does_not_fit(result))
    made = estimate(result, text)
    report = as_json(recipe, result, made, tokens) | ({"search": found} if find else {})
    print(table(recipe, result, made, tokens))
    if out:
        folder = Path(out)
        (folder / "plan.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "plan.svg").write_text(draw(made))
        (folder / "step.hlo.gz").write_bytes(gzip.compress(text.encode(), 5))
        log(f"written: {folder}/plan.json, plan.svg, step.hlo.gz")
    return report


def _make_folder(out: str) -> None:
    """Before the compilation, which may take minutes."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = "a file" if Path(out).is_file() else (error.strerror or "an error").lower()
        raise ValueError(f"--out: expected a directory, got {got}: {out}; name another") from None


def named(topology: str) -> Topology | str:
    """A platform's name for the devices at hand, or else the TPU topology."""
    return topology if topology in HERE else parse_topology(topology)


def does_not_fit(result: Result) -> str:
    """What to say of a step that needs more memory than a chip has."""
    limit = parse_topology(result["topology"]).chip.hbm
    return (f"--topology {result['topology']}: expected a step within the {limit / GIB:.1f} GiB of a chip, got one "
            f"that needs at least {result['needs'] / GIB:.1f} GiB; raise train.microbatches, use model.remat=full or "
            "more fsdp, or let --search find what fits")


def as_json(recipe: Recipe, result: Result, made: Estimate, tokens: float) -> dict[str, Any]:
    """All figures of the table, in SI units; pairs are (communication exposed, hidden) as named."""
    own = recipe.train.steps * made.tokens
    budgets = {name: {"tokens": n, "days": made.days(n), "chip_hours": [24 * d * made.chips for d in made.days(n)]}
               for name, n in (("recipe", own), ("budget", tokens)) if n}
    return dataclasses.asdict(made) | {
        "fits": made.fits, "parameters": result["parameters"], "attention_kernel": result["attention"],
        "device_kind": result["device_kind"], "compute_dtype": result["compute_dtype"],
        "step_seconds": {"hidden": made.hidden, "exposed": made.exposed},
        "mfu": dict(zip(("exposed", "hidden"), made.mfu, strict=True)),
        "tokens_per_second_per_chip": dict(zip(("exposed", "hidden"), made.tokens_per_second, strict=True)),
        "compile_seconds": result["seconds"], "host_bytes": result["host_bytes"], "budgets": budgets,
        "versions": result["versions"], "config": plain(recipe)}


def table(recipe: Recipe, result: Result, made: Estimate, tokens: float) -> str:
    """The figures as text."""
    shape = ", ".join(f"{axis}={n}" for axis, n in made.mesh.items() if n > 1) or "one device"
    used = ("jax", "libtpu") if made.limit else ("jax",)
    lines = [
        f"{made.topology}: {made.chips} x {result['device_kind']}; mesh {shape}; {result['compute_dtype']}; "
        + ", ".join(f"{name} {result['versions'][name]}" for name in used if name in result["versions"]),
        f"model: {human_count(result['parameters'])} parameters; {human_count(made.tokens)} tokens a step, "
        f"{made.tokens // made.chips:,} a chip; attention {result['attention']['kernel']} "
        f"({result['attention']['reason'].partition(';')[0]})",
        "", *_memory(made), "", *_compute(made), "", *_communication(made), *_between_slices(recipe, result), "",
        *_time(recipe, made, tokens), "",
        f"compiled in {result['seconds']['trace'] + result['seconds']['compile']:.0f} s with "
        f"{result['host_bytes'] / GIB:.1f} GiB of host memory"]
    return "\n".join([*lines, in_short(made)] if made.limit else lines)


def in_short(made: Estimate) -> str:
    """The line that recipes for pods record."""
    return (f"{at_least(made)}{span((made.hidden, made.exposed), lambda s: f'{s:#.3g}')} s a step, "
            f"MFU {span(made.mfu, lambda share: f'{share:.1%}')}, "
            f"{made.memory['peak'] / GIB:.1f} of {made.limit / GIB:.2f} GiB a chip")


def at_least(made: Estimate) -> str:
    """What to put before times and FLOPs of which something is not counted."""
    return "at least " if made.unknown else ""


def _memory(made: Estimate) -> list[str]:
    m = made.memory
    rows = {"parameters": m["parameters"], "optimizer state": m["optimizer"], "average of weights": m["average"],
            "batch": m["batch"], "padding": m["padding"],
            "activations, gradients, temporaries": m["temporaries"], "other outputs, code": m["outputs"] + m["code"]}
    share = f"  of {made.limit / GIB:.2f} GiB ({m['peak'] / made.limit:.0%})" if made.limit else ""
    unit, scale = size_unit(m["peak"])
    lines = [f"{'memory per device':36}{unit:>10}"]
    lines += [f"  {name:34}{n / scale:10.3f}" for name, n in rows.items() if n]
    return [*lines, f"  {'peak':34}{m['peak'] / scale:10.3f}{share}"]


def _compute(made: Estimate) -> list[str]:
    unit, scale = ("TFLOP", 1e12) if made.flops >= 1e12 else ("GFLOP", 1e9)
    more = made.flops / made.model_flops - 1
    return [f"{'matmuls per device and step':36}{unit:>10}",
            f"  {'model (6 per weight, causal keys)':34}{made.model_flops / scale:10.3f}",
            f"  {'compiled':34}{made.flops / scale:10.3f}  {at_least(made)}{more:+.0%}",
            f"  {'of which computed again (remat)':34}{made.recomputed / scale:10.3f}"]


def _communication(made: Estimate) -> list[str]:
    rows = [row for row in made.collectives if row.bytes >= 2**20]
    size, of_size = size_unit(max((row.bytes for row in rows), default=0))
    time, of_time = time_unit(max((row.seconds for row in rows), default=0))
    lines = [f"{'collectives per device and step':36}{'count':>10}{f'{size} sent':>12}{f'{time} at bandwidth':>17}"]
    for row in rows:
        name = f"{row.kind}, {row.link}, {'asynchronous' if row.asynchronous else 'synchronous'}"
        lines.append(f"  {name:34}{row.count:10,}{row.bytes / of_size:12.3f}{row.seconds / of_time:17.4f}")
    return lines if len(lines) > 1 else [*lines, "  none of a MiB or more"]


def _between_slices(recipe: Recipe, result: Result) -> list[str]:
    if num_slices(result) == 1 or "data" not in recipe.mesh.rules.get("embed", ()):
        return []
    return ["  weights are gathered over dcn, as config.mesh.rules.embed holds data, which spans slices; leave it out"]


def _time(recipe: Recipe, made: Estimate, tokens: float) -> list[str]:
    names = {"matmul": "matmuls", "attention": "attention kernels, at 50% of peak",
             "grouped": "grouped matmuls, at 70% of peak", "other": "other compute",
             "exposed": "synchronous collectives"}
    unit, scale = time_unit(made.exposed)
    lines = [f"{'time of a step':36}{unit:>10}   from {made.basis}"]
    lines += [f"  {text:34}{made.seconds[kind] / scale:10.4f}" for kind, text in names.items() if made.seconds[kind]]
    if made.limit:
        whole = (f"{at_least(made) + span((made.hidden, made.exposed), lambda s: f'{s / scale:.4g}'):>10}"
                 "   communication and other compute hidden .. exposed")
    else:
        whole = f"at least {made.hidden / scale:.4g} {unit} ({LEAST})"
    share = "MFU" if made.limit else "share of the matmul rate"
    lines += [f"  {'whole step':34}{whole}",
              f"  tokens/s a device {span(made.tokens_per_second, lambda n: f'{n:,.0f}')}, {share} "
              f"{span(made.mfu, lambda share: f'{share:.1%}')}, tokens a day "
              f"{span(tuple(86400 * made.chips * n for n in made.tokens_per_second), lambda n: f'{n:.3g}')}"]
    for name, n in (("this recipe", recipe.train.steps * made.tokens), ("--tokens", tokens)):
        if n:
            lines.append(f"  {name}: {n:.3g} tokens, {span(made.days(n), lambda d: f'{d:,.3g}')} days, "
                         f"{span(tuple(24 * made.chips * d for d in made.days(n)), lambda h: f'{h:,.3g}')} chip-hours")
    if made.limit:
        lines.append("  a compiler's estimate, not a measurement: it leaves out what docs/planning.md lists")
    else:
        lines.append("  a lower bound: only matmuls are counted")
    if made.unknown:
        lines.append(f"  a lower bound, for these are not counted: {', '.join(made.unknown)}")
    return lines
