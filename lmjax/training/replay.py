"""Repeats one step of a run exactly, from the nearest checkpoint before it; writes nothing there.

The order of the data, the noise, and what is skipped or left out are functions of the checkpoint
and the config. On the machine and the mesh of the run, a repeated step therefore has the recorded
loss to the bit.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

import lmjax
from lmjax.config import plain
from lmjax.data.batches import local_rows, to_global
from lmjax.data.order import Steps
from lmjax.errors import UserError, first_line
from lmjax.models.model import Batch
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.nn.module import Params
from lmjax.runtime.chips import FLAGS
from lmjax.sharding import MESH_AXES, MeshConfig
from lmjax.tasks.grpo import Grpo
from lmjax.tasks.writing import WritingTask
from lmjax.training.checkpoint import (
    About,
    Checkpointer,
    Damaged,
    checkpoint_steps,
    read_about,
    read_state,
)
from lmjax.training.pretrained import Pretrained, check_answers, find
from lmjax.training.recipe import EvalConfig, Recipe, SampleConfig, recorded_recipe
from lmjax.training.records import step_limits
from lmjax.training.resume import begin
from lmjax.training.rewind import MOST_REWINDS
from lmjax.training.rollout import rollout
from lmjax.training.run import Log, Run
from lmjax.training.setup import open_run
from lmjax.training.state import StateSpec, TrainState
from lmjax.training.teacher import add_teacher, find_teacher
from lmjax.training.workdir import same_run

STARTS = ("start", "resume")  # events of timing.jsonl with which steps begin
Event = dict[str, Any]


class Difference(NamedTuple):
    """A figure that did not repeat."""

    step: int
    name: str  # as in metrics.jsonl
    recorded: float
    repeated: float


@dataclasses.dataclass
class Repeated:
    """A step of a run, done again."""

    run: Run  # with the rows of the run's steps; its state is the one after the step, if still held
    step: int
    start: int  # the checkpoint from which it was repeated; 0: the seed
    before: TrainState  # the state before the step
    batch: Batch  # of the step, limits included
    metrics: dict[str, float]  # that it gave: the names of metrics.jsonl
    update_norm: float  # of the change of the parameters
    recorded: dict[str, float]  # the same as metrics.jsonl has it; {} if it has no such line
    compared: int  # steps up to this one that metrics.jsonl has as well
    differences: list[Difference]  # among these
    notes: list[str]  # what is not as it was when the run trained
    why: str  # what the run said of the step: that it was skipped or a spike; "": nothing

    @property
    def rows(self) -> np.ndarray:
        """The numbers of the step's rows in the run, int64 [B]."""
        return np.arange(*self.run.steps.of(self.step))

    @property
    def is_equal(self) -> bool:
        """Whether everything that was recorded of the step was repeated to the bit."""
        return bool(self.recorded) and all(d.step != self.step for d in self.differences)


class _Past(Checkpointer):
    """Restores the newest checkpoint that is whole and not of a later step; writes nothing."""

    def __init__(self, directory: str, last: int, log: Log):
        self.directory, self.last, self.log = epath.Path(directory), last, log
        self.completed = lambda step: None
        self.kept = self.saving = self.newest = 0

    def restore(self, spec: StateSpec, check: Callable[[About], None],
                abandon: int = 0) -> tuple[TrainState, About] | None:
        for step in reversed([s for s in checkpoint_steps(self.directory) if s <= self.last]):
            try:
                return read_state(self.directory / str(step), spec, check)
            except Damaged as error:
                self.log(f"checkpoint {self.directory / str(step)} is damaged and not used: "
                         f"{error}")
        return None


