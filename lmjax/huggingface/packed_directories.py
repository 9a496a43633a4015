"""Reads the packed integers of Hugging Face directories in the format of compressed-tensors.

They stay integers where lmjax computes with the same ones: symmetric int4 with a scale per group or
output, and int8 with a scale per output or matrix. Everything else is refused in one line.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.huggingface import fp8_blocks, mxfp4
from lmjax.huggingface.tensors import STORED_DTYPES, Entry, read_tensor
from lmjax.huggingface.weights import Table, read_tree, tensor_shapes
from lmjax.models.model import Model
from lmjax.models.packing import Matrix, as_dict, as_matrix, matrices, packs
from lmjax.nn.module import Params
from lmjax.nn.packed import (
    FORMATS,
    NOT_QUANTIZED,
    SCALES,
    Quantization,
    from_ints,
    group_size,
)
from lmjax.tree import named_leaves, split_tree

KEY = "quantization_config"  # of config.json
# quant_method -> the function that makes floats of such tensors.
UNPACKED = {"mxfp4": mxfp4.as_floats, "fp8": fp8_blocks.as_floats}
FORMATS_READ = ("pack-quantized", "int-quantized", "naive-quantized", "dense")
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
ZERO = ".weight_zero_point"
UNREAD = (ZERO, ".weight_g_idx", ".input_scale", ".weight_global_scale")
FIX = "use the model's unpacked weights, and pack them with lmjax compress"


class PackedTensors(NamedTuple):
    """Tensors of a directory whose linear layers are integers."""

    quantization: Quantization  # of the model
    entries: Mapping[str, Entry]  # all tensors, as floats; those of linear layers are made on read
    steps: Mapping[str, Entry]  # of each linear layer's weight: the scale of each element


def quantization_of(settings: Mapping[str, Any], where: str) -> Quantization:
    """How config.json says that the linear layers are packed; NOT_QUANTIZED: not at all.

    Raises:
      UserError: it asks for something that lmjax does not compute with.
    """
    told = settings.get(KEY)
    if not told:
        return NOT_QUANTIZED

    def need(holds: bool, expected: str, got: Any) -> None:
        if not holds:
            raise UserError(expected, got, FIX, where=f"{where} {KEY}")

    if isinstance(told, Mapping) and told.get("quant_method") in UNPACKED:
        return NOT_QUANTIZED  # they become floats
    need(isinstance(told, Mapping) and told.get("quant_method") == "compressed-tensors",
         f"compressed-tensors, {' or '.join(UNPACKED)}", f"{told!r:.60}")
    form = told.get("format")
    need(form in FORMATS_READ, f"a format of {', '.join(FORMATS_READ)}", repr(form))
    sparse = told.get("sparsity_config") or {}
    need(sparse.get("format", "dense") == "dense", "dense storage of zeros", sparse.get("format"))
    for key in ("kv_cache_scheme", "transform_config"):
        need(not told.get(key), f"no {key}", "one")
    groups = [*(told.get("config_groups") or {}).values()]
    if not groups:
        return NOT_QUANTIZED
    need(len(groups) == 1 and list(groups[0]["targets"]) == ["Linear"],
         "one group of all linear layers", [group.get("targets") for group in groups])
    w, x = groups[0]["weights"], groups[0].get("input_activations")
    bits, by = w.get("num_bits"), w.get("strategy")
    what = (f"{bits} bits, {w.get('type')}, symmetric={w.get('symmetric')}, by {by}, actorder="
            f"{w.get('actorder')}")
    need(w.get("type") == "int" and w.get("symmetric") and not w.get("actorder")
         and (bits, by) in ((4, "group"), (4, "channel"), (8, "channel"), (8, "tensor")),
         "symmetric int4 by group or channel, or int8 by channel or tensor, in order", what)
    if x:
        need(bits == 8 and x.get("dynamic") is True and x.get("num_bits") == 8
             and x.get("type") == "int" and x.get("symmetric") and x.get("strategy") == "token",
             "activations as they are, or beside int8 weights int8 by token, dynamic", x)
    group = int(w.get("group_size") or 0) if by == "group" else 128
    need(group >= 16 and group % 2 == 0, "groups of 16 or more, an even number", group)
    return Quantization("int8_dynamic" if x else f"int{bits}", group, tables="")


def packed_tensors(entries: Mapping[str, Entry], quantization: Quantization,
                   where: str) -> PackedTensors:
    """Makes one tensor of floats of the tensors that each packed layer has.

    Raises:
      UserError: zero points, an order of inputs, scales that do not fit, or a linear layer that is
        not packed.
    """
    bits = FORMATS[quantization.weights].bits
    out, steps = dict(entries), {}
    for name in [name for name in entries if name.endswith(UNREAD)]:
        if not name.endswith(ZERO) or read_tensor(out.pop(name)).any():
            raise UserError("weights with scales alone", name, FIX, where=where)
    for name in [name for name in entries if name.endswith(SCALE)]:
        stem, scale = name.removesuffix(SCALE), out.pop(name)
        is_packed = f"{stem}{PACKED}" in out
        ints = out.pop(f"{stem}{PACKED}" if is_packed else f"{stem}.weight", None)
        told = out.pop(f"{stem}{SHAPE}", None)
        if ints is None or (is_packed and told is None):
            raise UserError(f"the integers of {name}", "none", "fetch it again", where=where)
        shape = tuple(read_tensor(told).tolist()) if is_packed and told else ints.shape
        rows, columns = (*scale.shape, 1, 1)[:2]
        size = group_size(shape[1], quantization.weights, quantization.group)
        fits = rows in (1, shape[0]) and not shape[1] % columns and not shape[1] // columns % size
        if not fits or ints.dtype != ("I32" if is_packed else "I8") or (
                scale.dtype not in STORED_DTYPES):
            raise UserError(f"int{bits} {list(shape)} and float scales of config.json's groups",
                            f"{ints.dtype}, {scale.dtype} {list(scale.shape)}", "fetch it again",
                            where=f"{where} {name}")
        step = functools.partial(_steps, scale, shape)
        read = functools.partial(_floats, ints, step, bits if is_packed else 0)
        out[f"{stem}.weight"] = Entry(ints.file, f"{stem}.weight", shape, "F32", read)
        steps[f"{stem}.weight"] = Entry(scale.file, name, shape, "F32", step)
    return PackedTensors(quantization, out, steps)


def _steps(scale: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each weight, float32 of the weights' shape."""
    scales = read_tensor(scale).astype(np.float32)
    scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
    return np.broadcast_to(np.repeat(scales, shape[1] // scales.shape[1], axis=1), shape)


def _floats(ints: Entry, step: Any, bits: int) -> np.ndarray:
    """The weights, float32. bits: of a weight in int32; 0: each is an int8."""
    steps, stored = step(), read_tensor(ints)
    ints_FI = unpacked_int32(stored, bits, steps.shape[1]) if bits else stored
    return ints_FI.astype(np.float32) * steps


def unpacked_int32(stored: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """Signed integers [F, inputs] from int32 [F, words], which hold each from the low bits up."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    parts = (stored.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return (parts.astype(np.int32) - 2 ** (bits - 1)).reshape(len(stored), -1)[:, :inputs]


def read_packed(found: PackedTensors, model: Model, shardings: Params, table: Table,
                where: str) -> Params:
    """Reads the parameters of a packed model, one matrix of all layers at a time.

    Args:
      found: the tensors.
      model: with the quantization of `found`.
      shardings: of its parameters.
      table: how each parameter of the model without packing is stored.
      where: the directory, for error messages.

    Raises:
      UserError: a linear layer is not packed.
    """
    q = model.quantization
    plain = model.with_quantization(NOT_QUANTIZED)
    which = {path: how for path, how in matrices(plain.functional).items() if packs(path, q)}
    floats, _ = split_tree(plain.shapes, lambda path: path not in which)
    places = dict(named_leaves(shardings))
    out = dict(named_leaves(read_tree(found.entries, floats, _placed(floats, places), table)))
    for path, how in which.items():
        one, _ = split_tree(plain.shapes, path.__eq__)
        if odd := [name for name in tensor_shapes(one, table) if name not in found.steps]:
            raise UserError("linear layers that are all packed", f"{odd[0]}, which is not", FIX,
                            where=where)
        # Whole on every device: one kind of matrix at a time.
        mesh = places[f"{path}/{q.weights}"].mesh
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), one)  # noqa: B023
        w, step = (jax.tree.leaves(read_tree(entries, one, whole, table))[0]
                   for entries in (found.entries, found.steps))
        pack = jax.jit(functools.partial(_packed, how=how, q=q), out_shardings={
            name: places[f"{path}/{name}"] for name in (q.weights, SCALES)})
        out |= {f"{path}/{name}": leaf for name, leaf in pack(w, step).items()}
    names = [name for name, _ in named_leaves(model.shapes)]
    return jax.tree.unflatten(jax.tree.structure(model.shapes), [out[name] for name in names])


def _placed(shapes: Params, places: Mapping[str, Any]) -> Params:
    leaves = [places[name] for name, _ in named_leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _packed(w: jax.Array, step: jax.Array, how: Matrix, q: Quantization) -> dict[str, Any]:
    """A parameter as the integers that it was made of, whose scales `step` holds."""
    w, step = as_matrix(w, how), as_matrix(step, how)
    size = group_size(w.shape[-1], q.weights, q.group)
    w, step = (x.reshape(*x.shape[:-1], -1, size) for x in (w, step))
    ints = jnp.round(w / jnp.where(step == 0, 1, step))
    return as_dict(from_ints(ints, step[..., 0], q.weights))
