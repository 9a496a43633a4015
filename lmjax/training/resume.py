"""The state that a start begins with: from the newest checkpoint, a pretrained model, or a seed."""

import time
from typing import Any

from lmjax.data.order import Steps
from lmjax.errors import UserError
from lmjax.training.announce import announce_epochs, dtype_reason
from lmjax.training.changes import check_schedule
from lmjax.training.checkpoint import About
from lmjax.training.checksums import checksums
from lmjax.training.pretrained import Pretrained, check_start
from lmjax.training.recipe import build_recipe
from lmjax.training.run import Log, Run
from lmjax.training.state import TrainState
from lmjax.training.workdir import same_run

# Keys of a checkpoint's `about` that say which weights the run began with.
STARTED_FROM = ("init_from", "huggingface")


def begin(run: Run, source: Pretrained | None, log: Log) -> dict[str, Any]:
    """Restores `run` from its newest checkpoint, or else makes its first state.

    Args:
      run: gets its state and its place in the data.
      source: the weights of the first state; None: random ones.
      log: told what the run goes on from.

    Returns:
      Facts for run.json.

    Raises:
      UserError: the checkpoint or the source does not fit the run.
    """
    began = time.monotonic()
    found = run.checkpointer.restore(run.spec, lambda about: _check(run, about))
    if found is None:
        if source:
            check_start(source, run.model, run.tokenizer)
        facts = announce_epochs(run, log)  # may refuse, so before anything is computed
        if source is None:
            run.state = run.spec.init(run.recipe.train.seed)
        else:
            run.state = _from_source(run, source, log)
        return facts
    run.restore_seconds = time.monotonic() - began
    run.state, about = found
    run.start, run.unfinished = about["step"], about.get("unfinished", False)
    run.about |= {key: about[key] for key in STARTED_FROM if key in about}
    data, step, size = about["data"], run.start, run.recipe.train.batch_size
    before = Steps.restored(data, step)
    run.steps, run.tokens = before.resumed(step, size), data["tokens"]
    log(f"resuming at step {step}, from row {data['next_row']:,} of the data")
    if before.changes[-1].size != size:
        log(f"batch size: {before.changes[-1].size} rows up to step {step}, {size} from there on; "
            "learning rate and other schedules go on by step")
    return announce_epochs(run, log)


def _check(run: Run, about: About) -> None:
    """Refuses a checkpoint of another run: other recipe, steps, schedule, data or dtype."""
    same_run(run.workdir, about["recipe"], run.about["recipe"])
    step, steps = about["step"], run.recipe.train.steps
    if step > steps:
        raise UserError(f"at least the {step:,} steps that {run.workdir} has done", f"{steps:,}",
                        "raise it, or use another --workdir", where="config.train.steps")
    check_schedule(build_recipe(about["recipe"]), run.recipe, step)
    saved, row = about["data"]["fingerprint"], about["data"]["next_row"]
    data = run.train_split.fingerprint_of(row)
    if saved != data:
        raise UserError(f"the data that its checkpoint was trained on ({saved[:12]})",
                        f"data {data[:12]}", "use another --workdir, the data directory of that "
                        f"run, or data.stages that are the same before row {row:,}",
                        where=str(run.workdir))
    saved, dtype = about["compute_dtype"], run.about["compute_dtype"]
    if saved != dtype:  # for example because "auto" meets another kind of device
        raise UserError(f"to compute in {saved} as this run began",
                        f"{dtype} ({dtype_reason(run)})",
                        f"set config.train.compute_dtype={saved} or use another --workdir",
                        where=str(run.workdir))


def _from_source(run: Run, source: Pretrained, log: Log) -> TrainState:
    """Returns the state before the first step, with the weights of `source`."""
    params = source.read(run.model, run.spec.shardings.params)
    run.about["init_from"] = {"path": source.where, "step": source.about["step"],
                              "checksums": checksums(params)}
    if "huggingface" in source.about:  # the export writes its config and names after the original
        run.about["huggingface"] = source.about["huggingface"]
    log(f"weights: those of {source.where}, step {source.about['step']:,}; the optimizer begins "
        "anew")
    return run.spec.start(params)
