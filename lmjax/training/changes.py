"""Which changes of a recipe a run may be resumed with, and which would make another run."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmjax.config import differences, plain
from lmjax.errors import UserError
from lmjax.training.optim.groups import with_group
from lmjax.training.optim.schedules import make_schedule
from lmjax.training.recipe import Recipe

# Keys that may change, as patterns: where the run computes, what is kept of it, and which rows are
# still to come.
MAY_CHANGE = (
    "mesh.*", "eval.*", "checkpoint.*", "sample.*", "watch.*",
    "data.directory", "data.memory_limit_mib", "data.curate.workers", "data.curate.memory_mib",
    "data.stages", "data.stages.*", "data.max_epochs", "data.max_epochs.*",
    "data.objective.own_ids",  # the fingerprint of the data holds the ids that differ by it
    "train.batch_size",  # the rows already trained on stay as they are: `data.order.Steps`
    "train.microbatches", "train.log_every", "train.loss_chunk",
    "train.compute_dtype",  # "auto" may be spelt out; a checkpoint records the dtype itself
    "model.attention", "model.remat", "model.scan_layers",
    "task.metric", "task.num_beams", "task.max_tokens", "task.eval_examples",
)
# Places that may change, such as $SLURM_TMPDIR/base. What is there must stay: `resume` compares the
# weights, `prepare` the tokenizer, and the fingerprint of the data covers the rows.
PLACES = ("train.init_from", "distill.teacher", "data.tokenizer.path", "data.sources.*.data_dir")
# Keys that may change if every learning rate so far stays the same, as `check_schedule` asks: a run
# may go on for longer, or begin to decay.
SCHEDULE_KEYS = ("train.steps", "optimizer.schedule", "optimizer.final_lr_fraction",
                 "optimizer.decay_fraction")


def blocking_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares two plain recipes.

    Returns:
      (changes that would make another run, harmless changes), each as `key: old -> new`. Keys of
      SCHEDULE_KEYS and PLACES count as harmless here.
    """
    changes, may = differences(old, new), (*MAY_CHANGE, *SCHEDULE_KEYS, *PLACES)
    harmless = [c for c in changes
                if any(fnmatch.fnmatchcase(c.partition(":")[0], key) for key in may)]
    return [c for c in changes if c not in harmless], harmless


def check_schedule(old: Recipe, new: Recipe, step: int) -> None:
    """Checks that `new` gives the first `step` steps the learning rates that `old` gave them.

    Raises:
      UserError: it does not; the error names the changed keys.
    """
    before, now = (_rates(recipe, step) for recipe in (old, new))
    if not np.array_equal(before, now):
        changed = [c for c in differences(plain(old), plain(new))
                   if c.split(":")[0] in SCHEDULE_KEYS]
        raise UserError(f"the learning rates that the first {step} steps had",
                        f"{'; '.join(changed)}, which changes them",
                        "undo that, or go on in another --workdir with train.init_from")


def _rates(recipe: Recipe, step: int) -> np.ndarray:
    """The learning rates of the first `step` steps: of the optimizer, and of each group of it."""
    own = [recipe.optimizer, *(with_group(recipe.optimizer, g) for g in recipe.optimizer.groups)]
    return np.stack([make_schedule(c, recipe.train.steps)(np.arange(step)) for c in own])
