"""Meshes and the two tables that place arrays on them.

A parameter and an activation name their axes; a rule maps each name to mesh axes. Another strategy is
another mesh shape or another row in `rules`, never another model.
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

# Order is outermost (slowest links) to innermost: `tensor` collectives are the most frequent.
MESH_AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")

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
    "expert_embed": ("fsdp",),  # `embed` of the experts' matrices, which `experts` splits already
    "router": (),
    "norm": (),  # scales and biases: too small to be worth an all-gather
    "positions": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "stream_seq": ("context", "tensor"),  # of the residual stream: its norms and sums (sequence parallelism)
    "kv_seq": (),
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_vocab": ("tensor", "stage"),
    "act_experts": ("expert",),
    "expert_batch": ("data", "fsdp"),  # rows that are with the experts that they chose
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes what the others leave.

    data: replicas of the weights, each with its share of the batch.
    stage: the layers are split along this axis, a pipeline through which the step's microbatches go.
    fsdp: the batch and the weights are both split along this axis (ZeRO-3).
    expert: the experts are split along this axis, and everything else as along fsdp.
    context: the sequence is split along this axis.
    tensor: heads, MLP and vocabulary are split along this axis, and the sequence where these do not come in.
    rules: rows that replace those of `RULES`, e.g. {"kv_heads": []} when there are fewer than `tensor`.
    """

    data: int = -1
    stage: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1:
            raise ValueError(f"data: expected -1 on at most one mesh axis, got {sizes} for {MESH_AXES}; fix the others")
        at_least(1, **{a: n for a, n in zip(MESH_AXES, sizes, strict=True) if n != -1})
        for name, axes in self.rules.items():
            if name not in RULES or any(axis not in MESH_AXES for axis in axes):
                raise ValueError(f"rules.{name}: expected a name of {', '.join(RULES)} with axes of "
                                 f"{', '.join(MESH_AXES)}, got {name!r}: {list(axes)}; correct the name")


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as a key of compiled programs
class Layout:
    """A mesh and the rules that place named axes on it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]

    def on(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of more than one device that `name` is split over, outermost first."""
        return tuple(axis for axis in self.rules[name] if self.mesh.shape[axis] > 1) if name else ()

    def ways(self, name: str | None) -> int:
        """Into how many parts `name` is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.on(name))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """The `PartitionSpec` of an array whose dimensions are named `axes` (None: not sharded).

        Raises:
          ValueError: an unknown name, a rank that differs, a dimension that its mesh axes do not divide, or a mesh
            axis on two dimensions.
        """
        if shape is not None and len(shape) != len(axes):
            raise ValueError(f"axes: expected a name for each dimension of shape {tuple(shape)}, got {tuple(axes)}; "
                             "name every one")
        entries, used = [], []
        for i, name in enumerate(axes):
            if name is not None and name not in self.rules:
                raise ValueError(f"axis {name!r}: expected one of {', '.join(self.rules)}, got a name without a rule; "
                                 "add a row to RULES")
            on, ways = self.on(name), self.ways(name)
            if shape is not None and shape[i] % ways:
                raise ValueError(f"mesh: expected {'*'.join(on)}={ways} to divide {name}={shape[i]}, got a remainder "
                                 f"of {shape[i] % ways}; change the mesh or map {name!r} elsewhere in mesh.rules")
            if len({*used, *on}) < len(used) + len(on):
                raise ValueError(f"mesh.rules: expected each mesh axis on at most one of the dimensions {tuple(axes)}, "
                                 f"got {'*'.join(on)} for {name!r} after {used}; map one of the names elsewhere")
            used += on
            entries.append(on if len(on) > 1 else (on[0] if on else None))
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        """`spec` bound to the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def tree(self, axes: Any, shapes: Any) -> Any:
        """A sharding for every leaf of `shapes`, from a tree of axis-name tuples of the same structure."""
        return jax.tree.map(lambda leaf, names: self.sharding(names, leaf.shape), shapes, axes)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that puts a whole copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh of `config` over `devices` (default: all of them), with its rules.

    Raises:
      ValueError: the axes' product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {a: len(devices) // fixed if n == -1 else n for a, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        shown = ", ".join(f"{a}={n}" for a, n in sizes.items())
        raise ValueError(f"config.mesh: expected axes whose product is the {len(devices)} devices present, got {shown} "
                         f"(a multiple of {fixed}); set one axis to -1 or change the others")
    # Explicit axis types became JAX's default; lmjax constrains by name and lets the compiler propagate.
    mesh = Mesh(_placed(tuple(sizes.values()), devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    # An activation follows the parameter axis that it comes from, unless it has a row of its own.
    names = ("mlp", "heads", "kv_heads", "vocab", "experts")
    follow = {f"act_{name}": axes for name, axes in config.rules.items() if name in names}
    return Layout(mesh, {**RULES, **follow, **config.rules})


def _placed(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape: neighbours on the torus along each axis, slices only along `data`, the first."""
    # GPUs have a slice_index too, one for each host, but no torus that would end there.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(f"config.mesh.data: expected a multiple of the {slices} slices, which only data goes across, "
                         f"got {sizes[0]}; change it")
    across = (slices, *[1] * (len(sizes) - 1))
    return mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), across, devices,
                                                allow_split_physical_axes=True)


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)
_MICROBATCHES: ContextVar[int] = ContextVar("microbatches", default=1)


@contextlib.contextmanager
def use_layout(layout: Layout | None, microbatches: int = 1) -> Iterator[None]:
    """While tracing inside, `constrain` places activations by `layout`, and the layers, where they are split over
    stages, take a batch in `microbatches` parts."""
    tokens = _LAYOUT.set(layout), _MICROBATCHES.set(microbatches)
    try:
        yield
    finally:
        _LAYOUT.reset(tokens[0])
        _MICROBATCHES.reset(tokens[1])


def current_layout() -> Layout | None:
    """The layout that is being traced for, if any."""
    return _LAYOUT.get()


def current_microbatches() -> int:
    """The parts in which the batch that is being traced for goes through the stages; 1 without stages."""
    return _MICROBATCHES.get()


def platform() -> str:
    """The platform that is being traced for: that of the layout, else JAX's default ("cpu", "gpu", "tpu")."""
    layout = _LAYOUT.get()
    return jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform


def device_kind() -> str:
    """What the devices that are being traced for call themselves, such as "TPU v5 lite"."""
    layout = _LAYOUT.get()
    return (jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]).device_kind


def num_devices() -> int:
    """Devices of the layout that is being traced for; 1 outside one."""
    layout = _LAYOUT.get()
    return 1 if layout is None else layout.mesh.size


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler where `x`, whose dimensions are named `axes`, lives. A no-op outside a layout."""
    layout = _LAYOUT.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))


