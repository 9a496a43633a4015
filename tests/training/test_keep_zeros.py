"""`train.keep_zeros`: what pruning made 0 stays 0, whatever the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.table import OPTIMIZERS, make_optimizer

AXES = {"table": ("vocab", "embed"), "kernel": ("layers", "embed", "mlp"), "scale": ("norm",)}
SHAPES = {"table": (40, 16), "kernel": (3, 16, 24), "scale": (16,)}


def random_like(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in SHAPES.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_of_matrices_stay_and_all_else_moves_as_if_they_had_no_gradient(name):
    config = OptimizerConfig(name=name, peak_lr=1.0, schedule="constant", warmup_steps=0,
                             weight_decay=0.1, clip_norm=0.1)
    zero = {key: np.random.default_rng(1).random(shape) < 0.3 for key, shape in SHAPES.items()}
    params = {key: jnp.where(zero[key], 0, p) for key, p in random_like(2).items()}
    grads = [random_like(seed) for seed in (3, 4)]
    cut = [g | {"kernel": jnp.where(zero["kernel"], 0, g["kernel"])} for g in grads]

    def moved(grads, **options):
        tx = make_optimizer(config, 10, AXES, **options)
        state, moving = tx.init(params), params
        step = jax.jit(tx.update)
        for g in grads:
            updates, state = step(g, state, moving)
            moving = optax.apply_updates(moving, updates)
        return moving

    ours, by_hand = moved(grads, keep_zeros=True), moved(cut)
    np.testing.assert_array_equal(ours["kernel"] == 0, zero["kernel"])
    if name in ("adamw", "lion", "sgd"):  # the others mix the elements of a matrix
        for key in SHAPES:
            np.testing.assert_allclose(ours[key], by_hand[key], rtol=1e-4, atol=1e-5, err_msg=key)
    # Tables of tokens are no matrices. After one step: two of Lion's may cancel out.
    assert not np.any(moved(grads[:1], keep_zeros=True)["table"] == 0)
