"""Reads parameters from Hugging Face tensors and writes them back, by tables of names.

"Ours" are lmjax's parameters, "theirs" are the tensors of a Hugging Face checkpoint. A table says
for each of our parameters which of their tensors holds it, and how it lies there (`Stored.how`):

  how        their tensor                                 our parameter
  ""         any shape                                    the same shape
  "flat"     one dimension                                any shape, in C order
  "out,in"   a matrix, rows are outputs (torch.nn.Linear) [inputs, *outputs]
  "out,in2"  the same, for an attention's output          [heads, head size, *outputs]
  "in,out"   a matrix, rows are inputs (GPT-2)            [inputs, *outputs]
  "in2,out"  the same, for an attention's output          [heads, head size, *outputs]
  "in0,out"  a matrix of one row (Marian's logit bias)    [*outputs]

The shapes on the right leave out the leading dimensions of layers and experts.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lmjax.errors import UserError
from lmjax.huggingface.tensors import STORED_DTYPES, Entry, read_tensor
from lmjax.nn.module import Params
from lmjax.tree import named_leaves


class Stored(NamedTuple):
    """How one of our parameters is stored in their tensors."""

    # The tensor's name. Each {} stands for an index into the leading dimensions of our parameter,
    # which are layers and experts: one tensor holds the part of one layer or expert.
    theirs: str
    how: str = ""  # how the parameter lies in the tensor: see the table above
    # (i, n): share i, from 0, of the n shares of a fused tensor's outputs, one after the other. A
    # share is as large as its parameter: that of the queries may be larger than that of the keys.
    part: tuple[int, int] = (0, 1)
    # The name of layer 0's tensor, if it does not follow `theirs`: ModernBERT stores the attention
    # norm of its first layer as the embedding's norm.
    first: str = ""
    # Where each output of ours lies among the outputs of their tensor, if not in the same order.
    order: tuple[int, ...] = ()
    shift: int = 0  # added to the first index: layers before ours are another parameter's

    @property
    def output_axis(self) -> int:
        """The dimension of their tensor that `part` divides: the outputs.

        Rows where rows are outputs; otherwise the last dimension, which is also that of a bias.
        """
        return 0 if self.how.startswith("out") else -1


Table = Mapping[str, Stored]  # path of our parameter -> how it is stored


class _Piece(NamedTuple):
    """The piece of one of our parameters that one of their tensors, or a share of it, holds."""

    path: str  # of the parameter
    at: tuple[int, ...]  # index into the parameter's leading dimensions
    shape: tuple[int, ...]  # of the piece
    row: Stored
    start: int = 0  # where its share of the tensor's outputs begins


def tensor_shapes(shapes: Params, table: Table) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of theirs, for parameters of these shapes.

    Raises:
      UserError: the table has no row for one of the parameters.
    """
    return {name: _their_shape(pieces) for name, pieces in _pieces(shapes, table).items()}


def check_tensors(entries: Mapping[str, Entry], shapes: Params, table: Table, *, where: str,
                  ignore: Sequence[str] = ()) -> None:
    """Checks that the stored tensors are those that the model needs. Reads none of them.

    Args:
      entries: the tensors that are stored, by name.
      shapes: a tree with the shapes of the parameters.
      table: how each parameter is stored.
      where: the directory, for error messages.
      ignore: regular expressions of names that may be stored although the model does not need them.

    Raises:
      UserError: a tensor is missing, is not needed, has another shape, or has a dtype that is not a
        floating-point dtype.
    """
    expected = tensor_shapes(shapes, table)
    fix = "the weights and config.json belong to different models"
    for name, shape in expected.items():
        wanted = f"tensor {name} {list(shape)}"
        if name not in entries:
            raise UserError(wanted, "none", fix, where)
        if entries[name].shape != shape:
            raise UserError(wanted, list(entries[name].shape), fix, where)
        if entries[name].dtype not in STORED_DTYPES:
            raise UserError(f"tensor {name} in {', '.join(STORED_DTYPES)}", entries[name].dtype,
                            "use weights that are not quantised", where)
    for name in entries.keys() - expected.keys():
        if not any(re.fullmatch(pattern, name) for pattern in ignore):
            raise UserError("only tensors that the model has", f"{name} as well", fix, where)


def read_tree(entries: Mapping[str, Entry], shapes: Params, shardings: Params,
              table: Table) -> Params:
    """Reads our parameters (float32), each onto the devices that its sharding names.

    The host never holds more than one of their tensors.
    """
    by_path: dict[str, list[tuple[str, _Piece]]] = {}
    for name, pieces in _pieces(shapes, table).items():
        for piece in pieces:
            by_path.setdefault(piece.path, []).append((name, piece))
    leaves = []
    for (path, shape), (_, sharding) in zip(
            named_leaves(shapes), named_leaves(shardings), strict=True):
        # A parameter that several tensors hold is filled piece by piece on its devices.
        is_stacked = bool(by_path[path][0][1].at)
        value = _zeros(shape.shape, sharding) if is_stacked else None
        for name, piece in by_path[path]:
            array = _ours(read_tensor(entries[name]), piece)
            value = jax.block_until_ready(_place(array, value, piece, sharding))
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def tensor_getter(params: Params, table: Table) -> Callable[[str], np.ndarray]:
    """Returns a function from a tensor's name to that tensor (float32, on the host).

    A tensor is brought to the host only when it is asked for.
    """
    parameters = dict(named_leaves(params))
    pieces = _pieces(params, table)

    def get(name: str) -> np.ndarray:
        shares = []
        for piece in pieces[name]:
            whole = parameters[piece.path]
            shares.append(_theirs(np.asarray(whole[piece.at] if piece.at else whole), piece))
        axis = pieces[name][0].row.output_axis
        joined = shares[0] if len(shares) == 1 else np.concatenate(shares, axis=axis)
        order = np.concatenate([np.array(piece.row.order, int) for piece in pieces[name]])
        return joined if not len(order) else joined.take(np.argsort(order), axis=axis)
    return get


