"""A repeated step has the recipe and the batch size that it had, and names the rows to blame."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest

from lmjax.config import plain
from lmjax.data.order import Steps
from lmjax.errors import UserError
from lmjax.training.checkpoint import COMMITTED, FORMAT
from lmjax.training.forensics import Row
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.training.replay import History, check_size
from lmjax.training.replay_report import blame


def changed(recipe: Recipe, **train) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **train))


@pytest.fixture
def make(tmp_path):
    """Writes the files of a run: its newest recipe, and checkpoints as step -> (recipe, steps)."""

    def history(newest, saved, events=()):
        (tmp_path / "config.json").write_text(json.dumps(plain(newest)))
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / "timing.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        for step, (recipe, steps) in saved.items():
            about = {"format": FORMAT, "step": step, "recipe": plain(recipe),
                     "data": steps.state(step)}
            about["sha256"] = hashlib.sha256(
                json.dumps(about, sort_keys=True).encode()).hexdigest()
            folder = Path(newest.checkpoint.path(tmp_path)) / str(step)
            (folder / "about").mkdir(parents=True)
            (folder / "about/metadata").write_text(json.dumps(about))
            (folder / COMMITTED).touch()
        return History(tmp_path)

    return history


BASE = build_recipe({"train": {"steps": 1000, "batch_size": 8}})
BASE = dataclasses.replace(BASE, optimizer=dataclasses.replace(
    BASE.optimizer, schedule="constant"))


def test_the_schedule_is_that_of_the_step(make):
    longer = dataclasses.replace(changed(BASE, steps=2000), optimizer=dataclasses.replace(
        BASE.optimizer, schedule="wsd", decay_fraction=0.2))
    history = make(longer, {1000: (BASE, Steps([(0, 0, 8)])), 1500: (longer, Steps([(0, 0, 8)]))})
    then, now = history.recipe(900), history.recipe(1200)
    assert (then.train, then.optimizer) == (BASE.train, BASE.optimizer)
    assert (now.train, now.optimizer) == (longer.train, longer.optimizer)


def test_the_batch_size_is_that_of_the_step(make):
    """It changed at step 15, whose checkpoint is gone."""
    newest, steps = changed(BASE, batch_size=16, microbatches=4), Steps([(0, 0, 8), (15, 120, 16)])
    events = [{"event": "start", "step": 0, "seconds": 1}, {"event": "resume", "step": 15}]
    history = make(newest, {10: (BASE, Steps([(0, 0, 8)])), 20: (newest, steps)}, events)
    assert history.recipe(12).train == BASE.train
    assert history.recipe(17).train == newest.train
    assert history.changed(history.recipe(12), 10, 12) == []
    note, = history.changed(history.recipe(17), 10, 17)
    assert note.startswith("the run had train.microbatches=1 up to step 10")
    assert history.changed(history.recipe(25), 20, 25) == []
    for start, step in ((10, 15), (15, 20)):
        check_size(steps, start, step, [10, 20])
    with pytest.raises(UserError, match="8 rows, then 16 from step 16 on; choose a step of at "
                                        "most 15, or at least 21"):
        check_size(steps, 10, 17, [10, 20])


@pytest.mark.parametrize("norms, losses, said", [
    ([math.nan] * 8, [1.0] * 8, ["Every row is not finite, so that no row is to blame."]),
    ([math.nan], [1.0], ["The only row of the batch is not finite."]),
    ([1.0, math.nan, 1.0], [1.0] * 3, ["Of the 3 rows, alone in the batch, 1 is not finite."]),
    ([None, 1.0, None], [1.0] * 3, []),
    ([None, None], [1.0, math.nan], ["Of the 2 rows, alone in the batch, 1 is not finite."]),
])
def test_rows_are_blamed_by_what_was_computed(norms, losses, said):
    rows = [Row(i, i, 1.0, loss) if norm is None else Row(i, i, 1.0, loss, norm, True)
            for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))]
    assert blame(rows) == said
