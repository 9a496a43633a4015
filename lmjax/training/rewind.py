"""Rewinding: a run goes back to its last checkpoint and leaves out rows, without a new start."""

from lmjax.errors import Fault
from lmjax.monitoring.health import Rewind
from lmjax.training.run import Log, Run
from lmjax.training.setup import At, cover, place

MOST_REWINDS = 3  # to one and the same checkpoint


def rewind(run: Run, cause: Rewind, log: Log, at: At) -> tuple[int, int]:
    """Brings `run` back to its last checkpoint, or to its beginning, without the rows at fault.

    It leaves out the rows of the steps at fault, in addition to those that it left out before. The
    last time it leaves out all rows since the checkpoint. Everything follows from the checkpoint
    and the data: a run that is killed meanwhile repeats it.

    Args:
      run: its state, its start and its steps are set here.
      cause: why.
      log, at: as for `set_up`.

    Returns:
      The rows that are left out: the first one, and the one after the last.

    Raises:
      Fault: the run has been back at this checkpoint too often.
    """
    run.saver.settle()  # if that fails, an older checkpoint will do
    steps, began, run.state = run.steps, run.start, None
    place(run, log, at)
    # Those of the checkpoint, and what was left out since it was saved. If the batch size changed
    # after the checkpoint, it now changes there.
    run.steps = steps.resumed(run.start, run.recipe.train.batch_size)
    run.rewinds = (run.rewinds if run.start == began else 0) + 1
    step, end = max(cause.first - 1, run.start), steps.of(cause.step)[1]
    if run.rewinds > MOST_REWINDS and not cause.is_spike:
        raise Fault("a run that heals from its last checkpoint", f"{cause.why}, after "
                    f"{MOST_REWINDS} rewinds to step {run.start}",
                    "start again without that device" if cause.of_device else
                    "lower optimizer.peak_lr or clip_norm in another --workdir (the checkpoints "
                    "are kept), or start again on other devices", where=f"step {cause.step}")
    if run.rewinds > MOST_REWINDS:
        run.health.forgive()
        return end, end
    if run.rewinds == MOST_REWINDS and not cause.of_device:
        step = run.start
    elif not cause.first:  # no row is known to be the cause
        return end, end
    first = steps.rows(step)
    run.steps = run.steps.without(run.steps.step_of(first), end)
    cover(run, log, at)
    return first, end
