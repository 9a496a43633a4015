"""Muon: orthogonalised momentum for matrices (Jordan et al. 2024), AdamW for the rest."""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lmjax.errors import UserError
from lmjax.training.optim.adam import adamw
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.parameters import Axes, kind_of, map_axes, sides

UPDATE_RMS = 0.2  # AdamW's usual RMS: one learning rate fits both (arXiv:2502.16982)


def muon(config: OptimizerConfig, axes: Any, own: Any) -> optax.GradientTransformation:
    """Muon's update of every matrix, with AdamW's RMS, and AdamW's of every other parameter."""
    dims = map_axes(_matrix_dimensions, axes)
    labels = map_axes(lambda a: "muon" if kind_of(a) == "matrix" else "adamw", axes)
    matrices = optax.chain(
        scale_by_muon(ns_steps=config.muon_iterations, beta=config.muon_momentum,
                      weight_dimension_numbers=lambda _: dims),
        optax.stateless(lambda updates, params: jax.tree.map(_to_adamw_rms, updates, dims)),
    )
    return optax.partition({"muon": matrices, "adamw": adamw(config, axes, own)}, labels)


def _to_adamw_rms(update: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
    """Scales an orthogonal matrix to an RMS of UPDATE_RMS (Liu et al. 2025, arXiv:2502.16982)."""
    sizes = [math.prod(update.shape[i] for i in side) for side in dims]
    return update * (UPDATE_RMS * math.sqrt(max(sizes)))


def _matrix_dimensions(axes: Axes) -> MuonDimensionNumbers | optax.MaskedNode:
    """Says which dimensions of a matrix are its rows (inputs) and which its columns (outputs)."""
    if kind_of(axes) != "matrix":
        return optax.MaskedNode()
    both = sides(axes)
    if len(both) != 2:
        raise UserError("matrices with two sides for muon", f"axes {axes}", "use adamw",
                        where="optimizer.name")
    return MuonDimensionNumbers(reduction_axis=both[0], output_axis=both[1])
