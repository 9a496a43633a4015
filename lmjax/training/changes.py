"""Which changes of a recipe a run may be resumed with, and which would make another run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmjax.config import differences, plain
from lmjax.errors import UserError
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.recipe import Recipe

# Keys that may change, a final dot standing for a whole group: where the run computes, what is kept
# of it, and which rows are still to come.
MAY_CHANGE = (
    "mesh.", "eval.", "checkpoint.", "sample.", "watch.",
    "data.directory", "data.memory_limit_mib", "data.curate.workers", "data.curate.memory_mib",
    "data.stages", "data.max_epochs.",
    "data.objective.own_ids",  # the fingerprint of the data holds the ids that differ by it
    "train.batch_size",  # the rows already trained on stay as they are: `data.order.Steps`
    "train.microbatches", "train.log_every", "train.loss_chunk",
    "train.compute_dtype",  # "auto" may be spelt out; a checkpoint records the dtype itself
    "model.attention", "model.remat", "model.scan_layers",
)
# Keys that may change if every learning rate so far stays the same, as `check_schedule` asks: a run
# may go on for longer, or begin to decay.
SCHEDULE_KEYS = ("train.steps", "optimizer.schedule", "optimizer.final_lr_fraction",
                 "optimizer.decay_fraction")


def blocking_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares two plain recipes.

    Returns:
      (changes that would make another run, harmless changes), each as `key: old -> new`. Keys of
      SCHEDULE_KEYS count as harmless here.
    """
    changes, may = differences(old, new), (*MAY_CHANGE, *SCHEDULE_KEYS)
    harmless = [c for c in changes
                if any(c.startswith(key if key.endswith(".") else f"{key}:") for key in may)]
    return [c for c in changes if c not in harmless], harmless


def check_schedule(old: Recipe, new: Recipe, step: int) -> None:
    """Checks that `new` gives the first `step` steps the learning rates that `old` gave them.

    Raises:
      UserError: it does not; the error names the changed keys.
    """
    before, now = (make_schedule(r.optimizer, r.train.steps)(np.arange(step)) for r in (old, new))
    if not np.array_equal(before, now):
        changed = [c for c in differences(plain(old), plain(new))
                   if c.split(":")[0] in SCHEDULE_KEYS]
        raise UserError(f"the learning rates that the first {step} steps had",
                        f"{'; '.join(changed)}, which changes them",
                        "undo that, or go on in another --workdir with train.init_from")
