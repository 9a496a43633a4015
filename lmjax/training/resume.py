"""How a run starts: from its newest checkpoint, a pretrained model, or random weights."""

import time
from typing import Any

from lmjax.data.order import Steps
from lmjax.errors import UserError, first_line
from lmjax.runtime.distributed import agreed
from lmjax.tasks.task import Task
from lmjax.training.adopt import adopted, comparable, has_new_tokens
from lmjax.training.announce import announce_epochs, dtype_reason
from lmjax.training.best import Best, read_best, restored
from lmjax.training.changes import check_schedule
from lmjax.training.checkpoint import About
from lmjax.training.checksums import checksums
from lmjax.training.pretrained import Pretrained, check_marks, check_start, find, read_base
from lmjax.training.recipe import recorded_recipe
from lmjax.training.run import Log, Run
from lmjax.training.saved import given_up
from lmjax.training.state import TrainState
from lmjax.training.workdir import same_run
from lmjax.tree import split_tree

# Keys of a checkpoint's `about` that say which weights the run began with.
STARTED_FROM = ("init_from", "base", "huggingface", "teacher")


def begin(run: Run, source: Pretrained | None, log: Log) -> dict[str, Any]:
    """Restores `run` from its newest checkpoint; if there is none, makes its first state.

    Args:
      run: its state, its start step and its place in the data are set here.
      source: the model whose weights a new run starts from; None: random weights.
      log: gets lines that say where the run starts, and which rows it will train on.

    Returns:
      The facts of `announce_epochs` for run.json: the number of epochs.

    Raises:
      UserError: the checkpoint or the source does not fit the run.
    """
    began = time.monotonic()
    found = run.checkpointer.restore(run.spec, lambda about: _check(run, about),
                                     given_up(run.recipe, run.saved))
    if found is None:
        run.start, run.tokens, run.best = 0, 0, Best(run.recipe.eval.metric)
        run.health.restore({})
        if source:
            grows = has_new_tokens(run, source)
            check_start(source, comparable(run, source), None if grows else run.tokenizer,
                        has_adapters=bool(run.model.adapter.kind))
            if grows and run.tokenizer and source.tokenizer:
                more = run.tokenizer.vocab_size - source.tokenizer.vocab_size
                log(f"vocabulary: {more:,} new tokens; their rows of the embedding and of the head "
                    "begin as the mean of the old rows")
            if run.tokenizer and not isinstance(run.recipe.task, Task):
                check_marks(source, run.recipe.data.objective, run.tokenizer)
        # Refuses a run of too many epochs: better before the weights are made than after.
        facts = announce_epochs(run, log)
        if source is None:
            run.state = run.spec.init(run.recipe.train.seed)
        else:
            run.state = _from_source(run, source, log)
        return facts
    run.restore_seconds = time.monotonic() - began
    run.state, about = found
    run.start = about["step"]
    run.health.restore(about.get("health", {}))
    # A step is saved before it is evaluated, and the evaluation may have failed or been stopped.
    run.unfinished = about.get("unfinished", False) and run.saved.evaluated < run.start
    _restore_best(run, about)
    run.about |= {key: about[key] for key in STARTED_FROM if key in about}
    if "base" in about:
        run.state = _with_base(run, about)
    data, step, size = about["data"], run.start, run.recipe.train.batch_size
    # `Steps` lists the changes of batch size. The steps up to this one keep their batch sizes; the
    # next steps have that of the recipe.
    before = Steps.restored(data, step)
    run.steps, run.tokens = before.resumed(step, size), data["tokens"]
    log(f"resuming at step {step}, from row {data['next_row']:,} of the data")
    if before.changes[-1].size != size:
        log(f"batch size: {before.changes[-1].size} rows up to step {step}, {size} from there on; "
            "the learning rate and other schedules depend only on the step number")
    return announce_epochs(run, log)


def _restore_best(run: Run, about: About) -> None:
    """Restores what the evaluations up to the step `run.start` have found best."""
    recipe, step = run.recipe, run.start
    last = agreed(lambda: read_best(run.checkpointer.directory))
    run.remember(restored(recipe.eval.metric, step, about.get("best", {}), last))
    due = step == recipe.train.steps or (recipe.eval.every > 0 and step % recipe.eval.every == 0)
    if recipe.eval.metric and due and run.best.evaluated < step:
        # best.json is of a later evaluation, which is to be repeated, or it is lost. The outcome of
        # this step's evaluation is in neither record, so the step is evaluated once more.
        run.unfinished = about.get("unfinished", False)


