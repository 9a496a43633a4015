"""Meshes, and the rules that place named axes on them.

A parameter names its axes, and so does an activation. A rule maps each name to mesh axes. Another
parallelism strategy is another mesh shape or another rule, never another model.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.config import at_least
from lmjax.errors import UserError

# From the slowest links to the fastest: `tensor` has the most frequent collectives.
MESH_AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")

# Axis name -> the mesh axes that split it, outermost first. () keeps it whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp", "expert"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor", "stage"),  # all stages share the work of the loss
    "layers": ("stage",),
    "experts": ("expert",),
    "expert_embed": ("fsdp",),  # `embed` in the experts' matrices, which `experts` splits already
    "router": (),
    "latent": (),  # the ranks of latent attention
    "rank": (),  # of adapters: too small to be split
    "norm": (),  # scales and biases: too small to be worth an all-gather
    "positions": (),
    "outputs": (),  # of a task's head
    # activations
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "stream_seq": ("context", "tensor"),  # the residual stream, with its norms and sums
    "kv_seq": (),
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_vocab": ("tensor", "stage"),
    "act_experts": ("expert",),
    "expert_batch": ("data", "fsdp"),  # the batch once its tokens have moved to their experts
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; -1, on at most one, takes the remaining devices.

    The axes and what each one splits:

    | axis | splits | known as |
    | --- | --- | --- |
    | data | the batch; weights are the same along it | data parallelism |
    | stage | the layers, and the vocabulary of the loss | pipeline parallelism |
    | fsdp | the batch and the weights | ZeRO-3, fully sharded data parallelism |
    | expert | the experts; everything else as along fsdp | expert parallelism |
    | context | the sequence | context parallelism |
    | tensor | heads, MLP and vocabulary; the residual stream's sequence | tensor parallelism |
    """

    data: int = -1
    stage: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    # Rules that replace rows of RULES: {"kv_heads": []} if there are fewer KV heads than `tensor`.
    rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1:
            raise UserError("-1 on at most one mesh axis", f"{sizes} for {MESH_AXES}",
                            "fix the others", where="data")
        at_least(1, **{a: n for a, n in zip(MESH_AXES, sizes, strict=True) if n != -1})
        for name, axes in self.rules.items():
            if name not in RULES or any(axis not in MESH_AXES for axis in axes):
                known = f"a name of {', '.join(RULES)} with axes of {', '.join(MESH_AXES)}"
                raise UserError(known, f"{name!r}: {list(axes)}", "correct the name",
                                where=f"rules.{name}")


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as a key of compiled programs
class Layout:
    """A mesh and the rules that place named axes on it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    def on(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes, larger than 1, that split the axis `name`; outermost first."""
        return tuple(axis for axis in self.rules[name] if self.mesh.shape[axis] > 1) if name else ()

    def ways(self, name: str | None) -> int:
        """The number of parts into which the axis `name` is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.on(name))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """Maps the names of an array's dimensions to a `PartitionSpec`.

        Args:
          axes: one name per dimension; None leaves a dimension unsplit.
          shape: the array's shape, to check that every dimension can be divided.

        Raises:
          UserError: a name without a rule, a rank other than the shape's, a dimension that its mesh
            axes do not divide, or a mesh axis on two dimensions.
        """
        if shape is not None and len(shape) != len(axes):
            raise UserError(f"a name for each dimension of shape {tuple(shape)}", tuple(axes),
                            "name every one", where="axes")
        entries: list[tuple[str, ...] | str | None] = []
        used: list[str] = []
        for i, name in enumerate(axes):
            if name is not None and name not in self.rules:
                raise UserError(f"one of {', '.join(self.rules)}", "a name without a rule",
                                "add a row to RULES", where=f"axis {name!r}")
            on, ways = self.on(name), self.ways(name)
            if shape is not None and shape[i] % ways:
                fix = f"change the mesh or map {name!r} elsewhere in mesh.rules"
                raise UserError(f"{'*'.join(on)}={ways} to divide {name}={shape[i]}",
                                f"a remainder of {shape[i] % ways}", fix, where="mesh")
            if len({*used, *on}) < len(used) + len(on):
                raise UserError(
                    f"each mesh axis on at most one of the dimensions {tuple(axes)}",
                    f"{'*'.join(on)} for {name!r} after {used}", "map one of the names elsewhere",
                    where="mesh.rules")
            used += on
            entries.append(on if len(on) > 1 else (on[0] if on else None))
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None],
                 shape: Sequence[int] | None = None) -> NamedSharding:
        """The `spec` of these axes, bound to the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def tree(self, axes: Any, shapes: Any) -> Any:
        """A sharding per leaf of `shapes`; `axes` is a tree of axis-name tuples, equally nested."""
        return jax.tree.map(lambda leaf, names: self.sharding(names, leaf.shape), shapes, axes)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that puts a whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Makes the mesh of `config` over `devices` (default: all of them), with its rules.

    Raises:
      UserError: the product of the axes is not the number of devices, or an axis other than `data`
        would have to cross TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {a: len(devices) // fixed if n == -1 else n for a, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        shown = ", ".join(f"{a}={n}" for a, n in sizes.items())
        raise UserError(f"axes whose product is the {len(devices)} devices present",
                        f"{shown} (a multiple of {fixed})",
                        "set one axis to -1 or change the others", where="config.mesh")
    # JAX's default became Explicit; here the compiler propagates shardings from `constrain`.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    mesh = Mesh(_arranged(tuple(sizes.values()), devices), MESH_AXES, axis_types=auto)
    # A new rule for one of these parameter axes holds for the activation that it makes, too.
    names = ("mlp", "heads", "kv_heads", "vocab", "experts")
    follow = {f"act_{name}": axes for name, axes in config.rules.items() if name in names}
    return Layout(mesh, {**RULES, **follow, **config.rules})


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges the devices in the mesh's shape.

    As far as the torus allows, neighbours along a mesh axis are neighbours on it. Only `data`, the
    first axis, crosses TPU slices.
    """
    # GPUs have a slice_index too, one per host, but no torus that would end there.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise UserError(f"a multiple of the {slices} slices, which only data goes across", sizes[0],
                        "change it", where="config.mesh.data")
    across = (slices, *[1] * (len(sizes) - 1))
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(within, across, devices,
                                                allow_split_physical_axes=True)


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)
_MICROBATCHES: ContextVar[int] = ContextVar("microbatches", default=1)


@contextlib.contextmanager
def use_layout(layout: Layout | None, microbatches: int = 1) -> Iterator[None]:
    """Sets the layout by which `constrain` places activations while a program is traced.

    Args:
      layout: None places nothing.
      microbatches: number of parts of a batch that pass through the pipeline one after another.
    """
    tokens = _LAYOUT.set(layout), _MICROBATCHES.set(microbatches)
    try:
        yield
    finally:
        _LAYOUT.reset(tokens[0])
        _MICROBATCHES.reset(tokens[1])


def current_layout() -> Layout | None:
    """The layout that `use_layout` has set; None outside of it."""
    return _LAYOUT.get()


def current_microbatches() -> int:
    """The number of microbatches that `use_layout` has set; 1 outside of it."""
    return _MICROBATCHES.get()


def platform() -> str:
    """The platform of the current layout, else JAX's default: "cpu", "gpu" or "tpu"."""
    layout = _LAYOUT.get()
    return jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform


def device_kind() -> str:
    """JAX's name for the devices of the current layout or, without one, of JAX: "TPU v5 lite"."""
    layout = _LAYOUT.get()
    return (jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]).device_kind


def num_devices() -> int:
    """The number of devices of the current layout; 1 outside of one."""
    layout = _LAYOUT.get()
    return 1 if layout is None else layout.mesh.size


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how to shard `x`; does nothing outside a layout or on one device.

    Args:
      x: an activation.
      axes: the name of each of its dimensions; None leaves a dimension unsplit.
    """
    layout = _LAYOUT.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))
