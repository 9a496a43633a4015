"""AdamW, Lion and SGD: updates that are computed for each element of a parameter by itself.

Weight decay and the learning rate are applied by `table.make_optimizer`.
"""

from typing import Any

import jax
import optax

from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.groups import per_group


def adamw(config: OptimizerConfig, axes: Any, own: Any) -> optax.GradientTransformation:
    """Adam's rescaling (Kingma and Ba 2015, arXiv:1412.6980)."""
    # Where one epsilon holds for all, the names of groups in a state do not speak of it.
    several = len({its.eps for its in jax.tree.leaves(own)}) > 1
    return per_group(own, ("b1", "b2", *("eps",) * several),
                     lambda its: optax.scale_by_adam(its.b1, its.b2, its.eps))


def lion(config: OptimizerConfig, axes: Any, own: Any) -> optax.GradientTransformation:
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675)."""
    return optax.scale_by_lion(config.b1, config.b2)


def sgd(config: OptimizerConfig, axes: Any, own: Any) -> optax.GradientTransformation:
    """Gradient descent, with momentum unless `momentum` is 0."""
    return optax.trace(config.momentum) if config.momentum else optax.identity()
