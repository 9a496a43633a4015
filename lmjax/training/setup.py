"""What a run is made of: everything is checked, opened and placed here, before anything is compiled."""

import base64
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import lmjax
from lmjax.config import plain
from lmjax.data import Tokenizer, open_splits
from lmjax.data.order import Steps
from lmjax.data.pipeline import Mixture, Split
from lmjax.data.preparation.prepare import prepare
from lmjax.data.tokenizers import prepared_tokenizer
from lmjax.decoding.generate import Generator
from lmjax.models.flops import embedding_parameters, flops_per_row
from lmjax.models.model import Model
from lmjax.monitoring.goodput import KINDS
from lmjax.monitoring.units import human_count
from lmjax.runtime.chips import FLAGS, GIB
from lmjax.runtime.devices import device_memory
from lmjax.runtime.distributed import agreed
from lmjax.runtime.files import Busy, lock, write_whole
from lmjax.sharding import Layout, make_layout
from lmjax.training.checkpoint import About, Checkpointer, checkpoint_steps, checksums
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.pretrained import Pretrained, check_start, find, make_tokenizer
from lmjax.training.program import Program, make_model, make_program
from lmjax.training.recipe import Recipe, blocking_changes, build_recipe, check_schedule
from lmjax.training.state import StateSpec, TrainState
from lmjax.training.step import StepFn
from lmjax.tree import num_elements, shard_bytes

Log = Callable[[str], None]
At = Callable[[int, str], None]  # told where the run is, as `Watchdog.at`
STARTED_FROM = ("init_from", "huggingface")  # what each checkpoint of a run says of the weights that it began with


