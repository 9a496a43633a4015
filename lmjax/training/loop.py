"""The training loop: evaluate, sample, save, take a batch, run the step, log; then the next step.

`train` makes a trained model in a working directory out of a recipe. It is all of `lmjax train`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from lmjax.data.batches import eval_batches, make_batches
from lmjax.data.pipeline import Split
from lmjax.decoding.sampling import Sampling
from lmjax.errors import UserError
from lmjax.models.model import Batch
from lmjax.monitoring.goodput import ACTIVITIES, LEDGER_FILE, account, goodput_line
from lmjax.monitoring.health import Rewind
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.profiling import Profiler, write_hlo
from lmjax.monitoring.progress import to_stderr
from lmjax.monitoring.watchdog import Watchdog
from lmjax.reporting.report import write_report
from lmjax.runtime.signals import StopSignal, stop_signal
from lmjax.tasks.grpo import Grpo
from lmjax.training.answers import answers_of, written
from lmjax.training.checksums import non_finite
from lmjax.training.evaluate import evaluate
from lmjax.training.recipe import Recipe
from lmjax.training.records import Records, compared, step_limits
from lmjax.training.replicas import hashes
from lmjax.training.rewind import rewind
from lmjax.training.rollout import rollout
from lmjax.training.run import Log, Run
from lmjax.training.setup import set_up
from lmjax.training.state import TrainState
from lmjax.training.step import StepFn
from lmjax.training.workdir import claimed

T = TypeVar("T")


def train(recipe: Recipe, workdir: str | Path, log: Log = to_stderr) -> str:
    """Trains `recipe` in `workdir`, from its newest checkpoint if there is one.

    Returns:
      "done", or "stopped" when a signal asked the run to stop; the current step is then saved.

    Raises:
      UserError: the recipe cannot run, or the directory holds another run. Nothing has been
        compiled then.
      OSError: the disk is full; earlier checkpoints stay.
    """
    workdir, began = Path(workdir), time.monotonic()
    with Watchdog(recipe.watch.stall_seconds, workdir) as watchdog, claimed(workdir):
        # Asking for the process index waits for the other processes, so the watchdog comes first.
        log = log if jax.process_index() == 0 else lambda line: None
        with stop_signal() as stop:
            run = set_up(recipe, workdir, log, watchdog.at)
            with contextlib.closing(run.checkpointer):
                over = run.start == recipe.train.steps or run.out_of_patience
                if over and not run.unfinished:
                    log(f"finished: {why_finished(run)}")
                    outcome = "done"
                else:
                    outcome = _train_on(run, stop, watchdog, time.monotonic() - began, log)
        if jax.process_index() == 0 and (workdir / "metrics.jsonl").stat().st_size:
            log(goodput_line(account(read_jsonl(workdir / LEDGER_FILE))))
            try:
                log(f"report: {write_report(workdir)}")
            except UserError as error:  # the run itself is done
                log(f"no report: {error}")
    return outcome


def _train_on(run: Run, stop: StopSignal, watchdog: Watchdog, seconds: float, log: Log) -> str:
    """Trains to the end, from a checkpoint again where a `Rewind` asks for it.

    Args:
      seconds: how long setting up took.

    Returns:
      The outcome of `run_steps`.
    """
    cause, rows = None, (0, 0)
    while True:
        records = Records(run, run.start, seconds, watchdog)
        with contextlib.closing(records):
            if cause:
                records.rewound(run.start, cause, rows, seconds)
            try:
                return run_steps(run, records, stop, run.start, run.recipe.train.steps)
            except Rewind as found:
                cause = found.with_traceback(None)  # its frames hold the arrays of the state
        began = time.monotonic()
        rows = rewind(run, cause, log, watchdog.at)
        seconds = time.monotonic() - began


def why_finished(run: Run) -> str:
    """Says why there is nothing to do any more, and how to go on all the same."""
    if run.start == run.recipe.train.steps:
        return f"all {run.start:,} steps are done; raise train.steps to go on"
    return (f"it ended early at step {run.start:,}: {run.best.waited} evaluations found nothing "
            f"better than {run.best}; raise eval.patience to go on")


def run_steps(run: Run, records: Records, stop: StopSignal, start: int, end: int) -> str:
    """Trains from step `start` to step `end` and leaves the state in `run`.

    Returns:
      "done", or "stopped" when a signal asked for it; the current step is then saved.
    """
    batches = make_batches(run.train_split, batch_size=run.recipe.train.batch_size,
                           start_row=lambda i: run.steps.rows(start + i), steps=max(end - start, 1),
                           sharding=run.layout.sharding(("batch", "seq")))
    profiler = Profiler(run.recipe.watch.profile, run.workdir)
    with contextlib.closing(batches), contextlib.closing(profiler):
        if missed := profiler.missed(start):
            records.progress.log(missed)
        if run.compiled is None and start < end:  # while the first batches are made
            with records.timed(start, "compile"):
                run.compiled = _compile(run)
        stop.defer()  # from here on there may be steps to save
        return _loop(run, records, stop, range(start, end + 1), batches, profiler)


def _loop(run: Run, records: Records, stop: StopSignal, steps: range, batches: Iterator[Batch],
          profiler: Profiler) -> str:
    """The loop itself. Step k is dispatched before the metrics of step k-1 are read."""
    state = run.state
    assert state is not None
    run.state = None  # the step donates its arrays
    on_its_way = None  # the newest step and its metrics, until they are logged
    saved: int | None = None  # the newest step that this start has saved
    records.restart_clock()
    for step in steps:  # `state` is the state after `step` steps
        first = step == steps.start
        stopping = not first and stop.due()
        due = _due_after(run, step, first, stopping)
        complete = True
        if any(due):
            if on_its_way:  # all of them wait for this step anyway
                records.log_step(*on_its_way)
                on_its_way = None
            complete, saves = _between_steps(run, records, stop, step, state, due)
            saved = step if saves else saved
            records.restart_clock()
        over = step == steps[-1] or run.out_of_patience
        stopped = not complete or (stopping and not over)
        if stopped or over:
            break

        # Take a batch and run the next step. While it runs, log the step before it.
        batch = records.next_batch(batches, step + 1)
        if isinstance(run.recipe.task, Grpo):  # a batch of the model's own answers instead
            batch = rollout(run, state.whole(state.params), step + 1)
        profiler.before(step + 1)
        state, metrics = run.step_of(step + 1)(state, {**batch, **step_limits(run, step + 1)})
        if on_its_way:
            records.log_step(*on_its_way)
        on_its_way = step + 1, {**metrics, **compared(run, step + 1, state)}
        run.saver.note()
        if traced := profiler.after(step + 1, metrics):
            records.progress.log(f"step {step + 1}: {traced}")

    if on_its_way:
        records.log_step(*on_its_way)
    run.state = state
    return _end(run, records, step, saved, stopped)


class _Due(NamedTuple):
    """What is done after a step, before the next one."""

    evaluates: bool
    samples: bool
    saves: bool
    first: bool  # the step is the one that this start goes on from: it is saved already
    compiles: bool  # the next step is the first one with statistics


def _due_after(run: Run, step: int, first: bool, stopping: bool) -> _Due:
    recipe, final = run.recipe, step == run.recipe.train.steps
    # After a restart, the first state came from the checkpoint. Its evaluation is done as well,
    # unless the run is `unfinished`.
    to_evaluate = not first or run.unfinished
    return _Due(
        evaluates=to_evaluate and (final or _due(recipe.eval.every, step)),
        samples=to_evaluate and run.generator is not None and (
            final and recipe.sample.every > 0 or _due(recipe.sample.every, step)),
        saves=not first and (final or stopping or _due(recipe.checkpoint.every, step)
                             or run.saver.due), first=first,
        compiles=not (final or stopping) and run.takes_statistics(step + 1)
        and run.compiled_with_statistics is None)


def _between_steps(run: Run, records: Records, stop: StopSignal, step: int, state: TrainState,
                   due: _Due) -> tuple[bool, bool]:
    """Does what is due after `step`.

    Returns:
      Whether evaluation and samples are complete, and whether a save of the step has begun.
    """
    # Save first: an evaluation that fails loses no training. The next start evaluates again.
    saves = due.saves and _save(run, records, step, state,
                                unfinished=due.evaluates or due.samples)
    complete = not due.evaluates or _evaluate(run, records, stop, step, state)
    ends_early = due.evaluates and complete and run.out_of_patience
    if complete and (due.samples or ends_early and run.generator and run.recipe.sample.every):
        _sample(run, records, step, state)
    # An evaluation may also be a reason to save: it is incomplete, the last one, or the best.
    keeps = run.recipe.checkpoint.keep_best and run.best.step == step
    saves_now = not (due.saves or due.first) and (not complete or ends_early or keeps)
    if saves_now:
        saves = _save(run, records, step, state, unfinished=not complete)
    if complete and (due.evaluates or due.samples):
        records.writer.flush()  # what is noted as done is on the disk
        run.note(evaluated=step)
    if due.compiles and complete and not run.out_of_patience:
        with records.timed(step, "compile"):
            run.step_of(step + 1)
    return complete, saves


def _end(run: Run, records: Records, step: int, saved: int | None, stopped: bool) -> str:
    """Waits until the newest state is saved, if it has to be, and returns the outcome."""
    state = run.state
    assert state is not None
    is_failing = run.saver.is_failing
    if saved is not None or is_failing:
        with records.timed(step, "checkpoint"):  # saving goes on in the background until here
            run.saver.finish(lambda: _save(run, records, step, state, unfinished=stopped))
    if stopped:
        done = "stopped and saved" if saved == step or is_failing else "stopped"
        records.progress.log(f"{done} at step {step}; the same command goes on from there")
    return "stopped" if stopped else "done"


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class _Stopped(Exception):
    """A signal asked the run to stop in the middle of an evaluation."""


def _evaluate(run: Run, records: Records, stop: StopSignal, step: int, state: TrainState) -> bool:
    """Evaluates the weights and their moving average; False if a signal stopped it midway.

    After the last step the whole held-out set is evaluated. With a metric, that step is evaluated
    as the steps before it are, too, so that their values compare. The test set is evaluated with
    the weights of the best step, if its checkpoint is kept.
    """
    recipe, judged = run.recipe, "eval" if state.ema is None else "eval_ema"
    size = recipe.eval.batch_size or recipe.train.batch_size

    def until_stopped(batches: Iterator[T]) -> Iterator[T]:
        for batch in records.watchdog.each(batches, step, ACTIVITIES["eval"]):
            run.saver.note()
            if stop.due():
                raise _Stopped
            yield batch

    def each_group(most: int, of: str, split: Split, state: TrainState = state) -> None:
        for name, params in ((of, state.params), (f"{of}_ema", state.ema)):
            if params is None:
                continue
            answers = answers_of(run, split, size, most)
            batches = eval_batches(split, size, run.layout.sharding(("batch", "seq")), most=most)
            with contextlib.closing(batches):
                found = evaluate(run.program.eval_fn, state.whole(params),
                                 until_stopped(batches), split, answers or (lambda sums: None))
            if answers:
                found |= answers.figures(
                    run.workdir / "answers" / f"{name}.jsonl",
                    functools.partial(written, run, state.whole(params), each=until_stopped))
            if name == judged and recipe.eval.metric:
                if most == recipe.eval.batches:
                    run.remember(run.best.after(step, found[recipe.eval.metric]))
                found["best_step"] = run.best.step
            if of == "test" and recipe.checkpoint.keep_best and run.best.step:
                found["best_step"] = run.best.step  # whose weights these are
            records.evaluated(step, name, found)

    with records.timed(step, "eval"):
        final = step == recipe.train.steps
        try:
            if not final or recipe.eval.metric:
                each_group(recipe.eval.batches, "eval", run.heldout)
            if run.out_of_patience:
                records.ends_early(step)
            if (final or run.out_of_patience) and (recipe.eval.batches or not recipe.eval.metric):
                each_group(0, "eval", run.heldout)
            if (final or run.out_of_patience) and run.test is not None:
                each_group(0, "test", run.test, run.best_of(step, state))
        except _Stopped:
            return False
    return True


def _sample(run: Run, records: Records, step: int, state: TrainState) -> None:
    """Continues the recipe's prompts, from the averaged weights if the run keeps them."""
    assert run.generator is not None and run.tokenizer is not None
    sample = run.recipe.sample
    params = state.whole(state.params if state.ema is None else state.ema)
    with records.timed(step, "sample"):
        answers = run.generator(params, run.prompts, max_tokens=sample.max_tokens, seed=step,
                                sampling=Sampling(sample.temperature, sample.top_k, sample.top_p))
        for prompt, answer in zip(sample.prompts, answers, strict=True):
            records.writer.sample(step, prompt, run.tokenizer.decode(answer))


