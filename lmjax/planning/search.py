"""`lmjax plan --search`: the best mesh, remat policy, batch size and microbatches on a topology.

The analytic model ranks every combination. The best few are compiled, and the compiler's figures
rank those anew.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmjax.errors import UserError
from lmjax.monitoring.units import human_bytes, human_range
from lmjax.nn.stack import REMAT, REMAT_NAMES
from lmjax.planning.analytic import EVERYTHING, Guess, guess, splits
from lmjax.planning.compile import Log, compiled
from lmjax.planning.estimate import Estimate, estimate_step
from lmjax.runtime.chips import CHIPS, GIB, Chip, Topology, parse_topology
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.recipe import Recipe

COMPILED = 4  # stop after this many compiled candidates fit; compile at most twice as many
ALIKE = 2  # of one mesh and remat policy, at most, so that others get their turn
BATCHES = (0.5, 1, 2)  # times the recipe's own batch size
MICROBATCHES = (1, 2, 4, 8)
POLICIES = (*REMAT, "+".join(REMAT_NAMES[:4]), EVERYTHING)  # of remat, besides the recipe's own


class Candidate(NamedTuple):
    """A changed recipe, the command line's overrides that change it, and its guess."""

    recipe: Recipe
    overrides: tuple[str, ...]
    guess: Guess


def search(recipe: Recipe, topology: Topology, *,
           log: Log) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate with the most tokens per second, communication exposed.

    A candidate that the compiler refuses is left out, like one that does not fit.

    Returns:
      The candidate, and one row of figures for every candidate that was compiled.

    Raises:
      UserError: nothing fits, and the message says what would; or nothing compiles.
    """
    everything = list(candidates(recipe, topology))
    fitting = [c for c in everything if c.guess.memory < topology.chip.hbm]
    log(f"search: {len(everything)} combinations, {len(fitting)} fit by the analytic model; "
        "compiling the best")
    found: list[tuple[Candidate, Estimate]] = []
    rows: list[dict[str, Any]] = []
    refused: list[UserError] = []
    for candidate in shortlist(fitting)[:2 * COMPILED]:
        overrides = " ".join(candidate.overrides)
        row: dict[str, Any] = {"overrides": list(candidate.overrides),
                               "guess": candidate.guess._asdict()}
        rows.append(row)
        try:
            facts, text = compiled(candidate.recipe, topology, log)
        except UserError as error:
            refused.append(error)
            row["error"] = str(error)
            log(f"  left out: {error}: {overrides}")
            continue
        estimate = estimate_step(facts, text) if text else None
        if estimate is None or not estimate.fits:
            row["needs_bytes"] = estimate.memory["peak"] if estimate else facts["needs"]
            log(f"  needs {human_bytes(row['needs_bytes'])}: {overrides}")
            continue
        found.append((candidate, estimate))
        row |= {"peak_bytes": estimate.memory["peak"], "hidden": estimate.hidden,
                "exposed": estimate.exposed, "mfu": list(estimate.mfu),
                "tokens_per_second_per_device": list(estimate.tokens_per_second)}
        log(_as_line(row))
        if len(found) == COMPILED:
            break
    if refused and len(refused) == len(rows):
        raise refused[0]
    if not found:
        raise UserError(f"a combination that fits into the {topology.chip.hbm / GIB:.1f} GiB of a "
                        f"chip of {topology}", f"none of {len(everything)}", what_would_fit(recipe),
                        where="--search")
    best, _ = max(found, key=lambda pair: pair[1].tokens_per_second[0])
    return best, rows


def _as_line(row: dict[str, Any]) -> str:
    """The line for a row of `search` whose candidate fits."""
    rates = human_range(row["tokens_per_second_per_device"], lambda n: f"{n:,.0f}")
    mfu = human_range(row["mfu"], lambda share: f"{share:.1%}")
    return (f"  {human_bytes(row['peak_bytes']):>9}, {rates} tokens/s per device, MFU {mfu}: "
            f"{' '.join(row['overrides'])}")


def ranked(rows: list[dict[str, Any]]) -> list[str]:
    """One line per row of `search` whose candidate fits, the most tokens per second first."""
    fitting = [row for row in rows if "peak_bytes" in row]
    fitting.sort(key=lambda row: -row["tokens_per_second_per_device"][0])
    return [_as_line(row) for row in fitting]


def same_tokens(old: Recipe, new: Recipe) -> list[str]:
    """A line with the new number of steps, if the batch size has changed."""
    if old.train.batch_size == new.train.batch_size:
        return []
    return [f"  batch {old.train.batch_size} -> {new.train.batch_size}: {new.train.steps} steps "
            "for the same tokens"]


def shortlist(fitting: list[Candidate]) -> list[Candidate]:
    """The fastest first, with few microbatches among equals, and `ALIKE` per mesh and remat."""
    chosen: list[Candidate] = []
    alike: Counter[tuple[tuple[str, ...], str]] = Counter()
    for c in sorted(fitting, key=lambda c: (c.guess.seconds_per_token,
                                            c.recipe.train.microbatches)):
        kind = (c.overrides[:4], c.recipe.model.remat)
        alike[kind] += 1
        if alike[kind] <= ALIKE:
            chosen.append(c)
    return chosen


def candidates(recipe: Recipe, topology: Topology) -> Iterator[Candidate]:
    """Every combination whose sizes divide evenly."""
    c, train, devices = recipe.model, recipe.train, topology.devices
    sizes = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    per_slice = devices // topology.slices
    batches = list(_batches(recipe))
    policies = tuple(dict.fromkeys((c.remat, *POLICIES)))
    expert, stages = max(recipe.mesh.expert, 1), max(recipe.mesh.stage, 1)
    for tensor, context, replicas in itertools.product(sizes, sizes, sizes):
        ways = tensor * context * replicas * expert * stages
        fsdp = per_slice // ways
        if (per_slice % ways or recipe.data.seq_len % context or not splits(c, tensor, stages)
                or c.embed_dim % (fsdp * expert)):
            continue
        data = replicas * topology.slices
        rows = data * fsdp * expert  # the ways that a batch is split
        mesh = dataclasses.replace(recipe.mesh, data=data, fsdp=fsdp, context=context,
                                   tensor=tensor)
        for remat, (batch, steps), micro in itertools.product(policies, batches, MICROBATCHES):
            if batch % (micro * rows):
                continue
            changed = dataclasses.replace(
                recipe, mesh=mesh, model=dataclasses.replace(c, remat=remat),
                train=dataclasses.replace(train, batch_size=batch, steps=steps,
                                          microbatches=micro),
                eval=dataclasses.replace(recipe.eval, batch_size=rows))
            other = (f"--config.train.steps={steps}",) if batch != train.batch_size else ()
            yield Candidate(changed, _overrides(changed) + other, guess(changed, topology))


def _batches(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Batch sizes, each with the steps for the same tokens, unless these are too few to warm up."""
    train = recipe.train
    for times in BATCHES:
        batch, steps = int(train.batch_size * times), max(round(train.steps / times), 1)
        if batch != train.batch_size * times:
            continue
        try:
            make_schedule(recipe.optimizer, steps)
        except UserError:
            if times != 1:  # the recipe's own batch stays: compiling it tells the user
                continue
        yield batch, steps


