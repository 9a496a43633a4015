"""Which layers of a deeper model the layers of a shallower one stand for."""

import numpy as np

from lmjax.errors import UserError
from lmjax.models.config import TransformerConfig


def evenly(count: int, of: int, ours: TransformerConfig, theirs: TransformerConfig) -> list[int]:
    """Which of a stack of `of` layers the `count` layers of a smaller model stand for.

    Each stands for one of its own kind (global or local), the nearest to an even share.
    """
    def kinds(config: TransformerConfig, layers: int) -> list[str]:
        names, pattern = config.kinds(layers)
        return [names[pattern[i % len(pattern)]] for i in range(layers)]

    taken: list[int] = []
    theirs_of, wanted = kinds(theirs, of), np.linspace(0, of - 1, count)
    for kind, at in zip(kinds(ours, count), wanted, strict=True):
        same = [i for i in range(of) if theirs_of[i] == kind and i not in taken]
        if not same:
            raise UserError(f"a layer of the kind {kind} in the deeper model for each of the model",
                            theirs.layer_pattern, "take its layer_pattern",
                            where="config.model.layer_pattern")
        taken.append(min(same, key=lambda i: abs(i - at)))
    return taken
