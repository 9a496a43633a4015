"""What a run records while it trains: metrics, timings, events, ledger and progress line."""

import contextlib
import math
import socket
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from lmjax.models.flops import flops_per_row
from lmjax.models.model import Batch
from lmjax.monitoring.goodput import ACTIVITIES, SLOW_FACTOR, Ledger
from lmjax.monitoring.health import BadStep, Rewind
from lmjax.monitoring.metrics import MetricsWriter
from lmjax.monitoring.progress import Progress
from lmjax.monitoring.slow_steps import Outliers, SlowStepLog
from lmjax.monitoring.watchdog import Watchdog
from lmjax.runtime.chips import peak_flops
from lmjax.runtime.distributed import late_with, tell_late
from lmjax.tasks.task import Task
from lmjax.training.evaluate import bits_per_byte, bits_unit, summary
from lmjax.training.replicas import HASHES, described, differing, hashes
from lmjax.training.run import Run
from lmjax.training.state import TrainState
from lmjax.training.statistics import statistics_of
from lmjax.training.step import LIMITS, Metrics

WAITING = "waiting for data"
RUNNING = "running the step"


class Records:
    """Measures what the loop does and writes it down; process 0 writes, the others only measure.

    Args:
      run: its workdir gets the files.
      start: the step that this start goes on from.
      setup_seconds: how long setting up took.
      watchdog: told of everything that the loop begins.
    """

    def __init__(self, run: Run, start: int, setup_seconds: float = 0.0,
                 watchdog: Watchdog | None = None):
        writes = jax.process_index() == 0
        self.run, self.tokens = run, run.tokens
        self.writer = MetricsWriter(run.workdir if writes else None, start)
        self.ledger = Ledger(run.workdir if writes else None)
        self.progress = Progress(run.recipe.train.steps, quiet=not writes,
                                 unit=bits_unit(run.train_split))
        self.watchdog = watchdog or Watchdog(0.0, run.workdir)
        self._outliers = Outliers()
        self._slow_steps = SlowStepLog(self.progress.log)
        devices = run.layout.mesh.devices
        # FLOP/s of all devices; NaN if unknown
        self._peak = (peak_flops(devices.flat[0].device_kind) or math.nan) * devices.size
        self._waited = 0.0  # seconds of waiting for data since `_last`
        self._began = self._last = time.monotonic()  # _last: when the last logged step was done
        self.writer.event(start, "resume" if start else "start", setup_seconds)
        self.ledger.start(start, setup_seconds, restore=run.restore_seconds)

    def close(self) -> None:
        """Writes what is left and closes the files."""
        # Closed from last to first, each one even if another fails: stderr may be a broken pipe.
        with contextlib.ExitStack() as stack:
            for part in (self.writer, self.ledger, self.progress, self._slow_steps):
                stack.callback(part.close)

    @contextlib.contextmanager
    def timed(self, step: int, kind: str) -> Iterator[None]:
        """Records the block's seconds as an event of `kind`, one of `ACTIVITIES`, at `step`."""
        self.watchdog.at(step, ACTIVITIES[kind])
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.writer.event(step, kind, seconds)
        self.ledger.spend(step, **{kind: seconds})

    def restart_clock(self) -> None:
        """Restarts the step timer, because evaluating and saving have their own events."""
        self._last = time.monotonic()

    def next_batch(self, batches: Iterator[Batch], step: int) -> Batch:
        """Returns the batch of `step` and counts the wait for it.

        The step before is still running then, so the wait counts as part of that step's time.
        """
        self.watchdog.at(step, WAITING)
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        self._waited += waited
        # Then the other processes wait for this one within the step.
        if waited > (SLOW_FACTOR - 1) * self._outliers.usual:
            tell_late(step, waited)
        self.watchdog.at(step, RUNNING)
        return batch

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Waits until `step` is done, then writes its metrics and timings.

        Raises:
          Rewind: the run has to go back to a checkpoint. Raised before the step is saved, so that
            it does not push the last good checkpoints out.
        """
        train, health = self.run.recipe.train, self.run.health
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])  # waits for the step
        self.check_replicas(step, metrics.get(HASHES))
        bad = health.judge(step, loss, norm)
        weight = 0 if bad and bad.skipped else int(metrics["weight"])
        if not math.isfinite(weights := float(metrics["param_norm"])):
            raise Rewind(step, f"weight norm {weights}")
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        self.tokens += weight
        self.ledger.spend(step, useful=seconds - waited, data=waited)
        self._note_slow(step, seconds, waited)
        self._slow_steps.tick()
        if bad:
            self._note_bad(bad)
        self.writer.statistics.append(step, statistics_of(metrics))
        skipped = {"skipped": health.skipped} if bad and bad.skipped else {}
        if step % train.log_every and step != train.steps and not skipped:
            return
        values = {name: float(value) for name, value in metrics.items()
                  if name != "weight" and not value.ndim}
        bits = bits_per_byte(values["loss"], self.run.train_split)
        task = self.run.recipe.task
        rows = self.run.steps.rows(step) // (task.samples if isinstance(task, Task) else 1)
        epoch = max(self.run.train_split.epochs(rows).values())
        self.writer.train(step, {**values, **bits, "tokens": self.tokens,
                                 "epoch": epoch, **skipped})
        row_flops = flops_per_row(self.run.model, self.run.train_split.fields,
                                  self.run.spec.is_frozen)
        flops = row_flops * train.batch_size / seconds
        mfu = {} if math.isnan(self._peak) else {"mfu": flops / self._peak}
        rate, share = train.batch_size * self.run.recipe.data.seq_len / seconds, waited / seconds
        self.writer.timing(step, {"seconds": self.writer.seconds_before + now - self._began,
                                  "step_seconds": seconds, "tokens_per_second": rate,
                                  "data_wait_share": share, "model_flops_per_second": flops, **mfu})
        self.progress.update(step, values["loss"], bits.get("bits_per_byte"), rate, share, **mfu)

    def rewound(self, step: int, cause: Rewind, rows: tuple[int, int], seconds: float) -> None:
        """Writes that the run went back to `step`, and which rows it leaves out."""
        first, end = rows
        self.writer.event(step, "rewind", seconds, after=cause.step, why=cause.why,
                          rows=f"{first}:{end}")
        without = f" without the rows {first:,} to {end - 1:,}" if end > first else ""
        self.progress.log(f"step {cause.step}: {cause.why}; went back to step {step}{without}")

    def check_replicas(self, step: int, found: jax.Array | None) -> None:
        """Compares what the devices hold after `step`; `found` is what `replicas.hashes` gave.

        Raises:
          Rewind: they differ. The devices and the arrays are written down first.
        """
        if not (bad := differing(found, self.run.spec.shapes)):
            return
        for item in bad:
            self.writer.event(step, "replica_differs", 0.0, array=item.array,
                              device=item.device.id, process=item.device.process_index,
                              majority=item.is_sure)
        raise Rewind(step, described(bad), of_device=True)

    def _note_bad(self, bad: BadStep) -> None:
        """Writes that a step was skipped or is a spike, with its rows.

        Raises:
          Rewind: it is a reason to go back.
        """
        first, end = self.run.steps.of(bad.step)
        kind = "skipped" if bad.skipped else "spike"
        self.writer.event(bad.step, kind, 0.0, why=bad.what, rows=f"{first}:{end}")
        self.progress.log(f"step {bad.step}: {bad.what}" + (
            f"; nothing was learned from its rows, {first:,} to {end - 1:,}" * bad.skipped))
        if cause := self.run.health.rewinds(bad):
            raise cause

    def evaluated(self, step: int, name: str, found: Mapping[str, float]) -> None:
        """Writes the figures of an evaluation; `name` says of what: eval, eval_ema, test."""
        self.writer.eval(step, {f"{name}/{key}": value for key, value in found.items()})
        best = ""
        if "best_step" in found:
            said = "the weights of the best step" if name.startswith("test") else "best at step"
            best = f", {said} {found['best_step']:,.0f}"
        self.progress.log(f"step {step}: {name} {summary(found, self.run.heldout)}{best}")

    def ends_early(self, step: int) -> None:
        """Writes that the run ends at `step`, and why."""
        best = self.run.best
        self.writer.event(step, "ended_early", 0.0, metric=best.metric, value=best.value,
                          best_step=best.step, waited=best.waited)
        self.progress.log(f"step {step}: ends early: {best.waited} evaluations found nothing "
                          f"better than {best}")

    def _note_slow(self, step: int, seconds: float, waited: float) -> None:
        """Records a step that took unusually long, and which process kept the others waiting."""
        usual = self._outliers.usual
        if not self._outliers(seconds, waited) or jax.process_index():
            return
        late = late_with(step)
        process, host = late if late else (0, socket.gethostname())
        doing = WAITING if late else RUNNING
        self.writer.event(step, "slow_step", seconds - waited, process=process, host=host,
                          doing=doing)
        self._slow_steps.add((seconds - waited) / usual,
                             f"process {process} ({host}) was {doing}")


def step_limits(run: Run, step: int) -> Batch:
    """What the batch of `step` has beside its rows: above what a step changes nothing."""
    if run.recipe.watch.spikes != "skip":
        return {}
    place = run.layout.replicated
    # Of a value of the host, `device_put` would compare the copies of all processes each time.
    return {name: jax.make_array_from_callback(
                (), place, np.asarray(limit, np.float32).__getitem__)
            for name, limit in zip(LIMITS, run.health.limits(step), strict=True)}


def compared(run: Run, step: int, state: TrainState) -> Metrics:
    """What is computed beside the metrics of `step` where devices are compared after it."""
    every = run.recipe.watch.compare_every
    found = hashes(state) if every and step % every == 0 else None
    return {} if found is None else {HASHES: found}
