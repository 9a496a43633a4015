"""`lmjax train`: config and working directory in, a trained model with its story out."""

import contextlib
import math
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from lmjax.data import eval_batches, make_batches
from lmjax.decoding.sampling import Sampling
from lmjax.models.flops import flops_per_row
from lmjax.models.model import Batch
from lmjax.monitoring.goodput import FILE, KINDS, SLOW, Ledger, account, goodput_line
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.monitoring.progress import Progress
from lmjax.monitoring.slow_steps import Outliers, SlowStepLog
from lmjax.monitoring.units import human_count
from lmjax.monitoring.watch import Trace, Watchdog, write_hlo
from lmjax.reporting.report import write_report
from lmjax.runtime.chips import peak_flops
from lmjax.runtime.distributed import late_with, tell_late
from lmjax.runtime.signals import StopSignal, stop_signal
from lmjax.training.evaluate import bits_per_byte, evaluate
from lmjax.training.recipe import Recipe
from lmjax.training.setup import Log, Run, claimed, set_up
from lmjax.training.state import TrainState
from lmjax.training.step import Metrics

DATA = "waiting for data"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def train(recipe: Recipe, workdir: str | Path, log: Log = _to_stderr) -> str:
    """Trains `recipe` in `workdir`, from its newest checkpoint if there is one.

    Returns "done", or "stopped" when a signal asked it to stop (the current step is then saved).

    Raises:
      ValueError: the recipe cannot run, or the directory holds another run; before anything is compiled.
      OSError: the disk is full; what was saved stays.
    """
    workdir, began = Path(workdir), time.monotonic()
    with Watchdog(recipe.watch.stall_seconds, workdir) as watchdog, claimed(workdir):
        log = log if jax.process_index() == 0 else lambda line: None  # on a pod the first thing to wait for others
        with stop_signal() as stop:
            run = set_up(recipe, workdir, log, watchdog.at)
            start = int(run.state.step)
            with contextlib.closing(run.checkpointer):
                if start == recipe.train.steps and not run.unfinished:  # such a start is not recorded
                    log(f"finished: all {start:,} steps are done; raise train.steps to go on")
                    outcome = "done"
                else:
                    outcome = _go(run, start, time.monotonic() - began, stop, watchdog)
        if jax.process_index() == 0 and (workdir / "metrics.jsonl").stat().st_size:
            log(goodput_line(account(read_jsonl(workdir / FILE))))
            log(f"report: {write_report(workdir)}")
    return outcome


def _go(run: Run, start: int, seconds: float, stop: StopSignal, watchdog: Watchdog) -> str:
    """The steps from `start` on, with their records; `seconds` went into setting up."""
    writer = MetricsWriter(run.workdir if jax.process_index() == 0 else None, start)
    with contextlib.closing(writer):
        writer.event(start, "resume" if start else "start", seconds)
        loop = Loop(run, writer, watchdog)
        with contextlib.closing(loop.ledger):
            loop.ledger.start(start, seconds, restore=run.restore_seconds)
            outcome = loop.run(start, run.recipe.train.steps, stop)
            loop.finish()
    return outcome


class _Stopped(Exception):
    """The run was told to stop in the middle of an evaluation."""