def repeat(workdir: str | Path, step: int, log: Log, *, before_rewind: bool = False) -> Repeated:
    """Repeats a step, from the newest checkpoint before it.

    Args:
      workdir: of the run. Nothing in it is changed.
      step: from 1, as in metrics.jsonl.
      log: gets lines about what is done.
      before_rewind: with the rows that the step had when the checkpoint was saved: none is left
        out because of a later rewind.

    Raises:
      UserError: there is no such step, or the run cannot be repeated here.
    """
    workdir = Path(workdir)
    history = History(workdir)
    history.check(step)
    recipe, facts = history.recipe(step), history.facts
    devices, notes = _devices(facts)
    sizes = {axis: int(facts["mesh"][axis]) for axis in MESH_AXES}
    recipe = dataclasses.replace(recipe, mesh=MeshConfig(**sizes, rules=recipe.mesh.rules))
    teacher = find_teacher(recipe)
    directory = recipe.data.directory or str(workdir.absolute() / "data")
    run = open_run(recipe, workdir, directory, log, teacher,
                   lambda: _Past(recipe.checkpoint.path(workdir), step - 1, log), devices)
    run.source, run.teacher = _source(recipe, history, step), teacher
    begin(run, run.source, log)
    if teacher:
        add_teacher(run, teacher, log)
    run.steps = history.steps(run, before_rewind)
    check_size(run.steps, run.start, step, history.saved)
    notes += history.changed(recipe, run.start, step)
    if history.rewinds_to(run.start) > MOST_REWINDS and not before_rewind:
        run.health.forgive()
    return _steps(run, step, history, notes, log)


def check_size(steps: Steps, start: int, step: int, saved: Sequence[int]) -> None:
    """Refuses a step if the batch size changed between the checkpoint and the step.

    The checkpoint at which it changed is gone, and the step is compiled for one size.

    Args:
      steps: of the run.
      start: the step of the checkpoint from which `step` is repeated.
      saved: the steps of all checkpoints, ascending.

    Raises:
      UserError: it changed; the error names the nearest steps that can be repeated.
    """
    sizes = [end - first for first, end in map(steps.of, range(start + 1, step + 1))]
    same = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if same is not None:
        later = next((f", or at least {s + 1:,}" for s in saved if s >= step), "")
        raise UserError(f"one batch size from step {start + 1:,}, after the nearest checkpoint, to "
                        f"step {step:,}", f"{sizes[0]} rows, then {sizes[same]} from step "
                        f"{start + same + 1:,} on", f"choose a step of at most {start + same:,}"
                        f"{later}", where="--step")


def _steps(run: Run, step: int, history: "History", notes: list[str], log: Log) -> Repeated:
    """Runs the steps from `run.start` to `step`."""
    run.compiled = run.program.traced.lower().compile()
    state, run.state, compared = run.state, None, 0
    differences: list[Difference] = []
    recorded, start = history.metrics(run.start + 1, step), run.start
    assert state is not None
    for n in range(start + 1, step + 1):
        batch = {**batch_of(run, state, n), **step_limits(run, n)}
        if n == step:
            before = jax.tree.map(jnp.copy, state)
        state, metrics = run.step_of(n)(state, batch)
        values = {name: float(value) for name, value in metrics.items() if not value.ndim}
        run.health.judge(n, values["loss"], values["grad_norm"])
        then = recorded.get(n, {})
        compared += bool(then)
        differences += [Difference(n, name, then[name], value) for name, value in values.items()
                        if name in then and not _same(then[name], value)]
        if n < step and (n - start) % 100 == 0:
            log(f"repeated up to step {n}")
    update_norm = float(distance(state.params, before.params))
    run.state = state
    return Repeated(run, step, start, before, batch, values, update_norm, recorded.get(step, {}),
                    compared, differences, notes, history.why(step))


