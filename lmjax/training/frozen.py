"""Which parameters of a model a run trains, and which stay as they are."""

import re

from lmjax.errors import UserError
from lmjax.models.model import Model
from lmjax.training.recipe import Recipe
from lmjax.training.state import Frozen
from lmjax.tree import named_leaves


def frozen_in(recipe: Recipe, model: Model) -> Frozen | None:
    """Returns the parameters that a run of `recipe` does not train; None if it trains all.

    Raises:
      UserError: train.frozen is found in the path of no parameter, or in that of every one.
    """
    pattern = recipe.train.frozen
    if not pattern:
        return None
    paths = [path for path, _ in named_leaves(model.shapes)]
    found = [path for path in paths if re.search(pattern, path)]
    if not found or len(found) == len(paths):
        raise UserError("a regular expression for some of the parameters' paths, such as "
                        f"{paths[0]} and {paths[-1]}",
                        f"{pattern!r}, which {'all' if found else 'none'} of them match",
                        "change it", where="config.train.frozen")
    return Frozen(frozenset(found).__contains__)
