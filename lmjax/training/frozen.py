"""Which parameters of a model a run trains, and which stay as they are."""

import re

from lmjax.errors import UserError
from lmjax.models.model import Model, is_of_base
from lmjax.nn.module import Params
from lmjax.training.recipe import Recipe
from lmjax.training.state import Frozen
from lmjax.tree import named_leaves, split_tree


def frozen_in(recipe: Recipe, model: Model) -> Frozen | None:
    """Returns the parameters that a run of `recipe` does not train; None if it trains all.

    Raises:
      UserError: train.frozen is found in the path of no parameter, or in that of every one, or
        there are adapters as well.
    """
    pattern = recipe.train.frozen
    if recipe.adapter.kind and pattern:
        raise UserError("an empty one with adapters, beside which all weights are frozen",
                        repr(pattern), "leave it out", where="config.train.frozen")
    if recipe.adapter.kind:
        return Frozen(is_of_base, base=True)
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


def held_by_checkpoints(recipe: Recipe, model: Model, params: Params) -> Params:
    """Returns those of the model's parameters that a checkpoint holds: all, or the adapters."""
    frozen = frozen_in(recipe, model)
    if frozen is None or not frozen.base:
        return params
    return split_tree(params, frozen.accepts)[1]
