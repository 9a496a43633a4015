"""`lmjax scale coord-check`: does the size of activations depend on width or depth?

Yang and Hu 2022 (arXiv:2203.03466, appendix D.1) check an implementation of muP so: models of many
sizes take a few steps, and the root mean square (RMS) of what they compute is compared.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lmjax
from lmjax.config import load, plain
from lmjax.errors import UserError
from lmjax.models.model import Batch, Model
from lmjax.models.parametrization import attention_multiplier
from lmjax.monitoring.jsonl import Appender, read_jsonl
from lmjax.monitoring.progress import to_stderr
from lmjax.nn.module import Params
from lmjax.nn.recorded import recording
from lmjax.runtime.files import write_whole
from lmjax.scaling.sizes import Size, based_on, check_sizes, resized
from lmjax.scaling.sweep import shared_data
from lmjax.tasks.task import Task
from lmjax.training.program import make_program
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.training.task_data import open_data

PROBE = 4  # rows that all steps are observed on
FLAT = 0.2  # the largest deviation from the mean of all sizes that counts as flat
# The least ratio of the largest size to the smallest: what grows as the root of the size then
# deviates by at least 41%. Over a factor of 2 it would deviate by 19% and count as flat.
SPAN = 4
# Few steps say most at a constant rate; a step may not be skipped.
SHORT = ("optimizer.schedule=constant", "optimizer.warmup_steps=0", "watch.spikes=off",
         "sample.every=0", "train.microbatches=1")
Observed = dict[str, np.ndarray]  # by quantity: RMS [steps + 1], after so many steps
# What the verdict looks at. Logits and scores are judged by how far training has moved them: before
# it they shrink as the root of the width by design, since weights are random and multipliers 1/m.
JUDGED = ("stream, last layer", "change of stream, last layer", "change of scores",
          "change of logits")
OF_WIDTH = ("stream, first layer", "change of stream, first layer")  # other layers if depth varies


@dataclasses.dataclass(frozen=True)
class Line:
    """What models of several sizes have in common, and how much the RMS of each depends on size."""

    parametrization: str
    along: str  # width or depth
    sizes: tuple[int, ...]
    rms: dict[str, list[list[float]]]  # by quantity: [sizes, steps + 1], means over the seeds

    def deviation(self, quantity: str) -> float:
        """The largest deviation from the geometric mean of all sizes after the last step."""
        last = np.log([series[-1] for series in self.rms[quantity]])
        return float(np.expm1(np.max(np.abs(last - last.mean()))))

    @property
    def is_flat(self) -> bool:
        """Whether no judged quantity deviates by more than FLAT."""
        return all(self.deviation(quantity) <= FLAT for quantity in judged(self))


def judged(line: Line) -> tuple[str, ...]:
    """The quantities that decide whether a line is flat."""
    return (*OF_WIDTH, *JUDGED) if line.along == "width" else JUDGED


def coordinate_check(spec: str, overrides: Sequence[str], workdir: Path, *,
                     parametrizations: Sequence[str], widths: Sequence[int],
                     depths: Sequence[int], steps: int, seeds: int) -> list[Line]:
    """Trains models of several widths, and of several depths, for a few steps.

    Results are kept in WORKDIR/coordinates.jsonl, so that the check can be stopped and repeated.

    Args:
      spec: the config, FILE[:VARIANT].
      overrides: KEY=VALUE of all models.
      workdir: where prepared data and results go.
      parametrizations: those that are compared.
      widths, depths: the sizes. While one of them varies, the other is the config's; the smallest
        are the base, unless the config names one.
      steps: how many each model takes.
      seeds: models per size, over which the results are averaged.

    Raises:
      UserError: a size does not fit the heads, or the recipe has a task.
    """
    for values, where in ((widths, "--widths"), (depths, "--depths")):
        if values:
            check_sizes(values, where)
            if max(values) < SPAN * min(values):
                raise UserError(f"sizes that span at least a factor of {SPAN}, over which growth "
                                "shows", list(values), "add a larger or a smaller one",
                                where=where)
    if steps < 1 or seeds < 1 or not (widths or depths):
        raise UserError("at least 1 step, 1 seed, and --widths or --depths", f"{steps} steps, "
                        f"{seeds} seeds", "correct it", where="lmjax scale coord-check")
    own = build_recipe(load(spec, overrides))
    if isinstance(own.task, Task):
        raise UserError("a recipe that pretrains", f"one with task={own.task.name}",
                        "leave the task out", where="config.task")
    base = Size(min(widths, default=own.model.embed_dim), min(depths, default=own.model.num_layers))
    lines = [(parametrization, along, [
        Size(value, own.model.num_layers) if along == "width" else Size(own.model.embed_dim, value)
        for value in sorted(values)])
        for parametrization in parametrizations
        for along, values in (("width", widths), ("depth", depths)) if values]
    recipes = {(parametrization, size, seed): build_recipe(load(spec, [
        *overrides, *resized(own.model, size), *based_on(own.model, parametrization, base),
        f"train.steps={steps}", f"train.seed={seed}", *SHORT]))
        for parametrization, _, sizes in lines for size in sizes for seed in range(seeds)}
    workdir.mkdir(parents=True, exist_ok=True)
    directory = own.data.directory or shared_data(own, workdir)
    measured = {key: _kept(recipe, directory, workdir / "coordinates.jsonl")
                for key, recipe in recipes.items()}
    return [Line(parametrization, along, tuple(
        getattr(size, "embed_dim" if along == "width" else "num_layers") for size in sizes), {
            quantity: [np.mean([measured[parametrization, size, seed][quantity]
                                for seed in range(seeds)], axis=0).tolist() for size in sizes]
            for quantity in measured[parametrization, sizes[0], 0]})
        for parametrization, along, sizes in lines]


def _kept(recipe: Recipe, directory: str, file: Path) -> dict[str, list[float]]:
    """What `file` says of a recipe, or else what `observe` finds, which is added to it.

    The same recipe is measured again after another version of lmjax, or of the data.
    """
    train, *_ = open_data(recipe, directory)
    key = {"lmjax": lmjax.__version__, "data": train.fingerprint,
           "recipe": json.dumps(plain(recipe), sort_keys=True)}
    for found in read_jsonl(file):
        if key.items() <= found.items():
            return dict(found["rms"])
    c = recipe.model
    to_stderr(f"{c.parametrization}, width {c.embed_dim}, depth {c.num_layers}, seed "
              f"{recipe.train.seed}")
    rms = {name: [float(f"{x:.6g}") for x in series]
           for name, series in observe(recipe, train).items()}
    Appender(file).close()  # which removes a line that a kill has cut off
    with file.open("a") as out:
        out.write(json.dumps({"step": recipe.train.steps, **key, "rms": rms}) + "\n")
    return rms


def observe(recipe: Recipe, train: Any) -> Observed:
    """Trains a model and measures, before and after each step, what it computes for some rows.

    Args:
      recipe: its `train.steps` are all taken.
      train: its training split.

    Returns:
      by quantity, the RMS before the first step and after each step.
    """
    program = make_program(recipe, jax.devices()[:1], vocab_size=train.vocab_size,
                           fields=train.fields)
    size, model, sharding = recipe.train.batch_size, program.model, program.layout.sharding(
        ("batch", "seq"))

    def batch(at: int, rows: int) -> dict[str, jax.Array]:
        return {name: jax.device_put(x, sharding)
                for name, x in train.rows(np.arange(at, at + rows)).items()}

    probe = batch(size * recipe.train.steps, PROBE)
    real = np.asarray(probe["segment_ids"]) > 0
    state, step = program.spec.init(recipe.train.seed), program.traced.lower().compile()
    compute = jax.jit(lambda params: computed(model, params, probe))
    first = jax.tree.map(np.asarray, compute(state.params))
    found: dict[str, list[float]] = {}
    for k in range(recipe.train.steps + 1):
        for name, value in _rms(jax.tree.map(np.asarray, compute(state.params)), first, real):
            found.setdefault(name, []).append(value)
        if k < recipe.train.steps:
            state, _ = step(state, batch(size * k, size))
    return {name: np.array(series) for name, series in found.items()}


def computed(model: Model, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """The residual stream [layers, B, T, D], the attention scores [layers, B, H, T, T], the logits.

    Those of an encoder-decoder are its decoder's. Scores of what a token does not see are 0.
    """
    with recording("state", "query", "key") as stacks:
        hidden = model.hidden(params, batch)
    found, c = stacks[-1], model.config
    scale = (c.query_scalar or c.dims.head_dim) ** -0.5 * attention_multiplier(c)
    q, k = found["query"], found["key"]
    k = jnp.repeat(k, q.shape[3] // k.shape[3], axis=3)
    segments = batch["segment_ids"]
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    if c.family != "encoder":
        seen &= jnp.tril(jnp.ones(seen.shape[1:], bool))[None]
    scores = jnp.einsum("LBTHK,LBSHK->LBHTS", q, k).astype(jnp.float32) * scale
    return {"stream": found["state"].astype(jnp.float32),
            "scores": jnp.where(seen[None, :, None], scores, 0), "logits": model.logits_of(hidden)}


def _rms(now: dict[str, Any], first: dict[str, Any],
         real: np.ndarray) -> Iterator[tuple[str, float]]:
    """Every quantity with its RMS over the tokens that are not padding."""
    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(x), dtype=np.float64)))

    for name, at in (("first", 0), ("last", -1)):
        yield f"stream, {name} layer", rms(now["stream"][at][real])
        yield f"change of stream, {name} layer", rms((now["stream"] - first["stream"])[at][real])
    seen = np.moveaxis(first["scores"], 2, -1)
    seen = (seen != 0) | (np.moveaxis(now["scores"], 2, -1) != 0)
    for name in ("scores", "logits"):
        x, before = (np.moveaxis(y[name], 2, -1)[seen] if name == "scores" else y[name][real]
                     for y in (now, first))
        yield name, rms(x)
        yield f"change of {name}", rms(x - before)


def table(lines: Sequence[Line]) -> list[str]:
    """The results after the last step as lines of Markdown, each quantity with its deviation."""
    rows = []
    for line in lines:
        rows += ["", f"{line.parametrization}: RMS against {line.along} after "
                 f"{len(next(iter(line.rms.values()))[0]) - 1} steps", "",
                 f"| | {' | '.join(map(str, line.sizes))} | deviation |",
                 "| --- |" + " ---: |" * (len(line.sizes) + 1)]
        rows += [f"| {name}{'' if name in judged(line) else ' (not judged)'} | "
                 f"{' | '.join(f'{series[-1]:.4g}' for series in found)} | "
                 f"{line.deviation(name):.0%} |" for name, found in line.rms.items()]
        worst = max(judged(line), key=line.deviation)
        rows += ["", f"{line.parametrization} is {'' if line.is_flat else 'not '}flat in "
                 f"{line.along}: {worst} deviates by {line.deviation(worst):.0%} from the mean "
                 f"(limit: {FLAT:.0%})"]
    return rows[1:]


def write_json(lines: Sequence[Line], out: Path) -> None:
    """Writes what was measured, and the verdicts."""
    write_whole(out, json.dumps([dataclasses.asdict(line) | {
        "deviation": {name: line.deviation(name) for name in line.rms}, "flat": line.is_flat}
        for line in lines], indent=1) + "\n")
