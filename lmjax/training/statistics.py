"""Statistics by module and layer: root mean squares of gradients, updates, weights, activations.

A second compiled step computes them at some steps, as further metrics of the same computation. The
step of all other steps is as it would be without them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.models.model import Batch
from lmjax.nn.losses import Loss
from lmjax.nn.recorded import recording
from lmjax.tasks.losses import LossFn
from lmjax.tree import named_leaves

PREFIX = "statistics/"  # of the names among a step's metrics
ACTIVATIONS = ("state", "attention", "mlp", "logit")  # of `nn.recorded`
EXPERTS = "expert_counts"  # the metric with the choices of each expert, [layers, experts]


def with_activations(loss_fn: LossFn, microbatches: int) -> LossFn:
    """The same loss, which also reports the mean squares of the layers' outputs.

    They are means over the microbatches, and so is the largest attention score.
    """

    def keep(x: jax.Array) -> jax.Array:
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        return (jnp.mean(jnp.square(x)) if x.ndim else x) / microbatches

    def reporting(params: Any, batch: Batch, key: jax.Array | None) -> Loss:
        with recording(*ACTIVATIONS, keep=keep) as stacks:
            loss = loss_fn(params, batch, key)
        # An encoder-decoder has two stacks.
        sides = [""] if len(stacks) == 1 else [f"stack{i}/" for i in range(len(stacks))]
        found = {f"{PREFIX}activation/{side}{name}": x
                 for side, stack in zip(sides, stacks, strict=True) for name, x in stack.items()}
        return loss._replace(extra=loss.extra | found)

    return reporting


def module_statistics(**trees: Any) -> dict[str, jax.Array]:
    """Root mean squares of every array of some trees, float32 [layers], or [1] outside of layers.

    Args:
      trees: of parameters, by what they are: gradient, update, weight.
    """
    return {f"{PREFIX}{kind}/{name}": _rms(name, x)
            for kind, tree in trees.items() for name, x in named_leaves(tree)}


def _rms(name: str, x: jax.Array) -> jax.Array:
    # Without a reshape, which would gather an array that is split over devices.
    within = "layers/block/" in name
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(within, x.ndim)))
    return jnp.sqrt(mean if within else mean[None])


def statistics_of(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The statistics among the metrics of a step, on the host: float32 [layers], by name."""
    found = {name.removeprefix(PREFIX): np.asarray(x, np.float32)
             for name, x in metrics.items() if name.startswith(PREFIX)}
    for name in found:
        if name.startswith("activation/") and not name.endswith("logit"):
            found[name] = np.sqrt(found[name])
    if found and EXPERTS in metrics:
        counts = np.asarray(metrics[EXPERTS], np.float64)
        share = counts * counts.shape[1] / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        found["experts/most"] = share.max(axis=1).astype(np.float32)
        found["experts/dead"] = (counts == 0).mean(axis=1).astype(np.float32)
    return found
