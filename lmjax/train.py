"""`lmjax train`: config and working directory in, a trained model with its story out."""

import base64
import contextlib
import dataclasses
import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

import lmjax
from lmjax.checkpoint import Checkpointer
from lmjax.config import plain
from lmjax.data import Tokenizer, eval_batches, make_batches, open_splits
from lmjax.data.pipeline import Mixture, Split
from lmjax.evaluate import bits_per_byte, evaluate
from lmjax.generate import Generator, Sampling
from lmjax.metrics import MetricsWriter, Progress, human_count
from lmjax.models import Model, build_model
from lmjax.optim import make_optimizer, make_schedule
from lmjax.prepare import prepare
from lmjax.recipe import Recipe, blocking_changes
from lmjax.report import write_report
from lmjax.runtime import StopSignal, stop_signal
from lmjax.sharding import Layout, make_layout
from lmjax.train_state import StateSpec, TrainState, state_spec
from lmjax.train_step import Metrics, make_eval_step, make_train_step, next_token_loss

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
    step_fn: Callable[..., tuple[TrainState, Metrics]]
    eval_fn: Callable[..., Any]
    generator: Generator
    checkpointer: Checkpointer
    about: dict[str, Any]
    state: TrainState | None = None
    compiled: Callable[..., tuple[TrainState, Metrics]] | None = None  # step_fn, once the loop has started


def train(recipe: Recipe, workdir: str | Path, log: Log = lambda line: print(line, file=sys.stderr, flush=True)) -> str:
    """Trains `recipe` in `workdir`, from its newest checkpoint if there is one.

    Returns "done", or "stopped" when a signal asked it to stop (the current step is then saved).

    Raises:
      ValueError: the recipe cannot run, or the directory holds another run; before anything is compiled.
      OSError: the disk is full; what was saved stays.
    """
    workdir, began = Path(workdir), time.monotonic()
    log = log if jax.process_index() == 0 else lambda line: None
    with _claimed(workdir):
        with stop_signal() as stop:
            run = set_up(recipe, workdir, log)
            start = int(run.state.step)
            writer = MetricsWriter(workdir, start) if jax.process_index() == 0 else _Silent()
            with contextlib.closing(run.checkpointer), contextlib.closing(writer):
                writer.event(start, "resume" if start else "start", time.monotonic() - began)
                outcome = Loop(run, writer).run(start, recipe.train.steps, stop)
        if jax.process_index() == 0:
            log(f"report: {write_report(workdir)}")
    return outcome


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
                        dtype=recipe.train.dtype(platform))
    schedule = make_schedule(recipe.optimizer, recipe.train.steps)
    tx = make_optimizer(recipe.optimizer, recipe.train.steps, model.axes)
    spec = state_spec(model, tx, layout, ema=recipe.optimizer.ema_decay > 0)
    _check_batch(recipe, layout)
    loss_fn = next_token_loss(model, z_loss=recipe.train.z_loss, chunk=recipe.train.loss_chunk)
    about = {"recipe": plain(recipe) | {"model": plain(model.config)},
             "data": {"fingerprint": train_split.fingerprint, "bytes_per_token": train_split.bytes / train_split.predictions},
             "tokenizer": None if tokenizer is None else base64.b64encode(tokenizer.to_bytes()).decode(), "versions": lmjax.versions()}
    run = Run(recipe, workdir, layout, model, spec, train_split, heldout, tokenizer,
              make_train_step(loss_fn, spec, layout, schedule, seed=recipe.train.seed,
                              microbatches=recipe.train.microbatches, ema_decay=recipe.optimizer.ema_decay),
              make_eval_step(loss_fn, layout),
              Generator(model, layout, eos_id=-1 if tokenizer is None else tokenizer.eos_id),
              Checkpointer(workdir.absolute() / "checkpoints", keep_last=recipe.checkpoint.keep_last,
                           keep_every=recipe.checkpoint.keep_every, log=log), about)
    _tell(run, directory, log)
    _restore(run, log)
    return run


