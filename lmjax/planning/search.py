"""`lmjax plan --search`: which mesh, remat policy, batch size and microbatches are best on a topology.

An analytic model of memory and time ranks every combination in milliseconds; the best few are compiled and ranked
anew by what the compiler says. The model need only be right enough not to lose the winner.
"""

import dataclasses
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmjax.models.flops import flops_per_token
from lmjax.models.model import ModelConfig, build_model
from lmjax.nn.layers import MLP_KINDS
from lmjax.nn.stack import REMAT, REMAT_NAMES, kept_names
from lmjax.planning.compile import Log, compiled
from lmjax.planning.estimate import Estimate, estimate, readable, span
from lmjax.runtime.chips import CHIPS, GIB, Topology, parse_topology
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.recipe import Recipe
from lmjax.tree import num_elements

COMPILED = 4  # how many of the best to compile; as many again may turn out not to fit
ALIKE = 2  # of one mesh and remat policy, so that others get their turn
BATCHES = (0.5, 1, 2)  # times the recipe's own
MICROBATCHES = (1, 2, 4, 8)
MATMUL_SHARE = 0.75  # of peak, for a large matmul
# Of the matmuls' time: norms, activations, the optimizer; with "none" also what is written to be kept.
OVERHEAD = {False: 0.1, True: 0.35}
EVERYTHING, MATMULS = "+".join(REMAT_NAMES), "+".join(name for name in REMAT_NAMES if name != "kernel")
POLICIES = (*REMAT, "+".join(REMAT_NAMES[:4]), EVERYTHING)  # and the recipe's own


class Guess(NamedTuple):
    """What the analytic model says of a recipe: bytes a chip, and seconds a token on each chip."""

    memory: float
    seconds_per_token: float


class Candidate(NamedTuple):
    """A changed recipe, the overrides that change it, and its guess."""

    recipe: Recipe
    overrides: tuple[str, ...]
    guess: Guess


def search(recipe: Recipe, topology: Topology, *, log: Log = lambda line: print(line, file=sys.stderr, flush=True)
           ) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate with the most tokens a second (communication exposed), and a row for every one compiled.

    One that the compiler refuses is left out, as one that does not fit.

    Raises:
      ValueError: nothing fits; the message says what would. Or nothing compiles.
    """
    everything = list(candidates(recipe, topology))
    fitting = [c for c in everything if c.guess.memory < topology.chip.hbm]
    log(f"search: {len(everything)} combinations, {len(fitting)} fit by the analytic model; compiling the best")
    rows: list[tuple[Candidate, Estimate]] = []
    report: list[dict[str, Any]] = []
    refused: list[ValueError] = []
    for candidate in shortlist(fitting)[:2 * COMPILED]:
        row: dict[str, Any] = {"overrides": list(candidate.overrides), "guess": candidate.guess._asdict()}
        report.append(row)
        try:
            result, text = compiled(candidate.recipe, topology, log)
        except ValueError as error:
            refused.append(error)
            row["error"] = str(error)
            log(f"  left out: {error}: {' '.join(candidate.overrides)}")
            continue
        made = estimate(result, text) if text else None
        if made is None or not made.fits:
            row["needs_bytes"] = result.get("needs") or made.memory["peak"]
            log(f"  needs {readable(row['needs_bytes'])}: {' '.join(candidate.overrides)}")
        else:
            rows.append((candidate, made))
            row |= {"peak_bytes": made.memory["peak"], "hidden": made.hidden, "exposed": made.exposed,
                    "mfu": list(made.mfu), "tokens_per_second_per_chip": list(made.tokens_per_second)}
            log(as_line(row))
        if len(rows) == COMPILED:
            break
    if refused and len(refused) == len(report):
        raise refused[0]
    if not rows:
        raise ValueError(f"--search: expected a combination that fits into the {topology.chip.hbm / GIB:.1f} GiB of a "
                         f"chip of {topology}, got none of {len(everything)}; {what_would(recipe)}")
    best = max(rows, key=lambda row: row[1].tokens_per_second[0])
    return best[0], report


def as_line(row: dict[str, Any]) -> str:
    """A row of what `search` gives, of a candidate that fits."""
    return (f"  {readable(row['peak_bytes']):>9}, {span(row['tokens_per_second_per_chip'], lambda n: f'{n:,.0f}')} "
            f"tokens/s a chip, MFU {span(row['mfu'], lambda m: f'{m:.1%}')}: {' '.join(row['overrides'])}")


def ranked(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each that fits, most tokens a second first."""
    fitting = [row for row in rows if "peak_bytes" in row]
    return [as_line(row) for row in sorted(fitting, key=lambda row: -row["tokens_per_second_per_chip"][0])]


def same_tokens(old: Recipe, new: Recipe) -> list[str]:
    """A line that says so where another batch takes other steps."""
    if old.train.batch_size == new.train.batch_size:
        return []
    return [f"  batch {old.train.batch_size} -> {new.train.batch_size}: {new.train.steps} steps for the same tokens"]


