"""What a run is made of: everything is checked, opened and placed here, before anything is compiled."""

import base64
import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

import lmjax
from lmjax.checkpoint import Checkpointer
from lmjax.config import plain
from lmjax.data import Tokenizer, open_splits
from lmjax.data.pipeline import Mixture, Split
from lmjax.generate import Generator
from lmjax.losses import Loss
from lmjax.metrics import human_count
from lmjax.models import Batch, Model, build_model
from lmjax.nn.module import Params
from lmjax.optim import make_optimizer, make_schedule
from lmjax.prepare import prepare
from lmjax.recipe import Recipe, blocking_changes
from lmjax.sharding import Layout, make_layout
from lmjax.train_state import StateSpec, TrainState, state_spec
from lmjax.train_step import StepFn, make_eval_step, make_train_step, next_token_loss
from lmjax.tree import num_elements

Log = Callable[[str], None]


@dataclasses.dataclass
class Run:
    """Everything that the loop needs, made by `set_up`."""

    recipe: Recipe
    workdir: Path
    layout: Layout
    model: Model
    spec: StateSpec
    train_split: Mixture
    heldout: Split
    tokenizer: Tokenizer | None
    step_fn: StepFn
    eval_fn: Callable[[Params, Batch], Loss]
    generator: Generator | None  # None without a tokenizer
    checkpointer: Checkpointer
    about: dict[str, Any]
    state: TrainState | None = None
    compiled: StepFn | None = None  # step_fn, once the loop has started

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts that text is generated from as training goes on."""
        return [[self.tokenizer.bos_id, *self.tokenizer.encode(p)] for p in self.recipe.sample.prompts]


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds the directory for this run: two writers would spoil each other's files.

    Raises:
      ValueError: another process holds it.
    """
    if ":/" in str(workdir):
        raise ValueError(f"--workdir: expected a local directory, got {workdir}; keep the run local or on a mounted "
                         "file system (data.directory may be in a bucket)")
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        yield
        return
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir}: expected a directory that no run is using, got one that another process "
                             "trains in; wait for it or use another --workdir") from None
        yield


def set_up(recipe: Recipe, workdir: Path, log: Log) -> Run:
    """Checks everything that can be checked, prepares data, and makes or restores the state."""
    devices = jax.devices()
    platform = devices[0].platform
    layout = make_layout(recipe.mesh, devices)
    _check_workdir(recipe, workdir, log)
    directory = _data(recipe, workdir, log)
    train_split, heldout = open_splits(recipe.data, directory)
    tokenizer = (None if recipe.data.synthetic else
                 Tokenizer.from_bytes((epath.Path(directory) / "tokenizer.model").read_bytes()))
    model = build_model(recipe.model, vocab_size=train_split.vocab_size, platform=platform,
                        dtype=recipe.train.dtype(platform), seq_len=recipe.data.seq_len)
    schedule = make_schedule(recipe.optimizer, recipe.train.steps)
    tx = make_optimizer(recipe.optimizer, recipe.train.steps, model.axes)
    spec = state_spec(model, tx, layout, ema=recipe.optimizer.ema_decay > 0)
    _check_batch(recipe, layout)
    loss_fn = next_token_loss(model, z_loss=recipe.train.z_loss, chunk=recipe.train.loss_chunk)
    about = {"recipe": plain(recipe) | {"model": plain(model.config)},
             "data": {"fingerprint": train_split.fingerprint},
             "tokenizer": None if tokenizer is None else base64.b64encode(tokenizer.to_bytes()).decode(),
             "versions": lmjax.versions()}
    run = Run(recipe, workdir, layout, model, spec, train_split, heldout, tokenizer,
              make_train_step(loss_fn, spec, layout, schedule, seed=recipe.train.seed,
                              microbatches=recipe.train.microbatches, ema_decay=recipe.optimizer.ema_decay),
              make_eval_step(loss_fn, layout),
              None if tokenizer is None else
              Generator(model, layout, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size),
              Checkpointer(workdir.absolute() / "checkpoints", keep_last=recipe.checkpoint.keep_last,
                           keep_every=recipe.checkpoint.keep_every, log=log), about)
    if recipe.sample.every and run.generator:
        run.generator.check(run.prompts, recipe.sample.max_tokens)
    facts = _tell(run, directory, log)
    _restore(run, log)
    if jax.process_index() == 0:  # only now: a start that is refused leaves the directory as it was
        _write_json(workdir / "run.json", facts)
        _write_json(workdir / "config.json", plain(recipe))
    return run


