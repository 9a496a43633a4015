"""TPU chips, topologies by name, and peak FLOP/s of TPUs and GPUs.

Nothing here imports JAX, because `tpu_compiler` has to run before that.
"""

import dataclasses
import math
import os
import re
from collections.abc import MutableMapping

from lmjax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation, from its public data sheet.

    All rates are per device of JAX: a chip, or one of the two halves of a tpu7x chip.
    """

    name: str
    hbm: float  # bytes that a program may use: a little less than is built in
    flops: float  # peak bf16 FLOP/s
    clock: float  # Hz; the compiler estimates in cycles of this clock
    ici: float  # bytes/s of a collective's ring within a slice: 0.9 of all links
    dcn: float  # bytes/s between slices
    dims: int  # dimensions of the torus
    cores: int  # cores per chip: product names such as v5p-128 count cores
    alone: int  # chips of the largest slice that lies within one host
    devices: int = 1  # devices of JAX per chip


# tpu7x: a chip has 2307 TFLOP/s, 192 GiB, links of 600 GB/s in each direction and 100 Gb/s between
# slices; a device is charged for half of each. Its clock is not published. 2.2 GHz is assumed:
# at that clock four matrix units of 256 x 256 reach the published peak, as on v6e at 1.75 GHz.
CHIPS = {chip.name: chip for chip in (
    Chip("v4", 31.75 * GIB, 275e12, 1.05e9, 270e9, 6.25e9, dims=3, cores=2, alone=4),
    Chip("v5e", 15.75 * GIB, 197e12, 1.50e9, 180e9, 3.125e9, dims=2, cores=1, alone=8),
    Chip("v5p", 95.74 * GIB, 459e12, 1.75e9, 540e9, 6.25e9, dims=3, cores=2, alone=4),
    Chip("v6e", 31.25 * GIB, 918e12, 1.75e9, 360e9, 12.5e9, dims=2, cores=1, alone=8),
    Chip("tpu7x", 94.74 * GIB, 1153.5e12, 2.20e9, 270e9, 6.25e9, dims=3, cores=2, alone=4,
         devices=2),
)}
# Peak dense bf16 FLOP/s by a part of the name that JAX gives a device; the first match counts. The
# GPUs are from NVIDIA's data sheets, in the SXM form where the name does not say.
PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}
# Flags for libtpu (LIBTPU_INIT_ARGS) that runs on a pod start with: by generation, and for several
# slices. libtpu refuses to start with a flag that it does not know. A user's own LIBTPU_INIT_ARGS
# replace all of them.
TPU_FLAGS = {
    "v6e": ("--xla_tpu_scoped_vmem_limit_kib=98304",),  # of 128 MiB: larger tiles per fusion
    # Gradients cross the slow network between slices while the backward pass goes on.
    "slices": ("--xla_tpu_enable_data_parallel_all_reduce_opt=true",
               "--xla_tpu_data_parallel_opt_different_sized_ops=true"),
}
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables that change a compiled program
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}
CHIPS_PER_HOST = 4  # in a slice of several hosts
LONGEST_SIDE = {2: 16, 3: 24}  # chips along the longest side of a slice, by the torus's dimensions
EXAMPLES = "v5e:16x16, v5p-128 (64 chips), 2xv6e:16x16 (two slices) or cpu"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal TPU slices."""

    chip: Chip
    shape: tuple[int, ...]  # the torus of one slice, in chips
    slices: int = 1

    @property
    def chips(self) -> int:
        """The chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The devices of JAX on all chips."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """The name by which libtpu knows one slice: v5p:4x4x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def options(self) -> dict[str, object]:
        """Arguments of `jax.experimental.topologies.get_topology_desc` besides the name."""
        options: dict[str, object] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":  # otherwise each of a chip's two cores is a device
            options["chip_config_name"] = "megacore"
        return options

    @property
    def hosts(self) -> tuple[int, int]:
        """The hosts of one slice, and the chips of each host.

        Raises:
          UserError: nobody offers a slice of this shape, even if the compiler accepts it.
        """
        chips, dims, sides = math.prod(self.shape), self.chip.dims, list(self.shape)
        usual = self.shape == _usual_shape(chips, dims) and chips not in {2: (2,), 3: (1, 2)}[dims]
        blocks = dims == 3 and sides == sorted(sides) and all(side % 4 == 0 for side in sides)
        if not usual and not blocks:
            shapes = {2: "1x1, 2x2, 2x4, 4x4, 4x8 and so on to 16x16",
                      3: "2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 in ascending order"}[dims]
            raise UserError(f"a slice of {self.chip.name} that is on offer: {shapes}", self,
                            "choose one", where="--topology")
        if chips <= self.chip.alone:
            return 1, chips
        return chips // CHIPS_PER_HOST, CHIPS_PER_HOST

    @property
    def flags(self) -> str:
        """The LIBTPU_INIT_ARGS of a run on this topology."""
        of_slices = TPU_FLAGS["slices"] if self.slices > 1 else ()
        return " ".join((*TPU_FLAGS.get(self.chip.name, ()), *of_slices))

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices}x{self.name}"


