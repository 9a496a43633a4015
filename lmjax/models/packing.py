"""Which parameters of a model are packed as integers, and how the tree of packed ones looks."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.nn.layers import Dense
from lmjax.nn.module import Functional, Params
from lmjax.nn.moe import Experts
from lmjax.nn.packed import (
    SCALES,
    Packed,
    Quantization,
    by_inputs,
    by_outputs,
    can_pack,
    pack,
)

TABLES = ("embedding/table", "head/table")  # of tokens: read by row, and as the unembedding


class Matrix(NamedTuple):
    """How a parameter lies as a matrix of outputs by inputs."""

    lead: int  # leading dimensions: layers, experts
    num_in: int  # dimensions in, after these; 0: the last dimension is the inputs


def matrices(functional: Functional) -> dict[str, Matrix]:
    """The parameters that quantisation packs, by path.

    These are the matrices of layers and of experts, and the tables of tokens. Routers, norms,
    biases, tables of positions and the heads of tasks, which are small or sensitive, are not.
    """
    module = nnx.eval_shape(lambda: functional.build(nnx.Rngs(0)))
    found = {}
    for parts, node in nnx.iter_modules(module):
        path = "/".join(map(str, parts))
        layers = 1 if "layers/block/" in path else 0
        if isinstance(node, Dense) and layers and not path.endswith(("router", "shared_gate")):
            found[f"{path}/kernel"] = Matrix(layers, node.num_in)
        elif isinstance(node, Experts):
            found[f"{path}/kernel"] = Matrix(layers + 1, 1)
        elif f"{path}/table" in TABLES:
            found[f"{path}/table"] = Matrix(0, 0)
    return found


def packs(path: str, q: Quantization) -> bool:
    """Whether `q` packs the matrix of this path."""
    return bool(_format(path, q))


def _packed_ones(functional: Functional, q: Quantization) -> dict[str, Matrix]:
    return {path: how for path, how in matrices(functional).items() if packs(path, q)}


def packed_functional(functional: Functional, q: Quantization) -> tuple[Params, Params]:
    """The shapes and the axis names of the parameters, packed as `q` says.

    Raises:
      UserError: a matrix has an odd number of inputs, of which two do not share a byte.
    """
    which = _packed_ones(functional, q)

    def shapes(path: str, shape: Any, axes: Any) -> Any:
        if path not in which:
            return shape
        _check(path, shape.shape, which[path], q)
        made = jax.eval_shape(lambda w: _packed(w, path, which[path], q), shape)
        return as_dict(made)

    def names(path: str, shape: Any, axes: tuple[Any, ...]) -> Any:
        if path not in which:
            return axes
        lead, num_in = which[path]
        if not num_in:
            return {_format(path, q): axes, SCALES: (*axes[:-1], "norm")}
        kept = (*axes[:lead], *axes[lead + num_in:])
        # Merged dimensions are split as the first of them is.
        return {_format(path, q): (*kept, axes[lead]), SCALES: (*kept, "norm")}

    return (_map(shapes, functional.shapes, functional.axes),
            _map(names, functional.shapes, functional.axes))


def packed_shardings(functional: Functional, shardings: Params, q: Quantization) -> Params:
    """Where packed parameters lie if the unpacked ones lie as `shardings` says.

    The inputs of a matrix, which are one dimension, are split as the first of them is, if they
    divide.
    """
    which = _packed_ones(functional, q)
    packed, _ = packed_functional(functional, q)

    def place(path: str, sharding: NamedSharding, shape: Any) -> Any:
        if path not in which:
            return sharding
        name, (lead, num_in) = _format(path, q), which[path]
        spec: list[Any] = [*sharding.spec, *[None] * (8 - len(sharding.spec))]
        values = shape[name].shape
        if num_in:
            out = len(values) - lead - 1
            spec = [*spec[:lead], *spec[lead + num_in : lead + num_in + out], spec[lead]]
        *kept, last = spec[: len(values)]
        names = last if isinstance(last, tuple) else (last,) if last else ()
        if values[-1] % math.prod(sharding.mesh.shape[axis] for axis in names):
            last = None
        return {name: NamedSharding(sharding.mesh, PartitionSpec(*kept, last)),
                SCALES: NamedSharding(sharding.mesh, PartitionSpec(*kept, None))}

    return _map(place, shardings, packed)


def pack_params(functional: Functional, params: Params, q: Quantization) -> Params:
    """Rounds the parameters of a model to the nearest integers."""
    which = _packed_ones(functional, q)
    return _map(lambda path, p, _: as_dict(_packed(p, path, which[path], q)) if path in which
                else p, params, functional.axes)


def unpack_params(functional: Functional, params: Params, q: Quantization) -> Params:
    """The float32 parameters that packed ones stand for."""
    which = _packed_ones(functional, q)

    def unpacked(path: str, node: Any, shape: Any) -> Any:
        if path not in which:
            return node
        name = _format(path, q)
        w = Packed(node[name], node[SCALES], name).dense(jnp.float32)
        lead, num_in = which[path]
        return by_inputs(w, shape.shape, num_in, lead) if num_in else w

    return _map(unpacked, params, functional.shapes, stop=which)


def as_dict(w: Packed) -> dict[str, Any]:
    """A packed matrix as it lies in a tree of parameters."""
    return {w.format: w.values, SCALES: w.scales}


def as_matrix(w: jax.Array, how: Matrix) -> jax.Array:
    """A parameter as [*lead, *out, I]."""
    return by_outputs(w, how.num_in, how.lead) if how.num_in else w


def _packed(w: jax.Array, path: str, how: Matrix, q: Quantization) -> Packed:
    return pack(as_matrix(w, how), _format(path, q), q.group)


def _format(path: str, q: Quantization) -> str:
    return q.tables if path in TABLES else q.weights


def _check(path: str, shape: tuple[int, ...], how: Matrix, q: Quantization) -> None:
    inputs = math.prod(shape[how.lead:how.lead + how.num_in] if how.num_in else shape[-1:])
    if not can_pack(inputs, _format(path, q)):
        raise UserError(f"an even number of inputs of {path} for {q.weights}", inputs, "use int8",
                        where="quantization.weights")


def _map(fn: Any, tree: Mapping[str, Any], beside: Mapping[str, Any], within: str = "",
         stop: Any = ()) -> dict[str, Any]:
    """fn(path, leaf, what lies beside it) for every leaf of nested dicts, or path in `stop`."""
    out = {}
    for key, node in tree.items():
        path = within + key
        if isinstance(node, Mapping) and path not in stop:
            out[key] = _map(fn, node, beside[key], f"{path}/", stop)
        else:
            out[key] = fn(path, node, beside[key])
    return out
