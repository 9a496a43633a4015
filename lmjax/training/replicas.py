"""Whether devices that should hold the same values do: one flipped bit is found, and its device."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.training.checksums import sums_of
from lmjax.training.state import TrainState
from lmjax.tree import named_leaves

HASHES = "replica_hashes"  # the name among a step's metrics of what `hashes` gives


class Replicated(NamedTuple):
    """An array of the state of which several devices hold the same part."""

    name: str
    groups: list[list[int]]  # devices, as places in the mesh, that hold the same part


class Differing(NamedTuple):
    """A device whose part of an array is not what other devices hold."""

    array: str
    device: jax.Device
    is_sure: bool  # most devices with this part agree; else any of those named may be wrong

    def __str__(self) -> str:
        return f"{self.array} on device {self.device.id} of process {self.device.process_index}"


def replicated(state: TrainState) -> list[Replicated]:
    """The arrays of a state (or of its shapes, with shardings) that have replicas."""
    return [Replicated(name, groups) for name, leaf in named_leaves(state)
            if (groups := _groups(leaf.sharding, leaf.shape))]


@functools.cache  # the loop asks at every comparison, of every array
def _groups(sharding: NamedSharding, shape: tuple[int, ...]) -> list[list[int]]:
    """The devices, as places in the mesh, that hold the same part of an array; none alone."""
    parts = defaultdict(list)
    places = sharding.devices_indices_map(shape)
    for place, device in enumerate(sharding.mesh.devices.flat):
        parts[tuple((s.start, s.stop) for s in places[device])].append(place)
    return [group for group in parts.values() if len(group) > 1]


def hashes(state: TrainState) -> jax.Array | None:
    """Hashes what each device holds of each replicated array; None if there is none.

    Returns:
      uint32 [devices, arrays, 2], whole on every process. The computation is only dispatched. It
      has one collective, which gathers the hashes.
    """
    names = {array.name for array in replicated(state)}
    leaves = [leaf for name, leaf in named_leaves(state) if name in names]
    if not leaves:
        return None
    mesh = leaves[0].sharding.mesh
    return _hashes(mesh, tuple(leaf.sharding.spec for leaf in leaves))(leaves)


@functools.cache
def _hashes(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list], jax.Array]:
    def own(leaves: list[jax.Array]) -> jax.Array:
        return sums_of(leaves)[None]

    each = jax.shard_map(own, mesh=mesh, in_specs=(list(specs),),
                         out_specs=PartitionSpec(mesh.axis_names), check_vma=False)
    return jax.jit(each, out_shardings=NamedSharding(mesh, PartitionSpec()))


def differing(found: jax.Array | None, state: TrainState) -> list[Differing]:
    """Returns which devices differ from the others, from what `hashes` gave.

    Args:
      found: waited for here.
      state: the same, or its shapes with shardings.
    """
    if found is None:
        return []
    hashed, bad = np.asarray(found), []
    devices = named_leaves(state)[0][1].sharding.mesh.devices.flatten()
    for number, array in enumerate(replicated(state)):
        for group in array.groups:
            values = [tuple(hashed[place, number].tolist()) for place in group]
            (usual, count), *others = Counter(values).most_common()
            if not others:
                continue
            is_sure = 2 * count > len(group)
            bad += [Differing(array.name, devices[place], is_sure)
                    for place, value in zip(group, values, strict=True)
                    if value != usual or not is_sure]
    return bad


def described(bad: Sequence[Differing]) -> str:
    """What differs, in words."""
    first, devices = bad[0], {item.device.id for item in bad}
    arrays = {item.array for item in bad}
    more = f" and {len(arrays) - 1} more arrays" if len(arrays) > 1 else ""
    if first.is_sure:
        said = f"{first}{more} is not what the other replicas hold"
        return said + (f"; devices at fault: {sorted(devices)}" if len(devices) > 1 else "")
    return (f"the replicas of {first.array}{more} differ, and no majority says which is right, on "
            f"devices {sorted(devices)}")
