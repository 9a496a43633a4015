"""`lmjax plan`: what a run needs on a TPU topology, from its compiled step, without TPUs."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

from lmjax.config import plain
from lmjax.errors import UserError
from lmjax.monitoring.progress import to_stderr
from lmjax.planning.compile import Log, compiled
from lmjax.planning.estimate import Estimate, estimate_step
from lmjax.planning.kernels import StepFacts
from lmjax.planning.measure import topology_of
from lmjax.planning.plots import draw
from lmjax.planning.search import ranked, same_tokens, search
from lmjax.planning.table import table
from lmjax.runtime.chips import GIB, Topology, parse_topology
from lmjax.runtime.files import check_writable
from lmjax.training.recipe import Recipe


def plan(recipe: Recipe, topology: str, *, out: str = "", tokens: float = 0.0, find: bool = False,
         log: Log = to_stderr) -> dict[str, Any]:
    """Compiles the step of `recipe` for a topology, prints a table and returns its figures.

    Args:
      topology: a name that `chips.parse_topology` reads, or a platform (cpu, gpu), which means the
        devices at hand.
      out: a directory for plan.json, plan.svg and step.hlo.gz; "" writes none.
      tokens: a number of tokens to compute the training time for, besides the recipe's own.
      find: search for the best mesh, remat policy and batch size first.

    Raises:
      UserError: an unknown topology, negative `tokens`, an `out` that cannot be written, a mesh
        that does not fit the topology, a step that does not fit into a chip's memory, or no TPU
        compiler.
    """
    where, searched = topology_of(topology), None
    if not 0 <= tokens < math.inf:
        raise UserError("0 or more", f"{tokens:g}", "name a budget such as 2e12", where="--tokens")
    if out:
        check_writable(out, "--out")
    if find:
        if not isinstance(where, Topology):
            raise UserError("a TPU topology to search on", topology, "name one", where="--search")
        best, searched = search(recipe, where, log=log)
        print(*ranked(searched), f"the best of {len(searched)} compiled:",
              f"  {' '.join(best.overrides)}", *same_tokens(recipe, best.recipe), "", sep="\n")
        recipe = best.recipe
    facts, text = compiled(recipe, where, log)
    if not text:
        raise does_not_fit(facts)
    estimate = estimate_step(facts, text)
    report = as_json(recipe, facts, estimate, tokens)
    if searched:
        report["search"] = searched
    print(table(recipe, facts, estimate, tokens))
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "plan.svg").write_text(draw(estimate))
        (folder / "step.hlo.gz").write_bytes(gzip.compress(text.encode(), 5))
        log(f"written: {folder}/plan.json, plan.svg, step.hlo.gz")
    return report


def does_not_fit(facts: StepFacts) -> UserError:
    """The error for a step that needs more memory than a chip has."""
    limit = parse_topology(facts["topology"]).chip.hbm
    return UserError(
        f"a step within the {limit / GIB:.1f} GiB of a chip",
        f"one that needs at least {facts['needs'] / GIB:.1f} GiB",
        "raise train.microbatches, use model.remat=full or more fsdp, or let --search find what "
        "fits", where=f"--topology {facts['topology']}")


def as_json(recipe: Recipe, facts: StepFacts, estimate: Estimate, tokens: float) -> dict[str, Any]:
    """The content of plan.json: all figures of the table, in SI units."""
    budgets = {}
    for name, count in (("recipe", recipe.train.steps * estimate.tokens), ("budget", tokens)):
        if count:
            days = estimate.days(count)
            budgets[name] = {"tokens": count, "days": days,
                             "chip_hours": [24 * d * estimate.chips for d in days]}
    rates = estimate.tokens_per_second
    return dataclasses.asdict(estimate) | {
        "fits": estimate.fits, "parameters": facts["parameters"],
        "attention_kernel": facts["attention"], "device_kind": facts["device_kind"],
        "compute_dtype": facts["compute_dtype"],
        "step_seconds": {"hidden": estimate.hidden, "exposed": estimate.exposed},
        "mfu": dict(zip(("exposed", "hidden"), estimate.mfu, strict=True)),
        "tokens_per_second_per_device": dict(zip(("exposed", "hidden"), rates, strict=True)),
        "compile_seconds": facts["seconds"], "host_bytes": facts["host_bytes"],
        "budgets": budgets, "versions": facts["versions"], "config": plain(recipe)}
