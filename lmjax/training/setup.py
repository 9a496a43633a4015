"""Sets a run up: everything is checked, opened and placed here, before anything is compiled."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import lmjax
from lmjax.config import plain
from lmjax.data.order import Steps
from lmjax.data.preparation.prepare import prepare
from lmjax.data.tokenizers import Tokenizer, prepared_tokenizer
from lmjax.decoding.generate import Generator
from lmjax.errors import UserError
from lmjax.monitoring.goodput import ACTIVITIES
from lmjax.monitoring.health import Health
from lmjax.runtime.chips import GIB
from lmjax.runtime.devices import device_memory
from lmjax.runtime.distributed import agreed
from lmjax.runtime.files import write_whole
from lmjax.sharding import make_layout
from lmjax.tasks.distillation import as_student
from lmjax.tasks.task import Facts, Task
from lmjax.tasks.writing import WritingTask
from lmjax.training.announce import announce
from lmjax.training.best import Best
from lmjax.training.checkpoint import Checkpointer, checkpoint_steps
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.pretrained import (
    Pretrained,
    check_answers,
    find,
    make_tokenizer,
    tokenizer_text,
)
from lmjax.training.program import Program, make_model, make_program, make_teacher
from lmjax.training.recipe import Recipe
from lmjax.training.reference import add_reference
from lmjax.training.resume import begin
from lmjax.training.run import Log, Run
from lmjax.training.saved import Saved, find_saved, given_up, keep_records
from lmjax.training.saving import Saver
from lmjax.training.state import StateSpec
from lmjax.training.task_data import open_data, prepare_task
from lmjax.training.teacher import (
    add_predictions,
    add_teacher,
    check_teacher,
    find_teacher,
    record_of,
    with_predictions,
)
from lmjax.training.workdir import check_places, check_recipe
from lmjax.tree import shard_bytes

At = Callable[[int, str], None]  # (step, what begins there), as `Watchdog.at`


def set_up(recipe: Recipe, workdir: Path, log: Log,
           at: At = lambda step, doing: None) -> Run:
    """Makes a `Run` out of a recipe and a working directory: prepares data, restores the state.

    Raises:
      UserError: the recipe cannot run, or the directory holds another run. The directory's files
        are then as they were.
    """
    at(0, "setting up")
    check_places(recipe, workdir)
    teacher = find_teacher(recipe)
    _check_before_data(recipe, teacher)
    check_recipe(recipe, workdir, log)
    saved = Saved(**agreed(lambda: dataclasses.asdict(find_saved(recipe, workdir))))
    source = _source(recipe, workdir)
    at(0, "preparing data")
    directory = _data(recipe, workdir, source, log)
    add_reference(recipe, directory, source, log)
    at(0, "setting up")
    run = open_run(recipe, workdir, directory, log, teacher, lambda: Checkpointer(
        recipe.checkpoint.path(workdir), log=log, keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every))
    run.saved, run.source, run.teacher = saved, source, teacher
    facts = announce(run, directory, log) | place(run, log, at)
    cover(run, log, at)
    if jax.process_index() == 0:  # only now: a start that is refused leaves the directory as it was
        for name, value in (("run.json", facts), ("config.json", plain(recipe))):
            write_whole(workdir / name, json.dumps(value, indent=2) + "\n")
    return run


def place(run: Run, log: Log, at: At) -> dict[str, Any]:
    """Gives the run its state: that of its newest checkpoint that is whole, or its first one.

    Returns:
      The facts of `begin` for run.json.

    Raises:
      UserError: an error of `begin`.
    """
    at(0, ACTIVITIES["restore"])
    facts = begin(run, run.source, log)
    if run.teacher:
        add_teacher(run, run.teacher, log)
    _remember(run, log)
    return facts


def cover(run: Run, log: Log, at: At) -> None:
    """Computes what the teacher predicts for the rows of the run's steps, if that is stored."""
    if run.teacher and run.recipe.distill.stored_tokens:
        add_predictions(run, run.teacher, log, lambda: at(0, "preparing data"))


def _remember(run: Run, log: Log) -> None:
    """Brings saved.json up to date with what was restored; keeps the records that will be cut."""
    saved = run.saved
    gave_up = run.start < saved.step and given_up(run.recipe, saved) >= saved.step
    if gave_up and jax.process_index() == 0:
        log(f"gave up the checkpoint of step {run.saved.step}; its records are in "
            f"{keep_records(run.workdir, run.saved.step)}")
    run.saved = Saved(run.recipe.checkpoint.path(run.workdir), run.start,
                      min(saved.evaluated, run.start),
                      run.recipe.checkpoint.abandon if gave_up else saved.abandoned)
    run.note()
    run.checkpointer.completed = lambda step: run.note(step=step)