class Loop:
    """The training loop. Step k is dispatched before the metrics of step k-1 are read."""

    def __init__(self, run: Run, writer: MetricsWriter):
        self.run_, self.writer = run, writer
        self.pending: tuple[int, Metrics, float, float] | None = None
        self.progress: Progress | None = None
        self.tokens = run.about["data"].get("tokens", 0)  # trained before this start
        self.began = time.monotonic()

    def run(self, start: int, end: int, stop: StopSignal) -> str:
        """Runs steps [start, end) and leaves the state in the run. "done", or "stopped" and saved."""
        run, recipe = self.run_, self.run_.recipe
        if start >= end or stop.due(start):  # nothing left to do, or asked to stop before anything began
            return "done" if start >= end else "stopped"
        steps, state = recipe.train.steps, run.state
        run.state = None  # the step donates it
        batches = make_batches(run.train_split, batch_size=recipe.train.batch_size, start_step=start, stop_step=end,
                               sharding=run.layout.sharding(("batch", "seq")))
        with contextlib.closing(batches), contextlib.closing(_progress(steps)) as self.progress:
            if run.compiled is None:
                _compile(run, self.writer, start)  # while the first batches are made in the background
            last = time.monotonic()
            for step in range(start + 1, end + 1):
                asked = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - asked
                state, metrics = run.compiled(state, batch)
                self._report()
                now = time.monotonic()
                self.pending, last = (step, metrics, now - last, waited), now
                stopping = stop.due(step)
                if self._due(step) or stopping or step == steps:
                    self._milestone(step, state, stopping)
                    last = time.monotonic()
                if stopping and step < steps:
                    self.progress.log(f"stopped and saved at step {step}; the same command goes on from there")
                    return "stopped"
            self._report()
            run.state = state
        return "done"

    def _due(self, step: int) -> bool:
        r = self.run_.recipe
        return any(every and step % every == 0 for every in (r.eval.every, r.checkpoint.every, r.sample.every))

    def _milestone(self, step: int, state: TrainState, stopping: bool) -> None:
        """Everything of this step, then its checkpoint: a run resumed from it need repeat none of it."""
        r, final = self.run_.recipe, step == self.run_.recipe.train.steps
        self._report()
        if final or (r.eval.every and step % r.eval.every == 0):
            self._timed(step, "eval", lambda: self._evaluate(step, state, whole=final))
        if (r.sample.every and (final or step % r.sample.every == 0)):
            self._timed(step, "sample", lambda: self._sample(step, state))
        if final or stopping or step % r.checkpoint.every == 0:
            self.writer.flush()
            about = {**self.run_.about, "data": {**self.run_.about["data"], "next_row": step * r.train.batch_size,
                                                    "tokens": self.tokens}}
            self._timed(step, "checkpoint", lambda: self.run_.checkpointer.save(state, about))

    def _report(self) -> None:
        """Reads the metrics of the step before, which waits for that step, not for the one just dispatched."""
        if self.pending is None:
            return
        (step, metrics, seconds, waited), self.pending = self.pending, None
        r = self.run_.recipe.train
        if step % r.log_every and step != r.steps:
            self.tokens += int(metrics["weight"])
            return
        values = {name: float(value) for name, value in metrics.items()}
        weight = int(values.pop("weight"))
        self.tokens += weight
        bits = bits_per_byte(values["loss"], self.run_.train_split)
        rate, share = weight / seconds, min(waited / seconds, 1.0)
        epoch = max(self.run_.train_split.epochs(step * r.batch_size).values())
        self.writer.train(step, {**values, "bits_per_byte": bits, "tokens": self.tokens, "epoch": epoch})
        flops = self.run_.model.flops_per_token(self.run_.recipe.data.seq_len)
        self.writer.timing(step, {"seconds": self.writer.seconds_before + time.monotonic() - self.began,
                                  "step_seconds": seconds, "tokens_per_second": rate, "data_wait_share": share,
                                  "model_flops_per_second": rate * flops})
        self.progress.update(step, values["loss"], bits, rate, share)

    def _timed(self, step: int, name: str, do: Callable[[], None]) -> None:
        began = time.monotonic()
        do()
        self.writer.event(step, name, time.monotonic() - began)

    def _evaluate(self, step: int, state: TrainState, whole: bool) -> None:
        run, r = self.run_, self.run_.recipe
        batch_size = r.eval.batch_size or r.train.batch_size
        for name, params in (("eval", state.params), ("eval_ema", state.ema)):
            if params is None:
                continue
            batches = eval_batches(run.heldout, batch_size, run.layout.sharding(("batch", "seq")))
            with contextlib.closing(batches):
                limited = (b for _, b in zip(range(r.eval.batches), batches, strict=False))
                result = evaluate(run.eval_fn, params, batches if whole or not r.eval.batches else limited, run.heldout)
            self.writer.eval(step, {f"{name}/{key}": value for key, value in result.items()})
            self.progress.log(f"step {step}: {name} loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits/byte, "
                              f"perplexity {result['perplexity']:.1f} over {human_count(result['tokens'])} tokens")

    def _sample(self, step: int, state: TrainState) -> None:
        run, c = self.run_, self.run_.recipe.sample
        if run.tokenizer is None:
            return
        prompts = [[run.tokenizer.bos_id, *run.tokenizer.encode(p)] for p in c.prompts]
        answers = run.generator(state.params if state.ema is None else state.ema, prompts, max_tokens=c.max_tokens,
                                sampling=Sampling(c.temperature, c.top_k, c.top_p), seed=step)
        for prompt, answer in zip(c.prompts, answers, strict=True):
            self.writer.sample(step, prompt, run.tokenizer.decode(answer))


