"""Parameter trees from and to Hugging Face tensors, by tables of names.

A table says for each of our leaves which of their tensors holds it and how it lies there:

  ""         in the same shape
  "flat"     in one dimension
  "in,out"   as a matrix whose rows are inputs (GPT-2); "in2,out": our first two dimensions are inputs, "in0": none is
  "out,in"   as a matrix whose rows are outputs (torch.nn.Linear); "out,in2" likewise

A part of a fused matrix or bias is one of several equal shares of its outputs. Every {} in their name stands for an
index into the leading dimensions of ours: layers, experts.
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

from lmjax.huggingface.tensors import DTYPES, Entry, read_tensor
from lmjax.nn.module import Params
from lmjax.tree import named_leaves


class Row(NamedTuple):
    """How one of our leaves lies in theirs. part: (i, n) for the i-th of n equal parts. first: what layer 0's is
    called, where that is not by its number."""

    theirs: str
    how: str = ""
    part: tuple[int, int] = (0, 1)
    first: str = ""

    @property
    def axis(self) -> int:
        """The dimension of theirs that is in parts: the outputs."""
        return 0 if self.how.startswith("out") else -1


Table = Mapping[str, Row]


class _Slot(NamedTuple):
    """One of their tensors, or a part of one, and the piece of our leaf that it is."""

    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]  # of that piece
    row: Row


def tensor_shapes(shapes: Params, table: Table) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of theirs that a tree of our shapes makes, layer by layer."""
    return {name: _their_shape(slots) for name, slots in _slots(shapes, table).items()}


def check_tensors(entries: Mapping[str, Entry], shapes: Params, table: Table, *, where: str,
                  ignore: Sequence[str] = ()) -> None:
    """Refuses a tensor that is missing, left over, of another shape or of no float type, before one is read."""
    expected = tensor_shapes(shapes, table)
    fix = "the weights and config.json belong to different models"
    for name, shape in expected.items():
        if name not in entries:
            raise ValueError(f"{where}: expected tensor {name} {list(shape)}, got none; {fix}")
        if entries[name].shape != shape:
            raise ValueError(f"{where}: expected tensor {name} {list(shape)}, got {list(entries[name].shape)}; {fix}")
        if entries[name].dtype not in DTYPES:
            raise ValueError(f"{where}: expected tensor {name} in {', '.join(DTYPES)}, got {entries[name].dtype}; "
                             "take weights that are not quantised")
    for name in entries.keys() - expected.keys():
        if not any(re.fullmatch(pattern, name) for pattern in ignore):
            raise ValueError(f"{where}: expected only tensors that the model has, got {name} as well; {fix}")


def read_tree(entries: Mapping[str, Entry], shapes: Params, shardings: Params, table: Table) -> Params:
    """Our float32 parameters, each placed as its sharding says. At most one of their tensors is in host memory."""
    by_leaf: dict[str, list[tuple[str, _Slot]]] = {}
    for name, slots in _slots(shapes, table).items():
        for slot in slots:
            by_leaf.setdefault(slot.leaf, []).append((name, slot))
    leaves = []
    for (leaf, shape), (_, sharding) in zip(named_leaves(shapes), named_leaves(shardings), strict=True):
        pieces = by_leaf[leaf]
        lead = len(pieces[0][1].index)
        # A stacked leaf is filled piece by piece where it lives: the host never holds more than one piece of it.
        value = _zeros(shape.shape, sharding) if lead else None
        for name, slot in pieces:
            value = jax.block_until_ready(_place(_ours(read_tensor(entries[name]), slot), value, slot, sharding))
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def tensor_getter(params: Params, table: Table) -> Callable[[str], np.ndarray]:
    """name -> their tensor, float32, brought to the host when it is asked for."""
    leaves = dict(named_leaves(params))
    slots = _slots(params, table)

    def get(name: str) -> np.ndarray:
        parts = [_theirs(np.asarray(leaves[slot.leaf][slot.index] if slot.index else leaves[slot.leaf]), slot)
                 for slot in sorted(slots[name], key=lambda slot: slot.row.part)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=slots[name][0].row.axis)
    return get


def _slots(shapes: Params, table: Table) -> dict[str, list[_Slot]]:
    """Their tensors, in the order of the layers, with what each holds of ours."""
    found: list[tuple[str, _Slot]] = []
    for leaf, shape in named_leaves(shapes):
        if leaf not in table:
            raise ValueError(f"model: expected a model whose parts all have a Hugging Face name, got {leaf}, which has "
                             "none here; choose another model type")
        row = table[leaf]
        lead = row.theirs.count("{}")
        for index in itertools.product(*map(range, shape.shape[:lead])):
            name = row.first if row.first and not any(index) else row.theirs.format(*index)
            found.append((name, _Slot(leaf, index, tuple(shape.shape[lead:]), row)))
    out: dict[str, list[_Slot]] = {}
    for name, slot in sorted(found, key=lambda item: item[1].index):
        out.setdefault(name, []).append(slot)
    return out


def _matrix(slot: _Slot) -> tuple[int, int]:
    """(inputs, outputs) of a matrix kind."""
    split = 2 if "in2" in slot.row.how else 0 if "in0" in slot.row.how else 1
    return math.prod(slot.shape[:split]), math.prod(slot.shape[split:])


def _their_shape(slots: Sequence[_Slot]) -> tuple[int, ...]:
    slot = slots[0]
    shape = list(slot.shape)
    if slot.row.how == "flat":
        shape = [math.prod(shape)]
    elif slot.row.how:
        shape = list(_matrix(slot) if slot.row.how.startswith("in") else _matrix(slot)[::-1])
    shape[slot.row.axis] *= slot.row.part[1]
    return tuple(shape)


def _ours(x: np.ndarray, slot: _Slot) -> np.ndarray:
    part, parts = slot.row.part
    if parts > 1:
        x = np.split(x, parts, axis=slot.row.axis)[part]
    return (x.T if slot.row.how.startswith("out") else x).reshape(slot.shape)


def _theirs(x: np.ndarray, slot: _Slot) -> np.ndarray:
    if slot.row.how.startswith("out"):
        return x.reshape(_matrix(slot)).T
    return x.reshape(_matrix(slot) if slot.row.how.startswith("in") else -1) if slot.row.how else x


def _place(piece: np.ndarray, value: jax.Array | None, slot: _Slot, sharding: Sharding) -> jax.Array:
    """`value` with `piece` in its place, or `piece` itself, in float32."""
    placed = jax.make_array_from_callback(piece.shape, _without(sharding, len(slot.index)), piece.__getitem__)
    return _cast(sharding)(placed) if value is None else _put(sharding)(value, placed, np.array(slot.index, np.int32))


def _without(sharding: Sharding, lead: int) -> Sharding:
    """The sharding of one piece: that of the leaf without its leading dimensions."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[lead:]))


def _zeros(shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)()


@functools.lru_cache(maxsize=64)
def _cast(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(jnp.float32), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _put(sharding: Sharding) -> Callable[..., jax.Array]:
    def put(whole: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
        lead = whole.ndim - piece.ndim
        starts = [index[i] for i in range(lead)] + [0] * piece.ndim
        return jax.lax.dynamic_update_slice(whole, piece.astype(whole.dtype)[(None,) * lead], starts)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