def _check_before_data(recipe: Recipe, teacher: Pretrained | None) -> None:
    """Refuses a wrong mesh, schedule or kernel before data is prepared, which may take hours."""
    if recipe.adapter.kind and not recipe.train.init_from:
        raise UserError("the model that the adapters are for", "none", "name a run, a checkpoint "
                        "or a Hugging Face directory", where="config.train.init_from")
    make_schedule(recipe.optimizer, recipe.train.steps)
    layout = make_layout(recipe.mesh)
    model = make_model(recipe, layout,
                       vocab_size=recipe.model.vocab_size or recipe.data.tokenizer.vocab_size)
    if teacher:
        theirs = make_teacher(recipe, layout, teacher.recipe.model)
        as_student(model, theirs, recipe.distill, layout)
        layout.tree(theirs.axes, theirs.shapes)


def _source(recipe: Recipe, workdir: Path) -> Pretrained | None:
    """Finds the model to start from, unless the run has a checkpoint that it will go on from."""
    abandon = recipe.checkpoint.abandon
    if not recipe.train.init_from or agreed(
            lambda: any(step > abandon for step in
                        checkpoint_steps(recipe.checkpoint.path(workdir)))):
        return None
    found = find(recipe.train.init_from)
    if not isinstance(recipe.task, WritingTask):  # its rows begin as the model's own answers do
        check_answers(found)
    return found


def _data(recipe: Recipe, workdir: Path, source: Pretrained | None, log: Log) -> str:
    """Returns the directory of the prepared data; process 0 prepares it if it is missing."""
    directory = recipe.data.directory or str(workdir.absolute() / "data")
    if isinstance(recipe.task, Task):
        agreed(lambda: prepare_task(recipe, directory, source, log))
    elif not recipe.data.synthetic:
        agreed(lambda: prepare(recipe.data, directory, make_tokenizer=make_tokenizer, log=log))
    return directory


def open_run(recipe: Recipe, workdir: Path, directory: str, log: Log, teacher: Pretrained | None,
             open_checkpoints: Callable[[], Checkpointer],
             devices: Sequence[jax.Device] | None = None) -> Run:
    """Opens the data and the checkpoints and makes the program; the run has no state yet.

    Args:
      directory: of the data.
      teacher: of a distillation.
      open_checkpoints: called once everything else is in order.
      devices: of the mesh; None: all.

    Raises:
      UserError: the recipe, the data or the devices do not fit each other.
    """
    train_split, heldout, test, facts = open_data(recipe, directory)
    tokenizer = None if recipe.data.synthetic else prepared_tokenizer(directory)
    if teacher:
        check_teacher(teacher, recipe, tokenizer, vocab_size=train_split.vocab_size, facts=facts)
        if recipe.distill.stored_tokens:
            train_split = with_predictions(recipe, directory, train_split, teacher)
    program = make_program(recipe, devices or jax.devices(), vocab_size=train_split.vocab_size,
                           fields=train_split.fields, facts=facts,
                           teacher=teacher and teacher.recipe.model)
    _check_memory(program.spec)
    generator = None if tokenizer is None or program.model.config.head.outputs else Generator(
        program.model, program.layout, end_ids=[tokenizer.eos_id],
        vocab_size=tokenizer.vocab_size)
    checkpointer = open_checkpoints()
    saver = Saver(checkpointer, recipe.checkpoint.patience_seconds, workdir, log)
    run = Run(recipe, workdir, program, train_split, heldout, tokenizer, generator, checkpointer,
              saver,
              about=_about(recipe, program, tokenizer, facts) | (
                  {"teacher": record_of(teacher)} if teacher else {}),
              steps=Steps([(0, 0, recipe.train.batch_size)]), best=Best(recipe.eval.metric),
              facts=facts, test=test,
              health=Health(recipe.watch.spikes, recipe.watch.rewind_after))
    if recipe.sample.every and generator:
        generator.check(run.prompts, recipe.sample.max_tokens)
    return run


def _about(recipe: Recipe, program: Program, tokenizer: Tokenizer | None,
           facts: Facts | None) -> dict[str, Any]:
    """Returns what every checkpoint of the run records: all that is needed to load it."""
    dim = program.model.projected_dim
    return ({} if facts is None else {"task": facts}) | ({"projected_dim": dim} if dim else {}) | {
        "recipe": plain(recipe) | {"model": plain(program.model.config)},
        "tokenizer": tokenizer_text(tokenizer),
        "versions": lmjax.versions(),
        "compute_dtype": str(program.model.dtype),
    }


def _check_memory(spec: StateSpec) -> None:
    """Refuses a state that alone fills a device; `lmjax plan` tells what a step needs besides."""
    needs, has = shard_bytes(spec.shapes), device_memory()
    if needs > has:
        raise UserError(f"weights and optimizer state within the {has / GIB:.1f} GiB of a device",
                        f"{needs / GIB:.1f} GiB", "use a smaller model or split it over more "
                        "devices (mesh.fsdp)", where="config.model")