def _pieces(shapes: Params, table: Table) -> dict[str, list[_Piece]]:
    """Their tensors, layer by layer, each with the pieces of our parameters that it holds in order.
    """
    found: list[tuple[str, _Piece]] = []
    for path, shape in named_leaves(shapes):
        if path not in table:
            raise UserError("a model whose parts all have a Hugging Face name",
                            f"{path}, which has none here", "choose another model type", "model")
        row = table[path]
        lead = row.theirs.count("{}")
        for index in itertools.product(*map(range, shape.shape[:lead])):
            piece = _Piece(path, index, tuple(shape.shape[lead:]), row)
            name = row.theirs.format(*_number(piece))
            if row.first and not any(index):
                name = row.first
            found.append((name, piece))
    out: dict[str, list[_Piece]] = {}
    for name, piece in sorted(found, key=lambda item: _number(item[1])):
        out.setdefault(name, []).append(piece)
    for name, pieces in out.items():
        pieces.sort(key=lambda piece: piece.row.part)
        sizes = [_shape(piece)[piece.row.output_axis] for piece in pieces]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        out[name] = [piece._replace(start=at) for piece, at in zip(pieces, starts, strict=True)]
    return out


def _number(piece: _Piece) -> tuple[int, ...]:
    """The numbers of a piece's layer and expert among their tensors."""
    return tuple(i + piece.row.shift * (at == 0) for at, i in enumerate(piece.at))


def _matrix(piece: _Piece) -> tuple[int, int]:
    """(inputs, outputs) of a piece that is stored as a matrix."""
    how = piece.row.how
    split = 2 if "in2" in how else 0 if "in0" in how else 1
    return math.prod(piece.shape[:split]), math.prod(piece.shape[split:])


def _shape(piece: _Piece) -> tuple[int, ...]:
    """The shape of a piece as their tensor holds it."""
    how = piece.row.how
    if how == "flat":
        return (math.prod(piece.shape),)
    if not how:
        return piece.shape
    return _matrix(piece) if how.startswith("in") else _matrix(piece)[::-1]


def _their_shape(pieces: Sequence[_Piece]) -> tuple[int, ...]:
    """The shape of their tensor, which holds these shares of its outputs."""
    shape, axis = list(_shape(pieces[-1])), pieces[-1].row.output_axis
    if shape:
        shape[axis] += pieces[-1].start
    return tuple(shape)


def _ours(x: np.ndarray, piece: _Piece) -> np.ndarray:
    """The piece of our parameter that their tensor `x` holds."""
    axis = piece.row.output_axis
    if piece.row.order:
        x = x.take(piece.row.order, axis=axis)
    elif piece.row.part[1] > 1:
        x = np.moveaxis(np.moveaxis(x, axis, 0)[piece.start:][:_shape(piece)[axis]], 0, axis)
    return (x.T if piece.row.how.startswith("out") else x).reshape(piece.shape)


def _theirs(x: np.ndarray, piece: _Piece) -> np.ndarray:
    """The piece `x` of our parameter, as their tensor holds it."""
    how = piece.row.how
    if not how:
        return x
    if how == "flat":
        return x.reshape(-1)
    matrix = x.reshape(_matrix(piece))
    return matrix if how.startswith("in") else matrix.T


def _place(array: np.ndarray, value: jax.Array | None, piece: _Piece,
           sharding: Sharding) -> jax.Array:
    """Puts `array` into its place in the parameter `value`.

    If `value` is None, `array` becomes the whole parameter.
    """
    placed = jax.make_array_from_callback(
        array.shape, _without(sharding, len(piece.at)), array.__getitem__)
    if value is None:
        return _cast(sharding)(placed)
    return _put(sharding)(value, placed, np.array(piece.at, np.int32))


def _without(sharding: Sharding, lead: int) -> Sharding:
    """The sharding of a parameter without its `lead` leading dimensions."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[lead:]))


def _zeros(shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)()


# `_cast` and `_put` keep one jitted function per sharding. A new one per tensor would be compiled
# for every tensor, since JAX caches compiled programs by function.


@functools.lru_cache(maxsize=64)
def _cast(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(jnp.float32), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _put(sharding: Sharding) -> Callable[..., jax.Array]:
    def put(whole: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
        lead = whole.ndim - piece.ndim
        starts = [index[i] for i in range(lead)] + [0] * piece.ndim
        update = piece.astype(whole.dtype)[(None,) * lead]
        return jax.lax.dynamic_update_slice(whole, update, starts)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