def shortlist(fitting: list[Candidate]) -> list[Candidate]:
    """The fastest first, fewest microbatches among equals, and no more than `ALIKE` of one mesh and remat policy."""
    chosen: list[Candidate] = []
    alike: Counter[tuple[tuple[str, ...], str]] = Counter()
    for c in sorted(fitting, key=lambda c: (c.guess.seconds_per_token, c.recipe.train.microbatches)):
        kind = (c.overrides[:4], c.recipe.model.remat)
        alike[kind] += 1
        if alike[kind] <= ALIKE:
            chosen.append(c)
    return chosen


def candidates(recipe: Recipe, topology: Topology) -> Iterator[Candidate]:
    """Every combination that divides evenly."""
    c, chips = recipe.model, topology.chips
    sizes = [2**i for i in range(chips.bit_length()) if chips % 2**i == 0]
    per_slice = chips // topology.slices
    batches = list(_batches(recipe))
    expert, stage = max(recipe.mesh.expert, 1), max(recipe.mesh.stage, 1)
    as_asked = expert * stage
    for tensor, context, replicas in itertools.product(sizes, sizes, sizes):
        data = replicas * topology.slices
        if per_slice % (tensor * context * replicas * as_asked) or recipe.data.seq_len % context:
            continue
        if not splits(c, tensor, stage):
            continue
        fsdp = per_slice // (tensor * context * replicas * as_asked)
        if c.embed_dim % (fsdp * expert):
            continue
        mesh = dataclasses.replace(recipe.mesh, data=data, fsdp=fsdp, context=context, tensor=tensor)
        for remat, (batch, steps), micro in itertools.product(dict.fromkeys((c.remat, *POLICIES)), batches,
                                                              MICROBATCHES):
            if batch % (micro * data * fsdp * expert):
                continue
            changed = dataclasses.replace(
                recipe, mesh=mesh, model=dataclasses.replace(c, remat=remat),
                train=dataclasses.replace(recipe.train, batch_size=batch, steps=steps, microbatches=micro),
                eval=dataclasses.replace(recipe.eval, batch_size=data * fsdp * expert))
            shorter = (f"--config.train.steps={steps}",) if batch != recipe.train.batch_size else ()
            yield Candidate(changed, _overrides(changed) + shorter, guess(changed, topology))