def _restore(run: Run, log: Log) -> None:
    found = run.checkpointer.restore(run.spec)
    if found is None:
        run.state = run.spec.init(run.recipe.train.seed)
        return
    run.state, about = found
    _same_run(run.workdir, about["recipe"], run.about["recipe"])
    saved, now = about["data"]["fingerprint"], run.about["data"]["fingerprint"]
    if saved != now:
        raise ValueError(f"{run.workdir}: expected the data that its checkpoint was trained on ({saved[:12]}), got "
                         f"data {now[:12]}; use another --workdir or the data directory of that run")
    run.about["data"]["tokens"] = about["data"]["tokens"]
    log(f"resuming at step {int(run.state.step)}, from row {about['data']['next_row']:,} of the data")


def _check_workdir(recipe: Recipe, workdir: Path, log: Log) -> None:
    """Refuses a directory that another run was written in."""
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; the file is damaged, move it away to go by the "
                         "checkpoints alone") from None
    for change in _same_run(workdir, before, plain(recipe)):
        log(f"changed since the last start: {change}")


def _same_run(where: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The harmless changes between two configs; a ValueError that names the others."""
    bad, fine = blocking_changes(before, now)
    if bad:
        raise ValueError(f"{where}: expected the config that this run was started with, got {'; '.join(bad)}; "
                         "use another --workdir or undo the change")
    return fine


def _check_batch(recipe: Recipe, layout: Layout) -> None:
    rows = recipe.train.batch_size // recipe.train.microbatches
    for name, size in (("train.batch_size / microbatches", rows),
                       ("eval.batch_size", recipe.eval.batch_size or recipe.train.batch_size)):
        try:
            layout.spec(("batch", "seq"), (size, recipe.data.seq_len))
        except ValueError as error:
            raise ValueError(f"config.{name}: {error}") from None


def _data(recipe: Recipe, workdir: Path, log: Log) -> str:
    """The directory of the prepared data, prepared now if it is not; process 0 does it for all."""
    directory = recipe.data.directory or str(workdir.absolute() / "data")
    if recipe.data.synthetic:
        return directory
    if jax.process_index() == 0:
        prepare(recipe.data, directory, log=log)
    else:
        while not (epath.Path(directory) / "manifest.json").exists():  # appears whole, by a rename
            time.sleep(0.2)
    return directory


def _tell(run: Run, directory: str, log: Log) -> dict[str, Any]:
    """Says what is about to run and why. Returns it, for run.json."""
    r, model, mesh = run.recipe, run.model, run.layout.mesh
    devices = mesh.devices.flatten()
    parameters = num_elements(model.shapes)
    tokens = r.train.batch_size * r.data.seq_len
    epochs = max(run.train_split.epochs(r.train.steps * r.train.batch_size).values())
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    log(f"device: {devices.size} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)")
    log(f"mesh: {', '.join(f'{a}={n}' for a, n in shape.items())}; computing in {model.dtype}")
    log(f"attention: {model.kernel} ({model.kernel_reason})")
    log(f"model: {human_count(parameters)} parameters, of which {human_count(model.embedding_parameters())} in "
        f"embeddings; vocabulary {model.config.vocab_size:,}")
    log(f"data: {human_count(run.train_split.predictions)} tokens to train on, "
        f"{human_count(run.heldout.predictions)} held out, {run.train_split.bytes / run.train_split.predictions:.2f} "
        f"bytes a token ({directory})")
    log(f"run: {r.train.steps:,} steps of {human_count(tokens)} tokens, {epochs:.2f} epochs")
    return {"lmjax": lmjax.__version__, "versions": lmjax.versions(),
             "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": int(devices.size)},
             "mesh": dict(mesh.shape), "attention": {"kernel": model.kernel, "reason": model.kernel_reason},
             "parameters": parameters, "embedding_parameters": model.embedding_parameters(), "tokens_per_step": tokens,
             "flops_per_token": model.flops_per_token(r.data.seq_len), "compute_dtype": str(model.dtype),
             "epochs": epochs, "steps": r.train.steps,
             "data": {"fingerprint": run.train_split.fingerprint, "directory": directory}}


def _write_json(file: Path, value: Any) -> None:
    """All of it, or what was there before."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(file)
