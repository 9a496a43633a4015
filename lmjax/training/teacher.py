"""The teacher of a distillation: found and checked early, in the step or before the training."""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from lmjax.data.batches import eval_batches
from lmjax.data.computed import ComputedMixture, Pairs
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.pipeline import Mixture
from lmjax.data.store import canonical
from lmjax.data.tokenizers import Tokenizer
from lmjax.decoding.generate import jit_on
from lmjax.errors import UserError
from lmjax.models.model import Batch
from lmjax.monitoring.units import human_seconds
from lmjax.runtime.distributed import agreed
from lmjax.tasks.distillation import IDS, LOG_P, predictions
from lmjax.tasks.task import Facts, Task
from lmjax.training.adopt import classes
from lmjax.training.checksums import checksums
from lmjax.training.pretrained import (
    Pretrained,
    check_answers,
    check_marks,
    find,
    weights_id,
)
from lmjax.training.program import make_teacher
from lmjax.training.recipe import Recipe
from lmjax.training.resume import other_teacher
from lmjax.training.run import Log, Run

WHERE = "config.distill.teacher"
METHOD = "likeliest and drawn 1"  # how the stored tokens are chosen: another way, another folder
SPOKE_EVERY = 10.0  # seconds between two lines of progress


def find_teacher(recipe: Recipe) -> Pretrained | None:
    """Finds the teacher of a recipe; None if it has none.

    Raises:
      UserError: there is no such model, or one that cannot read the rows of the recipe.
    """
    if not recipe.distill.teacher:
        return None
    found = find(recipe.distill.teacher)
    theirs, ours = found.recipe.model, recipe.model
    if theirs.family != ours.family:
        raise UserError(f"a model of the family {ours.family}, as the student is",
                        f"{found.where}, of the family {theirs.family}", "use another",
                        where=WHERE)
    if theirs.positions == "learned" and theirs.max_positions < recipe.data.seq_len:
        raise UserError(f"a model for rows of data.seq_len={recipe.data.seq_len}",
                        f"{found.where}, with {theirs.max_positions} positions",
                        "shorten the rows or use another", where=WHERE)
    theirs_reads = found.recipe.data.objective.name
    if recipe.data.objective.name == "prefix_lm" != theirs_reads:
        raise UserError("a teacher that was trained on prefix_lm, as the student is",
                        f"{found.where}, on {theirs_reads}", "use another", where=WHERE)
    check_answers(found, key="distill.teacher")
    stored, where = recipe.distill.stored_tokens, "config.distill.stored_tokens"
    if stored > theirs.vocab_size // 2:
        raise UserError(f"at most half of the teacher's {theirs.vocab_size} tokens", stored,
                        "lower it, or set 0", where=where)
    if isinstance(recipe.task, Task) and not recipe.task.writes and stored:
        raise UserError("0 for a task with classes, whose logits are few", stored, "set 0",
                        where=where)
    if stored and not _is_fixed(recipe):
        raise UserError("0 where the rows of every epoch differ "
                        f"({recipe.data.objective.name})", stored,
                        "set 0: the teacher then computes in the step", where=where)
    return found


def check_teacher(found: Pretrained, recipe: Recipe, tokenizer: Tokenizer | None, *,
                  vocab_size: int, facts: Facts | None) -> None:
    """Checks that the ids and the classes of a teacher are those of the run.

    Raises:
      UserError: they are others.
    """
    ours, theirs = (t.hash[:12] if t else "none" for t in (tokenizer, found.tokenizer))
    if ours != theirs:
        raise UserError(f"the tokenizer of the data ({ours})",
                        f"{found.where} with another ({theirs})", "prepare the data with "
                        f"data.tokenizer.path={found.where}, or use another teacher", where=WHERE)
    ids = found.recipe.model.vocab_size
    if ids < vocab_size or (tokenizer is None and ids != vocab_size):
        raise UserError(f"a model of the {vocab_size} ids of the data", f"{found.where}, of {ids}",
                        "use another", where=WHERE)
    if tokenizer and not isinstance(recipe.task, Task):
        check_marks(found, recipe.data.objective, tokenizer, key="distill.teacher")
    wanted, got = classes(facts), classes(found.about.get("task"))
    has_head = isinstance(recipe.task, Task) and not recipe.task.writes
    if has_head and wanted != got:
        raise UserError(f"a model that was trained for the same classes ({wanted})",
                        f"{found.where}, for {got or 'no task'}", "use another", where=WHERE)
    if not has_head and found.recipe.model.head.outputs:
        raise UserError("a model that scores the vocabulary", f"{found.where}, with the head of a "
                        "task", "use another", where=WHERE)