def parse_topology(text: str) -> Topology:
    """Parses the name of a topology.

    Args:
      text: `v5e:16x16` (a shape), `v5p-128` (the number in a product's name), or `2xv5e:16x16` (two
        slices).

    Raises:
      UserError: no such topology exists.
    """
    text = text.strip()
    if re.fullmatch(r"(\d+x)?(v|tpu)\d\w*-\d+(x\d+)+", text):
        raise UserError("a colon before a shape", repr(text),
                        f"did you mean {text.replace('-', ':')}?", where="--topology")
    found = re.fullmatch(r"(?:(\d+)x)?((?:v|tpu)\d\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if not found or (name := ALIASES.get(found[2], found[2])) not in CHIPS:
        raise _no_topology(text)
    chip, slices = CHIPS[name], int(found[1] or 1)
    if slices < 1:
        raise _no_topology(text, ", which has no slice")
    if found[4]:
        shape = _usual_shape(int(found[4]) / chip.cores, chip.dims)
        if shape is None:
            raise _no_topology(
                text, f", whose {found[4]} is no power of two or too large for one slice")
        return Topology(chip, shape, slices)
    shape, longest = tuple(int(n) for n in found[3].split("x")), LONGEST_SIDE[chip.dims]
    if len(shape) != chip.dims or not 1 <= min(shape) <= max(shape) <= longest:
        raise _no_topology(text, f", but {name} has {chip.dims} dimensions of 1 to {longest} chips")
    return Topology(chip, shape, slices)


def _no_topology(text: str, why: str = "") -> UserError:
    return UserError(f"one such as {EXAMPLES}, of {', '.join(CHIPS)}", f"{text!r}{why}",
                     "correct it", where="--topology")


def peak_flops(device_kind: str) -> float | None:
    """The peak dense bf16 FLOP/s of a device, by JAX's name for it; None if it is not known."""
    return next((flops for name, flops in PEAKS.items()
                 if re.search(rf"\b{name}\b", device_kind)), None)


def _usual_shape(chips: float, dims: int) -> tuple[int, ...] | None:
    """The torus of a slice of so many chips: as cubic as it gets.

    None if `chips` is no power of two, or too large.
    """
    bits = int(chips).bit_length() - 1
    if bits < 0 or chips != 2**bits or bits > 4 * dims:
        return None
    shape = tuple(2 ** (bits // dims + (i >= dims - bits % dims)) for i in range(dims))
    return (2, 2, 1) if shape == (1, 2, 2) else shape  # 2x2x1 is one host


def tpu_compiler(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets libtpu compile on a machine without a TPU. Does nothing once JAX has loaded libtpu."""
    environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
                   TPU_ACCELERATOR_TYPE="v5e-16", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
