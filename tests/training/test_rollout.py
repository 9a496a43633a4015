"""Which rows of the data a step that writes its own answers takes."""

import types

import numpy as np
import pytest

from lmjax.data.order import Steps
from lmjax.tasks.grpo import Grpo
from lmjax.training.rollout import rollout


class _Asked(Exception):
    """Ends a rollout at its first question; its argument is the rows that it asks for."""


def test_rows_that_are_left_out_are_not_answered():
    def rows(g: np.ndarray) -> dict[str, np.ndarray]:
        raise _Asked(g.tolist())

    run = types.SimpleNamespace(
        recipe=types.SimpleNamespace(train=types.SimpleNamespace(batch_size=8), task=Grpo(
            group=4, input="{q}", target="{a}")),
        train_split=types.SimpleNamespace(rows=rows),
        steps=Steps([(0, 0, 8)]).without(1, 24))  # the rows 8 to 23, which are the prompts 2 to 5
    for step, prompts in ((1, [0, 1]), (2, [6, 7])):
        with pytest.raises(_Asked) as asked:
            rollout(run, {}, step)
        assert asked.value.args == (prompts,)
