"""Learning-rate schedules: a linear warm-up, then one of the shapes in SCHEDULES."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.config import choice
from lmjax.errors import UserError
from lmjax.training.optim.config import OptimizerConfig


def _decay(config: OptimizerConfig, height: jax.Array) -> jax.Array:
    """Maps height 1..0 to the share of peak_lr, 1..final_lr_fraction."""
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * height


# The share of peak_lr after warm-up, from the config, the progress of the decay (0 to 1) and the
# step (from 0).
Shape = Callable[[OptimizerConfig, jax.Array, jax.Array], jax.Array]
SCHEDULES: dict[str, Shape] = {
    "cosine": lambda c, progress, step: _decay(c, 0.5 * (1 + jnp.cos(jnp.pi * progress))),
    "linear": lambda c, progress, step: _decay(c, 1 - progress),
    "exponential": lambda c, progress, step: jnp.power(c.final_lr_fraction, progress),
    # Warm-up, stable, decay with 1 - sqrt: Hägele et al. 2024, arXiv:2405.18392
    "wsd": lambda c, progress, step: _decay(c, 1 - jnp.sqrt(progress)),
    "inverse_sqrt": lambda c, progress, step: jnp.sqrt(
        max(c.warmup_steps, 1) / jnp.maximum(step, max(c.warmup_steps, 1))),
    "constant": lambda c, progress, step: jnp.ones_like(progress),
}


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """Returns the learning rate as a function of the step.

    Step t of the warm-up takes (t+1)/(warmup_steps+1) of the peak, so that no step is wasted at 0
    and step `warmup_steps` is the first at the peak. The decay reaches its end value at step
    `total_steps`, one past the last step.

    Returns:
      step (an integer from 0, traced or not) -> float32 scalar.

    Raises:
      UserError: no such schedule, or its warm-up (with wsd: and decay) is too long.
    """
    choice("optimizer.schedule", config.schedule, SCHEDULES)
    warmup = decay_start = config.warmup_steps
    if config.schedule == "wsd":
        decay_start = total_steps - round(config.decay_fraction * total_steps)
    longest = min(decay_start, total_steps - 1)
    if warmup > longest:
        raise UserError(f"at most {longest} for {total_steps} steps of the {config.schedule} "
                        "schedule", warmup, "shorten it or train longer",
                        where="config.optimizer.warmup_steps")
    shape = SCHEDULES[config.schedule]

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - decay_start) / max(total_steps - decay_start, 1), 0, 1)
        share = shape(config, progress, step)
        return config.peak_lr * jnp.where(step < warmup, (step + 1) / (warmup + 1), share)

    return schedule