@dataclasses.dataclass
class Run:
    """Everything that the loop needs, made by `set_up`."""

    recipe: Recipe
    workdir: Path
    program: Program
    train_split: Mixture
    heldout: Split
    tokenizer: Tokenizer | None
    generator: Generator | None  # None without a tokenizer
    checkpointer: Checkpointer
    about: dict[str, Any]
    steps: Steps
    tokens: int = 0  # trained on before this start
    unfinished: bool = False  # the newest step was saved before it was evaluated
    restore_seconds: float = 0.0  # that making the state took, if it was read from a checkpoint
    state: TrainState | None = None
    compiled: StepFn | None = None  # the train step, once the loop has started

    def data_state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps has to hold of the data: where it goes on, and what came before."""
        state = self.steps.state(step)
        return {"fingerprint": self.train_split.fingerprint_of(state["next_row"]), **state}

    @property
    def layout(self) -> Layout:
        """Where arrays live."""
        return self.program.layout

    @property
    def model(self) -> Model:
        """The model without its values."""
        return self.program.model

    @property
    def spec(self) -> StateSpec:
        """Shapes and shardings of the state."""
        return self.program.spec

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts that text is generated from as training goes on."""
        return [[self.tokenizer.bos_id, *self.tokenizer.encode(p)] for p in self.recipe.sample.prompts]


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds the directory for this run: two writers would spoil each other's files.

    Raises:
      ValueError: it is no local directory.
      Busy: another process holds it.
    """
    if ":/" in str(workdir):
        raise ValueError(f"--workdir: expected a local directory, got {workdir}; keep the run local or on a mounted "
                         "file system (data.directory and checkpoint.directory may be in a bucket)")
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir: expected a directory, got the file {workdir}; choose another")
    workdir.mkdir(parents=True, exist_ok=True)
    busy = Busy("a directory that no run is using", "one that another process trains in",
                "wait for it or use another --workdir", where=str(workdir))
    held: list[int] = []
    agreed(lambda: held.append(lock(workdir / ".lock", busy)))  # by process 0
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def set_up(recipe: Recipe, workdir: Path, log: Log, at: At = lambda step, doing: None) -> Run:
    """Checks everything that can be checked, prepares data, and makes or restores the state."""
    at(0, "setting up")
    _check_early(recipe)
    _check_workdir(recipe, workdir, log)
    source = _source(recipe, workdir)
    at(0, "preparing data")
    directory = _data(recipe, workdir, log)
    at(0, "setting up")
    train_split, heldout = open_splits(recipe.data, directory)
    tokenizer = None if recipe.data.synthetic else prepared_tokenizer(directory)
    program = make_program(recipe, jax.devices(), vocab_size=train_split.vocab_size, fields=train_split.fields)
    _check_memory(program.spec)
    layout, model = program.layout, program.model
    about = {"recipe": plain(recipe) | {"model": plain(model.config)},
             "tokenizer": None if tokenizer is None else base64.b64encode(tokenizer.to_bytes()).decode(),
             "versions": lmjax.versions(), "compute_dtype": str(model.dtype)}
    run = Run(recipe, workdir, program, train_split, heldout, tokenizer,
              None if tokenizer is None else
              Generator(model, layout, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size),
              Checkpointer(recipe.checkpoint.path(workdir), keep_last=recipe.checkpoint.keep_last,
                           keep_every=recipe.checkpoint.keep_every, log=log), about,
              Steps([(0, 0, recipe.train.batch_size)]))
    if recipe.sample.every and run.generator:
        run.generator.check(run.prompts, recipe.sample.max_tokens)
    at(0, KINDS["restore"])
    facts = _tell(run, directory, log) | _restore(run, source, log)
    if jax.process_index() == 0:  # only now: a start that is refused leaves the directory as it was
        for name, value in (("run.json", facts), ("config.json", plain(recipe))):
            write_whole(workdir / name, json.dumps(value, indent=2) + "\n")
    return run


def _check_early(recipe: Recipe) -> None:
    """What can be refused before data is prepared, which may take hours: mesh, schedule, attention."""
    make_schedule(recipe.optimizer, recipe.train.steps)
    make_model(recipe, make_layout(recipe.mesh),
               vocab_size=recipe.model.vocab_size or recipe.data.tokenizer.vocab_size)


def _check_memory(spec: StateSpec) -> None:
    """Refuses a state that alone is more than a device holds; what a step needs besides, `lmjax plan` tells."""
    needs, has = shard_bytes(spec.shapes), device_memory()
    if needs > has:
        raise ValueError(f"config.model: expected weights and optimizer state within the {has / GIB:.1f} GiB of a "
                         f"device, got {needs / GIB:.1f} GiB; use a smaller model or split it over more devices "
                         "(mesh.fsdp)")


def _source(recipe: Recipe, workdir: Path) -> Pretrained | None:
    """What the run starts from, if it says so and has no checkpoint of its own."""
    if not recipe.train.init_from or agreed(lambda: checkpoint_steps(recipe.checkpoint.path(workdir))):
        return None
    return find(recipe.train.init_from)


def _restore(run: Run, source: Pretrained | None, log: Log) -> dict[str, Any]:
    """Makes the state, or takes it and the place in the data from the newest checkpoint; facts for run.json."""

    def check(about: About) -> None:
        _same_run(run.workdir, about["recipe"], run.about["recipe"])
        if about["step"] > run.recipe.train.steps:
            raise ValueError(f"config.train.steps: expected at least the {about['step']:,} steps that {run.workdir} "
                             f"has done, got {run.recipe.train.steps:,}; raise it, or use another --workdir")
        check_schedule(build_recipe(about["recipe"]), run.recipe, about["step"])
        data = about["data"]
        saved, now = data["fingerprint"], run.train_split.fingerprint_of(data["next_row"])
        if saved != now:
            raise ValueError(f"{run.workdir}: expected the data that its checkpoint was trained on ({saved[:12]}), got "
                             f"data {now[:12]}; use another --workdir, the data directory of that run, or data.stages "
                             f"that are the same before row {data['next_row']:,}")
        began, now = about["compute_dtype"], run.about["compute_dtype"]
        if began != now:  # as where "auto" meets another kind of device
            raise ValueError(f"{run.workdir}: expected to compute in {began} as this run began, got {now} "
                             f"({_dtype_reason(run)}); set config.train.compute_dtype={began} or use another --workdir")

    began = time.monotonic()
    found = run.checkpointer.restore(run.spec, check)
    if found is None:
        if source:
            check_start(source, run.model, run.tokenizer)
        facts = _plan(run, log)  # may refuse, so before anything is computed
        run.state = run.spec.init(run.recipe.train.seed) if source is None else _start(run, source, log)
        return facts
    run.restore_seconds = time.monotonic() - began
    run.state, about = found
    run.unfinished = about.get("unfinished", False)
    run.about |= {key: about[key] for key in STARTED_FROM if key in about}
    data, step, size = about["data"], int(run.state.step), run.recipe.train.batch_size
    before = Steps.restored(data, step)
    run.steps, run.tokens = before.resumed(step, size), data["tokens"]
    log(f"resuming at step {step}, from row {data['next_row']:,} of the data")
    if before.changes[-1].size != size:
        log(f"batch size: {before.changes[-1].size} rows up to step {step}, {size} from there on; learning rate and "
            "other schedules go on by step")
    return _plan(run, log)


def _start(run: Run, source: Pretrained, log: Log) -> TrainState:
    """The state before the first step, with the weights that were found."""
    params = source.read(run.model, run.spec.shardings.params)
    run.about["init_from"] = {"path": source.where, "step": source.about["step"], "checksums": checksums(params)}
    if "huggingface" in source.about:  # what an export goes by
        run.about["huggingface"] = source.about["huggingface"]
    log(f"weights: those of {source.where}, step {source.about['step']:,}; the optimizer begins anew")
    return run.spec.start(params)


def _plan(run: Run, log: Log) -> dict[str, Any]:
    """Says what the run will train on, row by row; refuses one that goes through a source too often."""
    r, split = run.recipe, run.train_split
    rows = run.steps.rows(r.train.steps)
    split.check_epochs(rows, r.data.max_epochs)
    epochs = split.epochs(rows)
    log(f"run: {r.train.steps:,} steps of {human_count(r.train.batch_size * r.data.seq_len)} tokens, "
        f"{max(epochs.values()):.2f} epochs")
    for line in split.plan(rows) if len(split.sources) > 1 else ():
        log(f"plan: {line}")
    return {"epochs": max(epochs.values())}


def _check_workdir(recipe: Recipe, workdir: Path, log: Log) -> None:
    """Refuses a directory that another run was written in."""
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text())
        if not isinstance(before, dict):
            raise ValueError(f"{before!r:.40}")
    except ValueError as error:
        raise ValueError(f"{file}: expected a config as JSON, got {error}; the file is damaged, move it away to go by "
                         "the checkpoints alone") from None
    for change in _same_run(workdir, before, plain(recipe)):
        log(f"changed since the last start: {change}")


def _same_run(where: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The harmless changes between two configs; a ValueError that names the others."""
    with contextlib.suppress(ValueError):  # a key that has gone since is told as a change
        before = plain(build_recipe(before))  # keys that came since have their defaults
    bad, fine = blocking_changes(before, now)
    if bad:
        raise ValueError(f"{where}: expected the config that this run was started with, got {'; '.join(bad)}; "
                         "use another --workdir or undo the change")
    return fine


