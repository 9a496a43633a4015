"""Adafactor: a second moment that is stored as row and column means (arXiv:1804.04235)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.parameters import Axes, own_axes

# Constants of Shazeer and Stern 2018, section 9.
FACTOR_MIN_DIM = 128
FACTOR_CLIP_RMS = 1.0


def adafactor(config: OptimizerConfig, axes: Any, own: Any) -> optax.GradientTransformation:
    """Adafactor's rescaling, with the RMS of each parameter's update clipped."""
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=FACTOR_MIN_DIM),
                       _clip_rms(axes))


def _clip_rms(axes: Any) -> optax.GradientTransformation:
    """Clips each layer's update by its own RMS; Optax would take one RMS of all stacked layers."""

    def clip(update: jax.Array, names: Axes) -> jax.Array:
        own = tuple(range(len(names) - len(own_axes(names)), update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=own, keepdims=True))
        return update / jnp.maximum(1.0, rms / FACTOR_CLIP_RMS)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, axes))