def _check(run: Run, about: About) -> None:
    """Checks that `run` may resume from a checkpoint, of which `about` is the record.

    Raises:
      UserError: the recipe has changed in more than the keys that may change; the checkpoint has
        more steps than the recipe asks for; the new schedule would have given an earlier step
        another learning rate; the rows so far were of other data; or the dtype differs.
    """
    same_run(run.workdir, about["recipe"], run.about["recipe"])
    _check_source(run, about)
    before, now = about.get("teacher", {}), run.about.get("teacher", {})
    if run.recipe.distill.stored_tokens and before.get("id") != now.get("id"):
        raise other_teacher(before, now)
    step, steps = about["step"], run.recipe.train.steps
    if step > steps:
        raise UserError(f"at least the {step:,} steps that {run.workdir} has done", f"{steps:,}",
                        "raise it, or use another --workdir", where="config.train.steps")
    check_schedule(recorded_recipe(about["recipe"]), run.recipe, step)
    saved, row = about["data"]["fingerprint"], about["data"]["next_row"]
    data = run.train_split.fingerprint_of(row)
    if saved != data:
        fix = ("use another --workdir, the data directory of that run, or data.stages that are the "
               f"same before row {row:,}")
        own_ids = recorded_recipe(about["recipe"]).data.objective.own_ids
        if own_ids != run.recipe.data.objective.own_ids:
            fix = (f"set config.data.objective.own_ids={str(own_ids).lower()}: the tokenizer's own "
                   f"mask, sentinels and modes were {'' if own_ids else 'not '}used so far")
        raise UserError(f"the data that its checkpoint was trained on ({saved[:12]})",
                        f"data {data[:12]}", fix, where=str(run.workdir))
    saved, dtype = about["compute_dtype"], run.about["compute_dtype"]
    if saved != dtype:  # for example because "auto" meets another kind of device
        raise UserError(f"to compute in {saved}, as when this run began",
                        f"{dtype} ({dtype_reason(run)})",
                        f"set config.train.compute_dtype={saved} or use another --workdir",
                        where=str(run.workdir))


def other_teacher(before: dict[str, Any], now: dict[str, Any]) -> UserError:
    """The error of a run whose teacher, as recorded, is no longer the one that it began with."""
    return UserError(f"the teacher that this run began with, {before.get('path')}",
                     f"{now.get('path')}, which has other weights",
                     "bring it back, or use another --workdir", where="config.distill.teacher")


def _check_source(run: Run, about: About) -> None:
    """Checks that train.init_from, if it names another place, holds what the run began with.

    Raises:
      UserError: it does not, or the run began without it.
    """
    before, now = about["recipe"]["train"].get("init_from", ""), run.recipe.train.init_from
    if before == now or "base" in about:  # `_with_base` reads it in any case
        return
    got, began = repr(now), about.get("init_from")
    if now and began:
        try:
            shardings = run.spec.shardings
            params = find(now).read(run.model, shardings.whole(shardings.params))
        except UserError as error:
            got = f"{now} ({first_line(error)})"
        else:
            if checksums(params) == began["checksums"]:
                return
            got = f"{now} with others"
    raise UserError(f"the weights that this run began with ({before or 'random ones'})", got,
                    f"set train.init_from={before} again, or use another --workdir",
                    where="config.train.init_from")


def _from_source(run: Run, source: Pretrained, log: Log) -> TrainState:
    """Returns the state before the first step, with the weights of `source`."""
    params, new = adopted(run, source)
    kept, has_adapters = params, bool(run.model.adapter.kind)
    if has_adapters and run.spec.frozen is not None:
        kept, _ = split_tree(params, run.spec.frozen.accepts)
    # Checkpoints of adapters hold none of the weights beside them: they name their base.
    run.about["base" if has_adapters else "init_from"] = {
        "path": source.where, "step": source.about["step"], "checksums": checksums(kept)}
    if "huggingface" in source.about:  # an export keeps the settings of the imported model
        run.about["huggingface"] = source.about["huggingface"]
    rest = "they stay as they are beside the adapters" if has_adapters else (
        "the optimizer state starts fresh")
    log(f"weights: those of {source.where}, step {source.about['step']:,}; {rest}"
        + (f"; new: {', '.join(new)}" if new else ""))
    return run.spec.start(params, run.recipe.train.seed)


def _with_base(run: Run, about: About) -> TrainState:
    """Returns the restored state of adapters with the weights of their base.

    Raises:
      UserError: the weights are not there, or are others.
    """
    plain, now = run.model.plain, run.recipe.train.init_from
    moved = now != about["recipe"]["train"]["init_from"]
    base = read_base(about["base"], plain, run.layout.tree(plain.axes, plain.shapes),
                     now if moved else "",
                     fix="bring them back, or set train.init_from to where they are",
                     where=str(run.workdir))
    assert run.state is not None
    return run.spec.on_base(run.state, base)