def _compile(run: Run, writer: MetricsWriter, step: int) -> None:
    """Compiles the step before the loop, so that its time is known and its errors come first."""
    began = time.monotonic()
    shape = (run.recipe.train.batch_size, run.recipe.data.seq_len)
    sharding = run.layout.sharding(("batch", "seq"))
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
             "loss_mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in kinds.items()}
    run.compiled = run.step_fn.lower(run.spec.shapes, batch).compile()
    writer.event(step, "compile", time.monotonic() - began)


def _restore(run: Run, log: Log) -> None:
    found = run.checkpointer.restore(run.spec)
    if found is None:
        run.state = run.spec.init(run.recipe.train.seed)
        return
    run.state, about = found
    saved, now = about["data"]["fingerprint"], run.about["data"]["fingerprint"]
    if saved != now:
        raise ValueError(f"{run.workdir}: expected the data that its checkpoint was trained on ({saved[:12]}), got data "
                         f"{now[:12]}; use another --workdir or the data directory of that run")
    run.about["data"]["tokens"] = about["data"]["tokens"]
    log(f"resuming at step {int(run.state.step)}, from row {about['data']['next_row']:,} of the data")


def _check_workdir(recipe: Recipe, workdir: Path, log: Log) -> None:
    """Refuses a directory that another run was written in."""
    file = workdir / "config.json"
    if not file.exists():
        return
    bad, fine = blocking_changes(json.loads(file.read_text()), plain(recipe))
    if bad:
        raise ValueError(f"{workdir}: expected the config that this run was started with, got {'; '.join(bad)}; "
                         "use another --workdir or undo the change")
    for change in fine:
        log(f"changed since the last start: {change}")


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


def _tell(run: Run, directory: str, log: Log) -> None:
    """Says what is about to run and why, and writes it to run.json and config.json."""
    r, model, mesh = run.recipe, run.model, run.layout.mesh
    devices = mesh.devices.flatten()
    parameters = sum(math.prod(s.shape) for s in jax.tree.leaves(model.shapes))
    tokens = r.train.batch_size * r.data.seq_len
    epochs = max(run.train_split.epochs(r.train.steps * r.train.batch_size).values())
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1} or {"data": 1}
    log(f"device: {devices.size} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)")
    log(f"mesh: {', '.join(f'{a}={n}' for a, n in shape.items())}; computing in {model.dtype}")
    log(f"attention: {model.kernel} ({model.kernel_reason})")
    log(f"model: {human_count(parameters)} parameters, of which {human_count(model.embedding_parameters())} in embeddings; "
        f"vocabulary {model.config.vocab_size:,}")
    log(f"data: {human_count(run.train_split.predictions)} tokens to train on, {human_count(run.heldout.predictions)} held out, "
        f"{run.train_split.bytes / run.train_split.predictions:.2f} bytes a token ({directory})")
    log(f"run: {r.train.steps:,} steps of {human_count(tokens)} tokens, {epochs:.2f} epochs")
    if jax.process_index():
        return
    facts = {"lmjax": lmjax.__version__, "versions": lmjax.versions(),
             "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": int(devices.size)},
             "mesh": dict(mesh.shape), "attention": {"kernel": model.kernel, "reason": model.kernel_reason},
             "parameters": parameters, "embedding_parameters": model.embedding_parameters(), "tokens_per_step": tokens,
             "flops_per_token": model.flops_per_token(r.data.seq_len), "compute_dtype": str(model.dtype),
             "epochs": epochs, "steps": r.train.steps,
             "data": {"fingerprint": run.train_split.fingerprint, "directory": directory}}
    for name, value in (("run.json", facts), ("config.json", plain(r))):
        temporary = run.workdir / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(run.workdir / name)


@contextlib.contextmanager
def _claimed(workdir: Path) -> Iterator[None]:
    """Holds the directory for this run: two writers would spoil each other's files."""
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        yield
        return
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{workdir}: expected a directory that no run is using, got one that another process trains "
                             "in; wait for it or use another --workdir") from None
        yield


def _progress(steps: int) -> Any:
    return Progress(steps) if jax.process_index() == 0 else _Silent()


class _Silent:
    """Stands in for writers on processes that write nothing."""

    seconds_before = 0.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
