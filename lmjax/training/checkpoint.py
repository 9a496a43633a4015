"""Checkpoints that explain and check themselves, written by Orbax in the background.

A checkpoint DIR/<step>/ holds `params`, `opt_state`, `ema` (if on) and `about`: the resolved recipe, data
position, tokenizer, versions and a checksum of every array. Nothing else is needed to load it, on any
number of devices; nothing in it is ever executed or unpickled.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from lmjax.errors import first_line
from lmjax.nn.module import Params
from lmjax.runtime.distributed import agreed
from lmjax.runtime.files import when_full
from lmjax.training.state import StateSpec, TrainState
from lmjax.tree import named_leaves, num_bytes

FORMAT = 1
About = dict[str, Any]
T = TypeVar("T")


class Checkpointer:
    """Saves to and restores from the checkpoints of one directory.

    A checkpoint counts only once its commit file is there, so a kill in mid-save leaves the older ones as
    the newest. Old ones go only after a newer one is complete.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 2, keep_every: int = 0,
                 log: Callable[[str], None] = print):
        self.directory, self.log = epath.Path(directory), log
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{directory}: expected a directory of checkpoints, got a file; move it away")
        keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
        self.manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep), atomicity_options=atomicity,
            cleanup_tmp_directories=True, enable_async_checkpointing=True))

    def save(self, state: TrainState, about: About) -> None:
        """Copies the state to host memory and returns; the writing goes on in the background.

        about: `recipe`, `data`, `tokenizer` and `versions` of the run; step and checksums are added.

        Raises:
          OSError: the disk has no room (nothing is deleted, earlier checkpoints stay).
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        trees = _trees(state)
        self.wait()  # Orbax would, too: one save at a time. What is free is known only then
        agreed(lambda: self._check_room(num_bytes(trees), step))
        about = {**about, "format": FORMAT, "step": step, "checksums": {k: checksums(v) for k, v in trees.items()}}
        about["sha256"] = _digest(about)
        with _when_full(self.directory):
            self.manager.save(step, args=ocp.args.Composite(
                about=ocp.args.JsonSave(about), **{k: ocp.args.StandardSave(v) for k, v in trees.items()}), force=True)

    def restore(self, spec: StateSpec, check: Callable[[About], None]) -> tuple[TrainState, About] | None:
        """The newest checkpoint that is whole, placed as `spec` says; None if there is none at all.

        One that is damaged is reported, set aside as damaged-<step>, and the one before it is taken.

        check: raises if a checkpoint that is about this is not to be restored; called before its arrays are read.

        Raises:
          ValueError: there are checkpoints and not one of them can be read, or they hold other arrays than `spec`.
        """
        damaged: list[tuple[int, str]] = []
        for step in agreed(lambda: sorted(map(int, self.manager.all_steps()), reverse=True)):
            found, error = self._try(step, spec, check)
            if error is None:
                for bad, _ in damaged:
                    self._set_aside(bad)
                return found
            damaged.append((step, error))
            self.log(f"checkpoint {self.directory / str(step)} is damaged and not used: {error}")
        if damaged:
            raise ValueError(f"{self.directory}: expected a readable checkpoint, got {len(damaged)} damaged, the "
                             f"newest with: {damaged[0][1]}; restore one from a backup or start in another --workdir")
        return None

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        with _when_full(self.directory):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then frees the background threads."""
        self.wait()
        self.manager.close()

    def _try(self, step: int, spec: StateSpec,
             check: Callable[[About], None]) -> tuple[tuple[TrainState, About] | None, str | None]:
        path, target = self.directory / str(step), _trees(spec.shapes)
        about, error = _attempt(lambda: read_about(path))
        if error:
            return None, error
        check(about)
        _check_names(path, target, about)
        # By a handler: Orbax's checkpointers then wait for all processes, also for one that could not read.
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            trees, error = _attempt(lambda: {k: _fresh(handler.restore(path / k, args=ocp.args.StandardRestore(v)))
                                             for k, v in target.items()})
        if error is None:
            _, error = _attempt(lambda: verify(trees, about))
        return (None, error) if error else ((_state(spec.shapes, step, trees), about), None)

    def _set_aside(self, step: int) -> None:
        def rename() -> None:
            names = [f"damaged-{step}", *(f"damaged-{step}.{i}" for i in range(1, 1000))]
            free = next(name for name in names if not (self.directory / name).exists())
            (self.directory / str(step)).rename(self.directory / free)

        agreed(rename)
        self.manager.reload()

    def _check_room(self, size: int, step: int) -> None:
        """Refuses before the first byte what would fill a local disk (compression may need less)."""
        if not os.path.isdir(self.directory):  # a bucket
            return
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OSError(errno.ENOSPC, f"checkpoint of step {step}: expected {size / 1e6:.0f} MB free in "
                                        f"{self.directory}, got {free / 1e6:.0f} MB; make room and run the same "
                                        "command again, it goes on from the last complete one")


