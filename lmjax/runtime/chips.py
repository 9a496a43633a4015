"""What a TPU chip can do, and topologies by name. Nothing here imports JAX: `tpu_compiler` has to come before it."""

import dataclasses
import math
import os
import re
from collections.abc import MutableMapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip generation, from its public data sheet; rates per chip.

    hbm: bytes that a program may use (a little less than is built in). flops: peak bf16 FLOP/s. clock: Hz of the
    cycles that the compiler estimates. ici: bytes/s of a collective's ring within a slice, 0.9 of all links. dcn:
    bytes/s between slices. dims: of the torus. cores: what a name such as v5p-128 counts a chip as. alone: the
    most chips that one host has, which then are the whole slice.
    """

    name: str
    hbm: float
    flops: float
    clock: float
    ici: float
    dcn: float
    dims: int
    cores: int
    alone: int


CHIPS = {chip.name: chip for chip in (
    Chip("v4", 31.75 * GIB, 275e12, 1.05e9, 270e9, 6.25e9, dims=3, cores=2, alone=4),
    Chip("v5e", 15.75 * GIB, 197e12, 1.50e9, 180e9, 3.125e9, dims=2, cores=1, alone=8),
    Chip("v5p", 95.74 * GIB, 459e12, 1.75e9, 540e9, 6.25e9, dims=3, cores=2, alone=4),
    Chip("v6e", 31.25 * GIB, 918e12, 1.75e9, 360e9, 12.5e9, dims=2, cores=1, alone=8),
)}
# Peak dense bf16 FLOP/s by a word of what JAX calls the device. Of GPUs from NVIDIA's data sheets, the SXM form where
# the name does not say; the first that fits.
PEAKS = {"TPU v4": CHIPS["v4"].flops, "TPU v5 lite": CHIPS["v5e"].flops, "TPU v5e": CHIPS["v5e"].flops,
         "TPU v5": CHIPS["v5p"].flops, "TPU v5p": CHIPS["v5p"].flops, "TPU v6 lite": CHIPS["v6e"].flops,
         "TPU v6e": CHIPS["v6e"].flops, "B200": 2250e12, "GH200": 989e12, "H200 NVL": 836e12, "H200": 989e12,
         "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
         "L4": 121e12, "A10G": 70e12, "A10": 125e12}
# Flags of libtpu that a run on a pod starts with (LIBTPU_INIT_ARGS), by generation and for several slices. Each is one
# that the compiler knows: it refuses to start with any other. What users set themselves replaces them all.
TPU_FLAGS = {
    "v6e": ("--xla_tpu_scoped_vmem_limit_kib=98304",),  # of 128 MiB: larger tiles a fusion
    "slices": ("--xla_tpu_enable_data_parallel_all_reduce_opt=true",  # gradients cross the slower network beside
               "--xla_tpu_data_parallel_opt_different_sized_ops=true"),  # the backward pass
}
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables that change what a step compiles to
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
HOST = 4  # chips a host of a slice with several
LARGEST = {2: 16, 3: 24}  # the longest side of a slice, by the torus's dimensions
EXAMPLES = "v5e:16x16, v5p-128 (64 chips), 2xv6e:16x16 (two slices) or cpu"


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of `chip`s, each a torus of `shape`."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """The name of one slice, as libtpu knows it: v5p:4x4x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def options(self) -> dict[str, object]:
        """What `jax.experimental.topologies.get_topology_desc` takes besides the name."""
        cores = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}  # else a device a core
        return cores | ({"num_slices": self.slices} if self.slices > 1 else {})

    @property
    def hosts(self) -> tuple[int, int]:
        """Hosts of one slice, and chips of each.

        Raises:
          ValueError: no slice of this shape is to be had, though a program may be compiled for it.
        """
        chips, dims, sides = math.prod(self.shape), self.chip.dims, list(self.shape)
        usual = self.shape == _shape(chips, dims) and chips not in {2: (2,), 3: (1, 2)}[dims]
        blocks = dims == 3 and sides == sorted(sides) and all(side % 4 == 0 for side in sides)
        if not usual and not blocks:
            kinds = {2: "1x1, 2x2, 2x4, 4x4, 4x8 and so on to 16x16",
                     3: "2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 that do not fall"}
            raise ValueError(f"--topology: expected a slice that is to be had, of {self.chip.name} "
                             f"{kinds[dims]}, got {self}; choose one")
        return (1, chips) if chips <= self.chip.alone else (chips // HOST, HOST)

    @property
    def flags(self) -> str:
        """LIBTPU_INIT_ARGS for runs on it."""
        return " ".join((*TPU_FLAGS.get(self.chip.name, ()), *(TPU_FLAGS["slices"] if self.slices > 1 else ())))

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices}x{self.name}"


def parse_topology(text: str) -> Topology:
    """The topology of a name: `v5e:16x16` by shape, `v5p-128` by the number in a product's name, `2xv5e:16x16`.

    Raises:
      ValueError: not a name of a topology that exists.
    """
    def wrong(got: str) -> ValueError:
        return ValueError(f"--topology: expected one such as {EXAMPLES}, of {', '.join(CHIPS)}, got {got}; correct it")

    if re.fullmatch(r"(\d+x)?v\d\w*-\d+(x\d+)+", text.strip()):
        raise ValueError(f"--topology: expected a colon before a shape, got {text!r}; did you mean "
                         f"{text.strip().replace('-', ':')}?")
    found = re.fullmatch(r"(?:(\d+)x)?(v\d\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip())
    if not found or (name := ALIASES.get(found[2], found[2])) not in CHIPS:
        raise wrong(repr(text))
    chip, slices = CHIPS[name], int(found[1] or 1)
    if slices < 1:
        raise wrong(f"{text!r}, which has no slice")
    if found[4]:
        shape = _shape(int(found[4]) / chip.cores, chip.dims)
        if shape is None:
            raise wrong(f"{text!r}, whose {found[4]} is no power of two or too large for one slice")
    else:
        shape = tuple(int(n) for n in found[3].split("x"))
        if len(shape) != chip.dims or not 1 <= min(shape) <= max(shape) <= LARGEST[chip.dims]:
            raise wrong(f"{text!r}, but {name} has {chip.dims} dimensions of 1 to {LARGEST[chip.dims]} chips")
    return Topology(chip, shape, slices)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device that JAX calls `device_kind`; None where it is not known."""
    return next((flops for name, flops in PEAKS.items() if re.search(rf"\b{name}\b", device_kind)), None)


def _shape(chips: float, dims: int) -> tuple[int, ...] | None:
    """The most cubic torus of a power of two of chips, as slices are sold; None where there is none."""
    bits = int(chips).bit_length() - 1
    if bits < 0 or chips != 2**bits or bits > 4 * dims:
        return None
    shape = [2 ** (bits // dims + (i >= dims - bits % dims)) for i in range(dims)]
    if shape == [1, 2, 2]:
        shape = [2, 2, 1]  # one host of v4 or v5p
    return tuple(shape)


def tpu_compiler(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what libtpu needs to compile on a machine without a TPU; a no-op once JAX has loaded it."""
    environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
                   TPU_ACCELERATOR_TYPE="v5e-16", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
