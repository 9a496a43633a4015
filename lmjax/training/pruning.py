"""Gradual pruning: the share of weights that are 0 grows along a schedule while a run trains."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmjax.config import at_least
from lmjax.errors import UserError
from lmjax.models.packing import TABLES, Matrix, as_matrix, matrices
from lmjax.nn.module import Functional
from lmjax.nn.packed import by_inputs
from lmjax.tree import named_leaves


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """Zeros among the weights of layers' matrices, more and more of them.

    At step t the share is weights * (1 - (1 - (t - start) / (end - start))^3), equation 1 of Zhu
    and Gupta 2017 (arXiv:1710.01878), from dense matrices.
    """

    weights: float = 0.0  # share of the inputs of every output that are 0 from `end` on; 0: none
    start: int = 0  # the step from which on weights become 0
    end: int = 0  # the step at which the share is reached; 0: after three quarters of the steps
    every: int = 10  # steps between two increases

    def __post_init__(self) -> None:
        if not 0 <= self.weights < 1:
            raise UserError("a share from 0 to below 1", self.weights, "change it",
                            where="pruning.weights")
        at_least(0, **{"pruning.start": self.start, "pruning.end": self.end})
        at_least(1, **{"pruning.every": self.every})

    def last(self, steps: int) -> int:
        """The step of a run of so many at which the share is reached.

        Raises:
          UserError: it is not after `start`, or not within the run.
        """
        end = self.end or steps * 3 // 4
        if not self.start < end < steps:
            raise UserError(f"start < end < train.steps={steps}", f"{self.start} and {end}",
                            "change one of them", where="pruning.start, pruning.end")
        return end

    def share(self, step: Any, steps: int) -> jax.Array:
        """The share of zeros after step `step` (from 0), if weights become 0 there: float32."""
        end = self.last(steps)
        done = jnp.clip((step - self.start) / (end - self.start), 0, 1)
        return self.weights * (1 - (1 - done) ** 3)


def gradual_pruning(config: PruningConfig, steps: int,
                    functional: Functional) -> optax.GradientTransformation:
    """Returns a transformation of final updates that makes the smallest weights 0.

    The inputs of each output are ranked among themselves by the magnitude that they would have
    after the update. It is to be used with `keep_zeros`, so that what is 0 stays 0. Its state is
    the step count.

    Args:
      config: how many become 0, and when.
      steps: of the run.
      functional: of the model.
    """
    which = {path: how for path, how in matrices(functional).items() if path not in TABLES}
    end = config.last(steps)

    def update(updates: Any, state: optax.ScaleByScheduleState,
               params: Any = None) -> tuple[Any, optax.ScaleByScheduleState]:
        step = state.count
        # After `end` the same weights are cut again, in case that step was skipped: it was not
        # finite, or a spike.
        is_due = (step >= config.start) & (((step - config.start) % config.every == 0)
                                           | (step == end) | (step == steps - 1))
        share = config.share(step, steps)
        updates = jax.lax.cond(is_due, lambda u: _cut(u, params, share, which), lambda u: u,
                               updates)
        return updates, optax.ScaleByScheduleState(count=step + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update)


def _cut(updates: Any, params: Any, share: jax.Array, which: Mapping[str, Matrix]) -> Any:
    """The updates, which make a share of the weights of each of these matrices 0."""
    cut = []
    for (path, u), (_, p) in zip(named_leaves(updates), named_leaves(params), strict=True):
        if how := which.get(path):
            sizes = as_matrix(jnp.abs(p + u), how)  # [*lead, *out, I]
            count = jnp.round(share * sizes.shape[-1]).astype(jnp.int32)
            ranks = jnp.argsort(jnp.argsort(sizes, axis=-1), axis=-1)
            u = jnp.where(by_inputs(ranks, u.shape, how.num_in, how.lead) < count, -p, u)
        cut.append(u)
    return jax.tree.unflatten(jax.tree.structure(updates), cut)