@jax.jit
def distance(a: Params, b: Params) -> jax.Array:
    """The norm of the difference of two trees, float32 []."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))


def batch_of(run: Run, state: TrainState, step: int) -> Batch:
    """The batch of a step, without limits; `state` is the one before it."""
    if isinstance(run.recipe.task, Grpo):
        return rollout(run, state.whole(state.params), step)
    first, end = run.steps.of(step)
    sharding = run.layout.sharding(("batch", "seq"))
    length = next(iter(run.train_split.fields.values()))
    local = local_rows((end - first, length), sharding)
    return to_global(run.train_split.rows(first + local), end - first, sharding, local)


def _same(recorded: float, repeated: float) -> bool:
    return recorded == repeated or (math.isnan(recorded) and math.isnan(repeated))


class History:
    """What the files of a run say of its steps."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        if not (workdir / "config.json").exists() or not (workdir / "run.json").exists():
            raise UserError("the directory of a run", "no config.json and run.json there",
                            "correct --workdir", where=str(workdir))
        self.config = json.loads((workdir / "config.json").read_text())
        self.facts = json.loads((workdir / "run.json").read_text())
        self.newest = recorded_recipe(self.config)
        self.checkpoints = epath.Path(self.newest.checkpoint.path(workdir))
        self.saved = checkpoint_steps(self.checkpoints)
        self.events = [line for line in read_jsonl(workdir / "timing.jsonl") if "event" in line]

    def check(self, step: int) -> None:
        """Refuses a step that the run has not done."""
        done = [line["step"] for line in read_jsonl(self.workdir / "metrics.jsonl")]
        done += self.saved + [event["step"] for event in self.events]
        done += [event["after"] for event in self.events if "after" in event]
        last = max(done, default=0)
        if not 1 <= step <= last:
            raise UserError(f"a step from 1 to {last:,}, which the run has done", step,
                            "correct it", where="--step")

    def recipe(self, step: int) -> Recipe:
        """The recipe by which a step was done, which the next checkpoint after it records.

        Raises:
          UserError: config.json is of another run than the checkpoints.
        """
        recipe = self.newest
        later = [saved for saved in self.saved if saved >= step]
        if later:
            about = self._about(later[0])
            same_run(self.workdir, about["recipe"], plain(recipe) | {
                "model": plain(recipe.model) | {"vocab_size": about["recipe"]["model"][
                    "vocab_size"], "head": about["recipe"]["model"].get("head", {})}})
            then = recorded_recipe(about["recipe"])
            first, end = Steps.restored(about["data"], later[0]).of(step)
            earlier = [saved for saved in self.saved if saved < step]
            if end - first != then.train.batch_size and earlier:
                # It changed after the step, at a checkpoint that is gone.
                then = recorded_recipe(self._about(earlier[-1])["recipe"])
            recipe = dataclasses.replace(
                recipe, train=dataclasses.replace(then.train, init_from=recipe.train.init_from,
                                                  batch_size=end - first),
                optimizer=then.optimizer, model=dataclasses.replace(
                    recipe.model, attention=then.model.attention, remat=then.model.remat,
                    scan_layers=then.model.scan_layers),
                watch=then.watch)
        # Nothing is evaluated, sampled or saved.
        checkpoint = dataclasses.replace(recipe.checkpoint, keep_best=False, abandon=0)
        return dataclasses.replace(recipe, eval=EvalConfig(batch_size=recipe.eval.batch_size),
                                   sample=SampleConfig(), checkpoint=checkpoint)

    def _about(self, saved: int) -> About:
        return read_about(self.checkpoints / str(saved))

    def changed(self, recipe: Recipe, start: int, step: int) -> list[str]:
        """Notes of what may have changed between `start` and `step`, at a checkpoint now gone."""
        if start not in self.saved:
            return []
        had = recorded_recipe(self._about(start)["recipe"]).train.microbatches
        now = recipe.train.microbatches
        end = next((saved for saved in self.saved if saved >= step), math.inf)
        resumed = any(event["event"] in STARTS and start < event["step"] < end
                      for event in self.events)
        if had == now or not resumed:
            return []
        return [f"the run had train.microbatches={had} up to step {start:,} and changed it there "
                f"or at a later resume, here all steps have {now}"]

    def steps(self, run: Run, before_rewind: bool) -> Steps:
        """Which rows each step of the run has taken."""
        if before_rewind or not self.saved:
            steps, after = run.steps, run.start
        else:
            after = self.saved[-1]
            steps = Steps.restored(self._about(after)["data"], after)
        steps = steps.resumed(after, self.newest.train.batch_size if after >= run.start
                              and not before_rewind else run.recipe.train.batch_size)
        for event in () if before_rewind else self._rewinds_since(after):
            first, end = map(int, event["rows"].split(":"))
            if first < end:
                steps = steps.without(steps.step_of(first), end)
        return steps

    def _rewinds_since(self, saved: int) -> Iterator[Event]:
        """The rewinds after the newest checkpoint was saved, which no checkpoint records."""
        found: list[Event] = []
        for i, event in enumerate(self.events):
            if self._begins_process(i):
                found = []  # which repeats them
            elif event["event"] == "checkpoint" and event["step"] == saved:
                found = []
            elif event["event"] == "rewind":
                found.append(event)
        return iter(found)

    def _begins_process(self, i: int) -> bool:
        """Whether event i is the start of a process, not what a rewind restores."""
        later = self.events[i + 1 : i + 2]
        is_rewind = bool(later) and later[0]["event"] == "rewind"
        return self.events[i]["event"] in STARTS and not is_rewind

    def rewinds_to(self, start: int) -> int:
        """How often the run went back to the checkpoint of step `start` in its last process."""
        count = 0
        for i, event in enumerate(self.events):
            if self._begins_process(i) and event["step"] <= start:
                count = 0
            count += event["event"] == "rewind" and event["step"] == start
        return count

    def metrics(self, first: int, last: int) -> dict[int, dict[str, float]]:
        """The lines of these training steps, by step."""
        return {line["step"]: {name: float(value) for name, value in line.items()
                               if name != "step"}
                for line in read_jsonl(self.workdir / "metrics.jsonl")
                if first <= line["step"] <= last and "loss" in line}

    def why(self, step: int) -> str:
        """What the newest event about a step says: that it was skipped, or a spike."""
        found = [event for event in self.events
                 if event["event"] in ("skipped", "spike") and event["step"] == step]
        return f"{found[-1]['event']}: {found[-1]['why']}" if found else ""


