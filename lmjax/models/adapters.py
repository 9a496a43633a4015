"""Adds adapters to a model: to those matrices of its layers that a config names."""

import re

from flax import nnx

from lmjax.errors import UserError
from lmjax.models.transformer import Trunk
from lmjax.nn.adapters import Adapter, AdapterConfig
from lmjax.nn.layers import Dense


def adapted(model: nnx.Module, config: AdapterConfig, rngs: nnx.Rngs) -> nnx.Module:
    """Gives an adapter to every dense layer in the stacks of `model` that `config` names.

    Raises:
      UserError: it names none.
    """
    modules = [("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    dense = [(path, module) for path, module in modules
             if isinstance(module, Dense) and "layers/block/" in path]
    found = [(path, module) for path, module in dense if re.search(config.targets, path)]
    if not found:
        names = ", ".join(sorted({"/".join(path.split("/")[-2:]) for path, _ in dense}))
        raise UserError(f"a regular expression for some of {names}", repr(config.targets),
                        "change it", where="config.adapter.targets")
    for index, (_, module) in enumerate(sorted(found, key=lambda item: item[0])):
        # nnx has noted the attribute as one without parameters, since it was None.
        module.adapter = nnx.data(Adapter(module.kernel, module.num_in, config, index, rngs))
    for trunk in (module for _, module in modules if isinstance(module, Trunk)):
        trunk.noisy |= config.dropout > 0
    return model
