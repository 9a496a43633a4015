"""Which layers of a deeper model the layers of a shallower one stand for."""

import numpy as np

from lmjax.errors import UserError
from lmjax.models.config import TransformerConfig


def evenly(count: int, of: int, ours: TransformerConfig, theirs: TransformerConfig) -> list[int]:
    """Which of a stack of `of` layers the `count` layers of a shallower model stand for.

    They rise. Each stands for a layer of its own kind (global or local), and together they lie as
    near to even shares as they can.

    Raises:
      UserError: the deeper model is not deeper, or lacks such layers.
    """
    def kinds(config: TransformerConfig, layers: int) -> np.ndarray:
        names, pattern = config.kinds(layers)
        return np.array([names[pattern[i % len(pattern)]] for i in range(layers)])

    if count > of:
        raise UserError(f"at most the {of} layers of the other model", count, "lower it",
                        where="config.model.num_layers")
    allowed = kinds(ours, count)[:, None] == kinds(theirs, of)[None]
    apart = np.where(allowed, np.square(np.linspace(0, of - 1, count)[:, None] - np.arange(of)),
                     np.inf)
    # least[i, j]: the least sum of the first i + 1 choices if the last of them is at most j.
    least, choice = np.full((count + 1, of), np.inf), np.zeros((count, of), int)
    least[0] = 0.0
    for i in range(count):
        before = np.concatenate([[np.inf if i else 0.0], least[i][:-1]])
        sums, best = before + apart[i], 0
        for j in range(of):
            best = j if sums[j] < sums[best] else best
            choice[i, j], least[i + 1, j] = best, sums[best]
    if np.isinf(least[count, of - 1]):
        raise UserError("layers of the kinds that the other model has, in its order",
                        ours.layer_pattern, "take its layer_pattern",
                        where="config.model.layer_pattern")
    taken, end = [], of - 1
    for i in reversed(range(count)):
        taken.append(int(choice[i, end]))
        end = taken[-1] - 1
    return taken[::-1]