def _devices(facts: Mapping[str, Any]) -> tuple[list[jax.Device], list[str]]:
    """The devices for the mesh of the run, and what differs from those that it had.

    Raises:
      UserError: there are fewer.
    """
    needed = math.prod(facts["mesh"].values())
    here, then = jax.devices(), facts.get("device", {})
    if len(here) < needed:
        mesh = ", ".join(f"{axis}={n}" for axis, n in facts["mesh"].items() if n > 1)
        raise UserError(
            f"the {needed} devices of the run's mesh ({mesh})",
            f"{len(here)} x {here[0].device_kind}", "repeat it where it ran" + (
                f", or with XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
                if then.get("platform") == here[0].platform == "cpu" else ""))
    notes = []
    if (kind := then.get("kind")) and kind != here[0].device_kind:
        notes.append(f"the run had {kind}, here is {here[0].device_kind}")
    now = lmjax.versions()
    notes += [f"the run had {name} {version}, here is {now.get(name)}"
              for name, version in facts.get("versions", {}).items() if now.get(name) != version]
    flags = facts.get("flags", {})
    notes += [f"the run had {name}={flags.get(name, '')}" for name in FLAGS
              if flags.get(name, "") != os.environ.get(name, "")]
    return here[:needed], notes


def _source(recipe: Recipe, history: History, step: int) -> Pretrained | None:
    """The model that the run began with, if no checkpoint before the step is there."""
    if not recipe.train.init_from or any(saved < step for saved in history.saved):
        return None
    try:
        found = find(recipe.train.init_from)
    except UserError as error:
        raise UserError("a checkpoint before the step, or the model that the run began with",
                        first_line(error), "bring it back", where="config.train.init_from"
                        ) from None
    if not isinstance(recipe.task, WritingTask):
        check_answers(found)
    return found