def _batches(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Batches and the steps that take as many tokens with them, where the schedule can be so long."""
    train = recipe.train
    for times in BATCHES:
        batch, steps = int(train.batch_size * times), max(round(train.steps / times), 1)
        if batch != train.batch_size * times:
            continue
        try:
            make_schedule(recipe.optimizer, steps)
        except ValueError:  # warm-up does not fit
            if times != 1:  # the recipe's own is refused when it is compiled
                continue
        yield batch, steps


def guess(recipe: Recipe, topology: Topology) -> Guess:
    """Memory and time of a recipe whose mesh is spelt out.

    Memory: float32 parameters, gradients and two moments, split over fsdp and tensor; the parameters once more in
    bfloat16; what remat keeps of each layer; the logits in float32 and their gradient in bfloat16; and two layers'
    gathered weights. Time: matmuls at `MATMUL_SHARE` of peak, beside which the weights travel (gathered for each pass,
    gradients scattered) and behind which the activations' collectives of `tensor` and `context` wait.
    """
    c, chip, mesh, train = recipe.model, topology.chip, recipe.mesh, recipe.train
    total, active, layer = weights(dataclasses.replace(c, remat="none"), recipe.data.tokenizer.vocab_size)
    stages, expert = max(mesh.stage, 1), max(mesh.expert, 1)
    batch_ways = mesh.data * mesh.fsdp * expert
    split = stages * mesh.tensor * (batch_ways if "data" in mesh.rules.get("embed", ()) else mesh.fsdp * expert)
    rows = train.batch_size // train.microbatches / batch_ways
    tokens = rows * recipe.data.seq_len / mesh.context  # of a microbatch on a chip
    kept, again, kernel_again = kept_and_again(c, layer, mesh.tensor)
    kept *= c.num_layers
    kept *= train.microbatches / stages if stages > 1 else 1  # all that are on their way through the stages
    logits = 6.0 * (c.vocab_size or recipe.data.tokenizer.vocab_size) / mesh.tensor
    loss_tokens = min(1.0, (train.loss_chunk or recipe.data.seq_len) / recipe.data.seq_len) * tokens
    memory = (16 + 2) * total / split + tokens * kept + loss_tokens * logits + 4 * 2 * layer / mesh.tensor

    attention = 2.0 * c.dims.num_heads * c.dims.head_dim * recipe.data.seq_len * c.num_layers  # causal, forward
    flops = tokens * ((6 + 2 * again) * active + (3 + kernel_again) * attention) / mesh.tensor
    compute = flops / (chip.flops * MATMUL_SHARE) * (1 + OVERHEAD[c.remat == "none"])
    passes = 2 + (again > 0.5)  # gathers of each layer's weights, bfloat16
    weights_sent = (passes + 1) * 2.0 * total / mesh.tensor * (mesh.fsdp > 1)
    within = weights_sent / chip.ici
    waits = c.num_layers * (passes + 1) * 2 * tokens * c.embed_dim * 2.0 * 2 * (mesh.tensor > 1) / chip.ici
    waits += c.num_layers * passes * 4.0 * tokens * mesh.context * c.embed_dim * (mesh.context > 1) / chip.ici
    summed = 2 * 4.0 * total / split * (mesh.data > 1) / (chip.dcn if topology.slices > 1 else chip.ici)
    seconds = (max(compute, within) + waits) * (1 + (stages - 1) / train.microbatches) / stages
    return Guess(memory, (seconds + summed) / (tokens / (mesh.tensor * stages)))


def kept_and_again(c: ModelConfig, layer: float, tensor: int) -> tuple[float, float, float]:
    """What remat keeps of a layer, bytes a token in bfloat16; what the backward pass computes again, as a share of the
    matmuls; whether it runs the attention kernel again. layer: weights that a token is multiplied by. tensor: ways that
    all of it is split, the residual stream along its sequence."""
    D, heads = c.embed_dim, c.dims.num_heads * c.dims.head_dim
    groups = (c.num_kv_heads or c.num_heads) * c.dims.head_dim
    gated = MLP_KINDS[c.mlp][1]
    mlp = max(layer - 2 * D * (heads + groups), 0.0) / (D * (3 if gated else 2))  # with experts: of those of a token
    # By what each is wide; all but "out" are computed from the residual stream. Nothing needs the last matmul's result.
    width = {"query": heads, "key": groups, "value": groups, "kernel": heads, "out": D, "gate": mlp * gated, "up": mlp}
    device, host = kept_names({"none": EVERYTHING, "dots": MATMULS}.get(c.remat, c.remat))
    kept = 2.0 * (D + sum(width[name] for name in device)) / tensor
    if c.remat == "none":
        kept = 8.0 * D / tensor + 2 * kept  # what is between the matmuls, too, and some of it in float32
    lost = set(REMAT_NAMES) - {*device, *host}
    again = D * sum(heads if name == "out" else width[name] for name in lost - {"kernel"})
    return kept, again / layer, float("kernel" in lost)


@functools.lru_cache(maxsize=8)
def weights(c: ModelConfig, vocab_size: int) -> tuple[float, float, float]:
    """Parameters; those that a token is multiplied by; and of the latter, those of one layer."""
    model = build_model(dataclasses.replace(c, attention="auto"), vocab_size=vocab_size, platform="cpu",
                        dtype="float32")
    active = flops_per_token(model, 1) / 6
    return num_elements(model.shapes), active, (active - model.config.vocab_size * c.embed_dim) / c.num_layers


def what_would(recipe: Recipe) -> str:
    """The fewest chips of each generation on which the state would fit with remat=full and one row for each
    `mesh.tensor` of them."""
    found = {}
    for where, tensor in itertools.product(_topologies(), (1, 2, 4, 8)):
        fsdp = where.chips // where.slices // tensor
        if where.chip in found or not fsdp or recipe.model.embed_dim % fsdp or not splits(recipe.model, tensor):
            continue
        shrunk = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, remat="full"),
            mesh=dataclasses.replace(recipe.mesh, data=where.slices, stage=1, fsdp=fsdp, expert=1, context=1,
                                     tensor=tensor),
            train=dataclasses.replace(recipe.train, batch_size=where.slices * fsdp, microbatches=1))
        if guess(shrunk, where).memory < where.chip.hbm:
            slices = f"{where.slices} slices of " if where.slices > 1 else ""
            found[where.chip] = (f"{slices}{where.chips // where.slices} {where.chip.name}"
                                 + (f" with mesh.tensor={tensor}" if tensor > 1 else ""))
    if not found:
        return "lower data.seq_len or model.embed_dim, or add mesh.context"
    return (f"by the analytic model {', '.join(found.values())} would do, with model.remat=full and as many rows as "
            "chips by mesh.tensor")


def _topologies() -> Iterator[Topology]:
    """One slice of each power of two of chips, then two to eight of the largest, by generation."""
    for chip in CHIPS.values():
        for bits in itertools.count():
            try:
                largest = parse_topology(f"{chip.name}-{2**bits * chip.cores}")
            except ValueError:
                break
            yield largest
        yield from (dataclasses.replace(largest, slices=n) for n in (2, 4, 8))


def splits(c: ModelConfig, tensor: int, stage: int = 1) -> bool:
    """Whether every array that `mesh.tensor` splits can be split so many ways."""
    return not any(n % tensor for n in (c.num_heads, c.num_kv_heads or c.num_heads, c.mlp_dim,
                                        (c.vocab_size or tensor * stage) // stage))


def _overrides(recipe: Recipe) -> tuple[str, ...]:
    """What makes the recipe it came from into this one."""
    keys = {"mesh.data": recipe.mesh.data, "mesh.fsdp": recipe.mesh.fsdp, "mesh.context": recipe.mesh.context,
            "mesh.tensor": recipe.mesh.tensor, "model.remat": recipe.model.remat,
            "train.batch_size": recipe.train.batch_size, "train.microbatches": recipe.train.microbatches,
            "eval.batch_size": recipe.eval.batch_size}
    return tuple(f"--config.{key}={value}" for key, value in keys.items())