def record_of(found: Pretrained) -> dict[str, Any]:
    """What a run and its checkpoints record of a teacher."""
    return {"path": found.where, "step": found.about["step"], "id": weights_id(found)}


def with_predictions(recipe: Recipe, directory: str, split: Mixture,
                     found: Pretrained) -> ComputedMixture:
    """The training rows with what is stored of the teacher, which `add_predictions` computes."""
    config = recipe.distill
    teacher = canonical([METHOD, weights_id(found), config.stored_tokens, config.temperature])
    whole = canonical([split.fingerprint, split.stages, teacher])
    name = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return ComputedMixture(split, f"{directory}/teachers/{name}", (IDS, LOG_P),
                           length=split.fields["targets"], count=config.stored_tokens,
                           fingerprint=teacher)


def add_predictions(run: Run, found: Pretrained, log: Log, at: Callable[[], None]) -> None:
    """Computes what is stored of the teacher, as far as that is not done.

    at: called for every batch.

    Raises:
      UserError: another run stores in the same folder.
    """
    split, layout, config = run.train_split, run.layout, run.recipe.distill
    assert isinstance(split, ComputedMixture)
    split.cover(run.steps.rows(run.recipe.train.steps))
    done = agreed(lambda: split.stored)
    missing = split.missing(done)
    log(f"teacher: {config.stored_tokens} tokens of each prediction are stored of {done:,} rows in "
        f"{split.directory}, of {done + missing.num_rows():,} that the run takes")
    if not missing.num_rows():
        return
    model = make_teacher(run.recipe, layout, found.recipe.model)
    shardings = layout.tree(model.axes, model.shapes)
    params = jax.jit(model.cast, out_shardings=shardings)(found.read(model, shardings))
    predict = jit_on(layout, predictions(model, config, split.vocab_size,
                                         run.recipe.train.loss_chunk),
                     out_shardings=layout.replicated)
    size = run.recipe.eval.batch_size or run.recipe.train.batch_size
    with contextlib.closing(eval_batches(missing, size,
                                         layout.sharding(("batch", "seq")))) as batches:
        parts = _predicted(batches, functools.partial(predict, params), done, size, log, at,
                           total=missing.num_rows())
        if jax.process_index() == 0:
            split.write(parts, done, {
                "teacher": found.where, "stored_tokens": config.stored_tokens,
                "temperature": config.temperature})
        else:
            for _ in parts:
                pass
    agreed(lambda: split.stored)  # waits for process 0


def _predicted(batches: Iterable[Batch], predict: Callable[[Batch, np.ndarray], Batch], first: int,
               size: int, log: Log, at: Callable[[], None], *, total: int) -> Iterator[Pairs]:
    """What the teacher computes of each batch, with lines of progress; `first`: its first row."""
    done, began, spoke = 0, time.monotonic(), time.monotonic()
    for batch in batches:
        at()
        numbers = np.arange(first + done, first + done + size, dtype=np.int32)
        found = jax.device_get(predict(batch, numbers))
        real = min(size, total - done)
        done += real
        yield found[IDS][:real], found[LOG_P][:real]
        now = time.monotonic()
        if done == total:
            log(f"teacher: all {total:,} rows are done, in {human_seconds(now - began)}")
        elif now - spoke > SPOKE_EVERY:
            left = human_seconds((now - began) / done * (total - done))
            log(f"teacher: {done:,} of {total:,} rows, {left} left")
            spoke = now


def add_teacher(run: Run, found: Pretrained, log: Log) -> None:
    """Puts the teacher into the state of a run, and into what its checkpoints record.

    Raises:
      UserError: the run began with another one.
    """
    assert run.state is not None
    record = dict(record_of(found))
    if run.recipe.distill.stored_tokens == 0:
        model = make_teacher(run.recipe, run.layout, found.recipe.model)
        params = found.read(model, run.layout.tree(model.axes, model.shapes))
        record["checksums"] = checksums(params)
        run.state = run.spec.with_teacher(run.state, params)
    before = run.about["teacher"]  # of a resumed run, as its checkpoint has it
    if before.get("checksums", record.get("checksums")) != record.get("checksums"):
        raise other_teacher(before, record)
    run.about["teacher"] = record
    where = "what it predicts is stored with the data" if run.recipe.distill.stored_tokens else (
        "it computes in every step")
    log(f"teacher: {found.where}, step {found.about['step']:,}; {where}")
    if run.recipe.watch.statistics_every:
        log("statistics: none of activations, which are not recorded with a teacher")


def _is_fixed(recipe: Recipe) -> bool:
    """Whether the rows are the same in every epoch: nothing in them is drawn at random."""
    objective = recipe.data.objective
    return isinstance(recipe.task, Task) or objective == ObjectiveConfig(
        own_ids=objective.own_ids)