def _data(recipe: Recipe, workdir: Path, log: Log) -> str:
    """The directory of the prepared data, prepared now if it is not; process 0 does it for all."""
    directory = recipe.data.directory or str(workdir.absolute() / "data")
    if not recipe.data.synthetic:
        agreed(lambda: prepare(recipe.data, directory, make_tokenizer=make_tokenizer, log=log))
    return directory


def _tell(run: Run, directory: str, log: Log) -> dict[str, Any]:
    """Says what is about to run and why. Returns it, for run.json."""
    r, model, mesh = run.recipe, run.model, run.layout.mesh
    devices = mesh.devices.flatten()
    parameters = num_elements(model.shapes)
    tokens = r.train.batch_size * r.data.seq_len
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    log(f"device: {devices.size} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)")
    log(f"mesh: {', '.join(f'{a}={n}' for a, n in shape.items())}; computing in {model.dtype} "
        f"({_dtype_reason(run)})")
    if (stages := run.layout.ways("layers")) > 1:
        parts = r.train.microbatches
        log(f"pipeline: {stages} stages and {parts} microbatches, so that each stage idles for "
            f"{(stages - 1) / (parts + stages - 1):.0%} of its time; more train.microbatches, less of it")
    log(f"attention: {model.kernel} ({model.kernel_reason})")
    log(f"model: {human_count(parameters)} parameters, of which {human_count(embedding_parameters(model))} in "
        f"embeddings; vocabulary {model.config.vocab_size:,}")
    log(f"data: {human_count(run.train_split.predictions)} tokens to train on, "
        f"{human_count(run.heldout.predictions)} held out, {run.train_split.bytes / run.train_split.predictions:.2f} "
        f"bytes a token ({directory})")
    flags = {name: os.environ[name] for name in FLAGS if os.environ.get(name)}
    for name, value in flags.items():
        log(f"{name}: {value}")
    return {"lmjax": lmjax.__version__, "versions": lmjax.versions(), "flags": flags,
             "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": int(devices.size)},
             "mesh": dict(mesh.shape), "attention": {"kernel": model.kernel, "reason": model.kernel_reason},
             "parameters": parameters, "embedding_parameters": embedding_parameters(model), "tokens_per_step": tokens,
             "flops_per_token": flops_per_row(model, run.train_split.fields) / r.data.seq_len,
             "compute_dtype": str(model.dtype), "steps": r.train.steps,
             "data": {"fingerprint": run.train_split.fingerprint, "directory": directory}}


def _dtype_reason(run: Run) -> str:
    platform = run.layout.mesh.devices.flat[0].platform
    return f"auto: on {platform}" if run.recipe.train.compute_dtype == "auto" else "asked for"