def read_about(path: str | os.PathLike) -> About:
    """The `about` of the checkpoint directory `path`.

    Raises:
      ValueError: it is missing, damaged or of a newer format.
    """
    file = epath.Path(path) / "about" / "metadata"
    if not file.exists():
        raise ValueError(f"{path}: expected a checkpoint of lmjax, got no {file.name} in about/; check the path")
    try:
        about = json.loads(file.read_text())
        recorded = about.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or no object
        raise ValueError(f"{file}: expected a JSON object with its sha256, got {first_line(error)}; the file is "
                         "damaged") from None
    if _digest(about) != recorded:
        raise ValueError(f"{file}: expected sha256 {recorded}, got {_digest(about)}; the file is damaged")
    if about["format"] != FORMAT:
        raise ValueError(f"{file}: expected checkpoint format {FORMAT}, got {about['format']}; update lmjax")
    return about


def restore_params(path: str | os.PathLike, shapes: Params, *, name: str = "params") -> Params:
    """The `name` tree ("params" or "ema") of one checkpoint directory, checked against its checksums.

    shapes: `ShapeDtypeStruct`s with shardings; the devices need not be those that saved.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    about = read_about(path)
    try:
        tree = ocp.StandardCheckpointer().restore(epath.Path(path) / name, shapes)
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{path}: expected readable arrays, got {first_line(error)}; the checkpoint is damaged, "
                         "take another one") from None
    verify({name: tree}, about)
    return tree


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the complete checkpoints in `directory`, oldest first."""
    path = epath.Path(directory)
    if not path.is_dir():
        return []
    done = [int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "commit_success.txt").exists()]
    return sorted(done)


def checksums(tree: Any) -> dict[str, str]:
    """name -> 64-bit checksum of every array's bits, the same however the array is sharded.

    Each element's bits are mixed with its index by a bijection and the results are added modulo 2^32,
    twice with different constants: the order of a sum of integers does not matter, so devices add up
    their own shards, and any one element that changes changes the sum.
    """
    names, leaves = zip(*named_leaves(tree), strict=True)
    mesh = getattr(leaves[0].sharding, "mesh", None)
    sums = np.asarray(_checksums_on(mesh)(list(leaves)))
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in zip(names, sums, strict=True)}


def verify(trees: Mapping[str, Any], about: About) -> None:
    """Raises a ValueError that names the first array whose bits are not those that were saved."""
    for item, tree in trees.items():
        expected, got = about["checksums"][item], checksums(tree)
        for name in expected:
            if expected[name] != got.get(name):
                raise ValueError(f"{item}/{name}: expected checksum {expected[name]}, got {got.get(name)}; "
                                 "the checkpoint is damaged")


@functools.cache
def _checksums_on(mesh: Mesh | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(_checksums, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """uint32 [leaves, 2], whole on every process."""

    def mix(x: jax.Array, constant: int) -> jax.Array:  # the finalizer of MurmurHash3, a bijection
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(constant)
        return x ^ (x >> 16)

    def one(leaf: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, width)
        bits = bits.astype(jnp.uint32)
        index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
        for d in reversed(range(leaf.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, d) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[d]
        bits = bits + index * jnp.uint32(0x9E3779B9)
        return jnp.stack([jnp.sum(mix(bits, c), dtype=jnp.uint32) for c in (0xC2B2AE35, 0x27D4EB2F)])

    return jnp.stack([one(leaf) for leaf in leaves])


def _attempt(read: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what `read` returns, None), or (None, the error) on all processes if it raises on any of them."""
    value, error = None, None
    try:
        value = read()
    except Exception as exception:  # noqa: BLE001 - whatever a damaged file makes a reader raise
        if isinstance(exception, MemoryError) or "Out of memory" in str(exception):
            raise  # says nothing about the checkpoint
        error = first_line(exception)
    if jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.asarray(error is None))):
        error = error or "another process could not read it"
    return (value, None) if error is None else (None, error)


def _check_names(path: epath.Path, target: Mapping[str, Any], about: About) -> None:
    """Refuses a checkpoint of other arrays, which is no damage: another version of the code wrote it."""
    for item, tree in target.items():
        names, saved = {name for name, _ in named_leaves(tree)}, set(about["checksums"].get(item, ()))
        if names != saved:
            raise ValueError(f"{path}: expected the arrays of this run in {item}, got {sorted(saved - names)[:3]} too "
                             f"many and {sorted(names - saved)[:3]} too few; use the lmjax that wrote it, "
                             f"{about['versions']}, or another --workdir")


def _trees(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint. Optax's tuples become a flat dict, readable without Optax."""
    trees = {"params": state.params}
    if state.opt_state:  # weights that were imported have none
        trees["opt_state"] = dict(_flat(state.opt_state))
    return trees if state.ema is None else {**trees, "ema": state.ema}


def _state(shapes: TrainState, step: int, trees: Mapping[str, Any]) -> TrainState:
    leaves = [trees["opt_state"][name] for name, _ in _flat(shapes.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(shapes.opt_state), leaves)
    placed = jax.device_put(np.int32(step), shapes.step.sharding)
    return TrainState(placed, trees["params"], opt_state, trees.get("ema"))


def _flat(opt_state: Any) -> list[tuple[str, Any]]:
    return [(name.replace("/", "."), leaf) for name, leaf in named_leaves(opt_state)]


def _fresh(tree: Any) -> Any:
    """On a CPU, copies made by XLA: arrays that alias a reader's memory cannot be donated to the step."""
    return jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree


def _digest(about: About) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _when_full(directory: epath.Path) -> contextlib.AbstractContextManager[None]:
    return when_full(OSError(errno.ENOSPC, f"{directory}: expected room for a checkpoint, got a full disk; make room "
                                           "and run the same command again, it goes on from the last complete one"))