class Loop:
    """The training loop. Step k is dispatched before the metrics of step k-1 are read."""

    def __init__(self, run: Run, writer: MetricsWriter, watchdog: Watchdog | None = None):
        self.run_, self.writer = run, writer
        self.pending: tuple[int, Metrics] | None = None  # a step that is on its way, and its metrics
        self.waited = 0.0  # seconds since `last` that went to waiting for data
        self.progress: Progress | None = None
        self.slow_log: SlowStepLog | None = None
        self.ledger = Ledger(run.workdir if jax.process_index() == 0 else None)
        self.watchdog = watchdog or Watchdog(0.0, run.workdir)
        self.slow, self.saved = Outliers(), 0  # saved: the newest step that is being
        devices = run.layout.mesh.devices
        self.peak = (peak_flops(devices.flat[0].device_kind) or math.nan) * devices.size  # FLOP/s of all, if known
        self.tokens = run.tokens
        self.began = self.last = time.monotonic()  # last: when the newest reported step was done

    def run(self, start: int, end: int, stop: StopSignal) -> str:
        """Runs steps [start, end) and leaves the state in the run. "done", or "stopped" and saved."""
        run, recipe = self.run_, self.run_.recipe
        if start >= end and not run.unfinished:
            return "done"
        self.stop, stop.deferred = stop, True
        steps, state = recipe.train.steps, run.state
        run.state = None  # the step donates it
        batches = make_batches(run.train_split, batch_size=recipe.train.batch_size, start_row=run.steps.rows(start),
                               steps=max(end - start, 1), sharding=run.layout.sharding(("batch", "seq")))
        trace = Trace(recipe.watch.profile, run.workdir)
        with (contextlib.closing(batches), contextlib.closing(trace),
              contextlib.closing(Progress(steps, quiet=jax.process_index() > 0)) as self.progress,
              contextlib.closing(SlowStepLog(self.progress.log)) as self.slow_log):
            if missed := trace.missed(start):
                self.progress.log(missed)
            if run.compiled is None and start < end:  # while the first batches are made in the background
                self._timed(start, "compile", lambda: _compile(run))
            if run.unfinished and not self._figures(start, state):
                return "stopped"
            self.last = time.monotonic()
            for step in range(start + 1, end + 1):
                batch = self._next(batches, step)
                trace.before(step)
                self.watchdog.at(step, "running the step")
                state, metrics = run.compiled(state, batch)
                self._report()
                self.pending = (step, metrics)
                if trace.after(step, metrics):
                    self.progress.log(f"step {step}: the trace is in {run.workdir / 'profile'}")
                stopping, complete = stop.due(), True
                if self._due(step) or stopping or step == steps:
                    complete = self._milestone(step, state, stopping)
                    self.last = time.monotonic()
                if (stopping and step < steps) or not complete:
                    self.progress.log(f"stopped and saved at step {step}; the same command goes on from there")
                    return "stopped"
            self._report()
            run.state = state
        return "done"

    def _next(self, batches: Iterator[Batch], step: int) -> Batch:
        """The batch of `step`. The wait for it lies before the end of the step that is on its way, and counts there."""
        self.watchdog.at(step, DATA)
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        self.waited += waited
        if waited > (SLOW - 1) * self.slow.usual:  # the others wait for this process within the step
            tell_late(step, waited)
        return batch

    def _due(self, step: int) -> bool:
        r = self.run_.recipe
        return any(every and step % every == 0 for every in (r.eval.every, r.checkpoint.every, r.sample.every))

    def _milestone(self, step: int, state: TrainState, stopping: bool) -> bool:
        """Everything of this step, then its checkpoint: a run resumed from it need repeat none of it.

        False if it was told to stop meanwhile: the next start then makes the figures of this step.
        """
        self._report()
        complete = self._figures(step, state)
        if step == self.run_.recipe.train.steps or stopping or not complete or (
                step % self.run_.recipe.checkpoint.every == 0):
            self.writer.flush()
            about = {**self.run_.about, "data": self.run_.data_state(step) | {"tokens": self.tokens},
                     "unfinished": not complete}
            self._timed(step, "checkpoint", lambda: self.run_.checkpointer.save(state, about))
            self.ledger.row()
            self.saved = step
        return complete

    def _figures(self, step: int, state: TrainState) -> bool:
        """The evaluation and the samples that are due after `step`; False if it was told to stop meanwhile."""
        r, final = self.run_.recipe, step == self.run_.recipe.train.steps
        try:
            if final or (r.eval.every and step % r.eval.every == 0):
                self._timed(step, "eval", lambda: self._evaluate(step, state, whole=final))
        except _Stopped:
            return False
        if r.sample.every and (final or step % r.sample.every == 0):
            self._timed(step, "sample", lambda: self._sample(step, state))
        return True

    def finish(self) -> None:
        """Returns once what was saved is on the disk."""
        if self.saved:
            self._timed(self.saved, "checkpoint", self.run_.checkpointer.wait)

    def _report(self) -> None:
        """Reads the metrics of the step before, which waits for that step, not for the one just dispatched."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        r = self.run_.recipe.train
        weight = int(metrics["weight"])  # returns when the step is done
        loss, norm = float(metrics["loss"]), float(metrics["param_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):  # it must not push the last good checkpoints out
            raise ValueError(f"step {step}: expected finite loss and weights, got loss {loss} and weight norm {norm}; "
                             "lower optimizer.peak_lr or clip_norm in another --workdir (the checkpoints are kept)")
        seconds, self.last = time.monotonic() - self.last, time.monotonic()
        waited, self.waited = self.waited, 0.0
        self.tokens += weight
        self.ledger.spend(step, useful=seconds - waited, data=waited)
        self._note_slow(step, seconds, waited)
        self.slow_log.tick()
        if step % r.log_every and step != r.steps:
            return
        values = {name: float(value) for name, value in metrics.items()
                  if name != "weight" and not value.ndim}
        bits = bits_per_byte(values["loss"], self.run_.train_split)
        rate, share = r.batch_size * self.run_.recipe.data.seq_len / seconds, waited / seconds
        epoch = max(self.run_.train_split.epochs(self.run_.steps.rows(step)).values())
        self.writer.train(step, {**values, "bits_per_byte": bits, "tokens": self.tokens, "epoch": epoch})
        flops = (flops_per_row(self.run_.model, self.run_.train_split.fields) * r.batch_size
                 / seconds)
        mfu = {} if math.isnan(self.peak) else {"mfu": flops / self.peak}
        self.writer.timing(step, {"seconds": self.writer.seconds_before + time.monotonic() - self.began,
                                  "step_seconds": seconds, "tokens_per_second": rate, "data_wait_share": share,
                                  "model_flops_per_second": flops, **mfu})
        self.progress.update(step, values["loss"], bits, rate, share, **mfu)

    def _note_slow(self, step: int, seconds: float, waited: float) -> None:
        """Records a step that took long, and the process whose late data kept the others waiting, if there is one."""
        usual = self.slow.usual
        if not self.slow(seconds, waited) or jax.process_index():
            return
        late = late_with(step)
        process, host = late if late else (0, socket.gethostname())
        doing = DATA if late else "running the step"
        self.writer.event(step, "slow_step", seconds - waited, process=process, host=host, doing=doing)
        self.slow_log.add((seconds - waited) / usual, f"process {process} ({host}) was {doing}")

    def _timed(self, step: int, name: str, do: Callable[[], None]) -> None:
        self.watchdog.at(step, KINDS[name])
        began = time.monotonic()
        do()
        seconds = time.monotonic() - began
        self.writer.event(step, name, seconds)
        self.ledger.spend(step, **{name: seconds})

    def _evaluate(self, step: int, state: TrainState, whole: bool) -> None:
        run, r = self.run_, self.run_.recipe
        batch_size = r.eval.batch_size or r.train.batch_size
        for name, params in (("eval", state.params), ("eval_ema", state.ema)):
            if params is None:
                continue
            batches = eval_batches(run.heldout, batch_size, run.layout.sharding(("batch", "seq")),
                                   most=0 if whole else r.eval.batches)
            with contextlib.closing(batches):
                result = evaluate(run.program.eval_fn, params, self._until_stopped(batches, step), run.heldout)
            self.writer.eval(step, {f"{name}/{key}": value for key, value in result.items()})
            self.progress.log(f"step {step}: {name} loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits/byte,"
                              f" perplexity {result['perplexity']:.1f} over {human_count(result['tokens'])} tokens")

    def _until_stopped(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        for batch in self.watchdog.each(batches, step, KINDS["eval"]):
            if self.stop.due():
                raise _Stopped
            yield batch

    def _sample(self, step: int, state: TrainState) -> None:
        run, c = self.run_, self.run_.recipe.sample
        if run.generator is None:
            return
        answers = run.generator(state.params if state.ema is None else state.ema, run.prompts, max_tokens=c.max_tokens,
                                sampling=Sampling(c.temperature, c.top_k, c.top_p), seed=step)
        for prompt, answer in zip(c.prompts, answers, strict=True):
            self.writer.sample(step, prompt, run.tokenizer.decode(answer))


def _compile(run: Run) -> None:
    """Compiles the step before the loop, so that its time is known and its errors come first."""
    lowered = run.program.traced.lower()
    run.compiled = lowered.compile()
    if run.recipe.watch.hlo and jax.process_index() == 0:
        write_hlo(run.recipe.watch.hlo, lowered, run.compiled)