def _overrides(recipe: Recipe) -> tuple[str, ...]:
    """The overrides that make a candidate's recipe from the user's."""
    mesh, train = recipe.mesh, recipe.train
    values = {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp, "mesh.context": mesh.context,
              "mesh.tensor": mesh.tensor, "model.remat": recipe.model.remat,
              "train.batch_size": train.batch_size, "train.microbatches": train.microbatches,
              "eval.batch_size": recipe.eval.batch_size}
    return tuple(f"--config.{key}={value}" for key, value in values.items())


def what_would_fit(recipe: Recipe) -> str:
    """The fewest chips of each generation that hold the state, with remat=full and few rows.

    As few rows as the mesh allows: one per `mesh.tensor` devices.
    """
    found: dict[Chip, str] = {}
    for where, tensor in itertools.product(_topologies(), (1, 2, 4, 8)):
        per_slice = where.devices // where.slices
        fsdp = per_slice // tensor
        if (where.chip in found or not fsdp or recipe.model.embed_dim % fsdp
                or not splits(recipe.model, tensor)):
            continue
        shrunk = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, remat="full"),
            mesh=dataclasses.replace(recipe.mesh, data=where.slices, stage=1, fsdp=fsdp, expert=1,
                                     context=1, tensor=tensor),
            train=dataclasses.replace(recipe.train, batch_size=where.slices * fsdp,
                                      microbatches=1))
        if guess(shrunk, where).memory < where.chip.hbm:
            slices = f"{where.slices} slices of " if where.slices > 1 else ""
            split = f" with mesh.tensor={tensor}" if tensor > 1 else ""
            chips = per_slice // where.chip.devices
            found[where.chip] = f"{slices}{chips} {where.chip.name}{split}"
    if not found:
        return "lower data.seq_len or model.embed_dim, or add mesh.context"
    return (f"by the analytic model {', '.join(found.values())} would do, with model.remat=full "
            "and as many rows as devices divided by mesh.tensor")


def _topologies() -> Iterator[Topology]:
    """By generation: one slice of each power of two of chips, then 2 to 8 of the largest slice."""
    for chip in CHIPS.values():
        for bits in itertools.count():
            try:
                largest = parse_topology(f"{chip.name}-{2**bits * chip.cores}")
            except UserError:
                break
            yield largest
        yield from (dataclasses.replace(largest, slices=n) for n in (2, 4, 8))
