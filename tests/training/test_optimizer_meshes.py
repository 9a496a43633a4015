"""Every optimizer on a mesh: the parameters of one device, and a state that resumes bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.training.optim.config import GroupConfig, OptimizerConfig
from lmjax.training.optim.groups import multipliers
from lmjax.training.optim.sharding import state_shardings
from lmjax.training.optim.table import OPTIMIZERS, make_optimizer

pytestmark = pytest.mark.long

# Name -> shape, axis names, how it is split. Adafactor factors from 128 on.
PARAMETERS = {
    "embedding": ((256, 128), ("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
    "head": ((256, 128), ("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
    "up": ((2, 128, 256), ("layers", "embed", "mlp"), PartitionSpec(None, "fsdp", "tensor")),
    "out": ((2, 4, 32, 128), ("layers", "heads", "head_dim", "embed"),
            PartitionSpec(None, "tensor", None, "fsdp")),
    "scale": ((2, 128), ("layers", "norm"), PartitionSpec()),
}
SHAPES = {key: jax.ShapeDtypeStruct(shape, jnp.float32)
          for key, (shape, _, _) in PARAMETERS.items()}
AXES = {key: axes for key, (_, axes, _) in PARAMETERS.items()}
GROUPS = (GroupConfig(kind="unembedding", multiplier=0.5, b2=0.9, decay_fraction=0.5),
          GroupConfig(kind="vector", b1=0.8, weight_decay=0.1))


def random_like(seed):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape.shape).astype(np.float32) for key, shape in SHAPES.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mesh_gives_the_parameters_of_one_device_and_resumes_bit_for_bit(name):
    config = OptimizerConfig(name=name, peak_lr=0.01, schedule="wsd", warmup_steps=1,
                             clip_norm=100.0, groups=GROUPS)
    tx = make_optimizer(config, 4, AXES, multipliers(config, SHAPES, AXES))

    def trained(shape, restart):
        devices = np.array(jax.devices()[:np.prod(shape)]).reshape(shape)
        mesh = Mesh(devices, ("data", "fsdp", "tensor"))
        of = {key: NamedSharding(mesh, spec) for key, (_, _, spec) in PARAMETERS.items()}
        states = state_shardings(tx, SHAPES, of, mesh)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, out_shardings=(of, states))
        params = jax.device_put(random_like(0), of)
        state = jax.jit(tx.init, out_shardings=states)(params)
        for t in range(4):
            if t == restart:
                params, state = jax.device_put(jax.device_get((params, state)), (of, states))
            params, state = step(params, state, jax.device_put(random_like(t + 1), of))
        return jax.device_get(params)

    whole, split = trained((1, 1, 1), None), trained((2, 2, 2), None)
    for key in SHAPES:
        np.testing.assert_allclose(split[key], whole[key], rtol=0, atol=1e-5, err_msg=key)
        assert np.abs(whole[key] - random_like(0)[key]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, split, trained((2, 2, 2), 2))