def _save(run: Run, records: Records, step: int, state: TrainState, unfinished: bool) -> bool:
    """Saves the state; if `unfinished`, the next start evaluates and samples the step.

    Returns:
      Whether the save has begun; if not, it is tried again later.

    Raises:
      Rewind: the state is not finite, or its replicas differ.
    """
    if bad := non_finite((state.params, state.opt_state, state.ema)):
        raise Rewind(step, f"{bad} of the state is not finite")
    if run.recipe.watch.compare_every and not _due(run.recipe.watch.compare_every, step):
        records.check_replicas(step, hashes(state))  # of other steps, `log_step` has done it
    records.writer.flush()  # the files hold everything up to this step before the checkpoint counts
    about = {**run.about, "data": run.data_state(step) | {"tokens": records.tokens},
             "unfinished": unfinished, "health": run.health.state()}
    if run.best.metric:
        about["best"] = dataclasses.asdict(run.best)
    with records.timed(step, "checkpoint"):
        begun = run.saver.save(state, about)
    run.health.forgives = False  # as in a run that goes on from this checkpoint
    records.ledger.row()
    return begun


def _compile(run: Run) -> StepFn:
    """Compiles the step before the loop: its time is known, and its errors come first."""
    lowered = run.program.traced.lower()
    compiled = lowered.compile()
    if run.recipe.watch.hlo and jax.process_index() == 0:
        write_hlo(run.recipe.watch.hlo, lowered, compiled)
    return compiled
