"""Checkpoints that describe and check themselves, written by Orbax in the background.

A checkpoint DIR/<step>/ holds `params`, `opt_state`, `ema` (if on) and `about`: the resolved
recipe, the position in the data, the tokenizer, versions and a checksum of every array. Nothing
else is needed to load it, on any number of devices; nothing in it is ever executed or unpickled.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from lmjax.errors import UserError, first_line
from lmjax.nn.module import Params
from lmjax.runtime.distributed import agreed
from lmjax.runtime.files import when_full
from lmjax.training.checksums import checksums, non_finite, verify
from lmjax.training.state import StateSpec, TrainState
from lmjax.tree import named_leaves, num_bytes, split_tree

FORMAT = 1
COMMITTED = "commit_success.txt"  # Orbax writes it when a checkpoint is complete
AGAIN = "make room and run the same command again, it goes on from the last complete one"
# Files of Orbax that log an exception of a save's thread once per thread, each with a traceback.
ORBAX_SAVES = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")
About = dict[str, Any]
T = TypeVar("T")


class Checkpointer:
    """Saves to and restores from the checkpoints of one directory.

    A checkpoint counts only once its commit file is there, so after a kill while saving, the one
    before is the newest. Old checkpoints are deleted only after a newer one is complete.

    Args:
      directory: a path or a URL.
      keep_last: how many of the newest checkpoints stay.
      keep_every: those at multiples of so many steps stay as well; 0: none.
      log: told of damaged checkpoints.

    Attributes:
      completed: called with the step of each checkpoint that `note` finds complete.
      kept: the step of a checkpoint that stays, however old; 0: none.
      saving: the step whose checkpoint is on its way; 0: none.
      newest: the newest step whose checkpoint this start has seen complete.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 2, keep_every: int = 0,
                 log: Callable[[str], None] = print):
        self.directory, self.log = epath.Path(directory), log
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError("a directory of checkpoints", "a file", "move it away",
                            where=str(directory))
        self.completed: Callable[[int], None] = lambda step: None
        self.kept = self.saving = self.newest = 0
        logging.getLogger("absl").addFilter(_is_not_raised)
        self._keep = [policies.LatestN(keep_last), _Kept(self),
                      *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        self.manager, self._is_spoilt = self._manager(), False  # spoilt: by a save that failed

    def save(self, state: TrainState, about: About) -> None:
        """Copies the state to host memory and returns; writing goes on in the background.

        Args:
          state: what to save. A step that is saved already is not saved again.
          about: recipe, data, tokenizer and versions of the run. Step and checksums are added.

        Raises:
          OSError: the disk has no room. Nothing is deleted; earlier checkpoints stay.
        """
        step = int(state.step)
        self._reopen()
        if step in self.manager.all_steps():
            self.newest = max(self.newest, step)
            return
        trees = _trees(state, with_frozen="base" not in about)
        self.wait()  # Orbax saves one step at a time; only after that the free room is known
        agreed(lambda: self._check_room(num_bytes(trees), step))
        about = {**about, "format": FORMAT, "step": step,
                 "checksums": {item: checksums(tree) for item, tree in trees.items()}}
        about["sha256"] = _digest(about)
        items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()}
        with when_disk_full(self.directory):
            self.manager.save(step, force=True, args=ocp.args.Composite(
                about=ocp.args.JsonSave(about), **items))
        self.saving = step

    def restore(self, spec: StateSpec, check: Callable[[About], None],
                abandon: int = 0) -> tuple[TrainState, About] | None:
        """Restores the newest checkpoint that is not damaged.

        A damaged one is logged and renamed to damaged-<step>, and the one before it is taken.

        Args:
          spec: the shapes and shardings of the state.
          check: raises if the checkpoint that this `about` describes must not be restored. Called
            before any array is read.
          abandon: if every checkpoint is damaged and none is newer than this step, all are set
            aside instead of raising.

        Returns:
          (state, about), or None if there is no checkpoint at all, or all were set aside.

        Raises:
          UserError: every checkpoint is damaged, or one holds other arrays than `spec`.
        """
        damaged: dict[int, str] = {}
        self._reopen()
        for step in agreed(lambda: sorted(map(int, self.manager.all_steps()), reverse=True)):
            try:
                found = read_state(self.directory / str(step), spec, check)
            except Damaged as error:
                damaged[step] = str(error)
                self.log(f"checkpoint {self.directory / str(step)} is damaged and not used: "
                         f"{error}")
                continue
            for bad in damaged:
                self._set_aside(bad)
            self.newest = step
            return found
        if damaged and max(damaged) > abandon:
            raise UserError("a readable checkpoint", f"{len(damaged)} damaged, the newest with: "
                            f"{damaged[max(damaged)]}", "restore one from a backup, start in "
                            "another --workdir, or give them up and begin at step 0 with "
                            f"--config.checkpoint.abandon={max(damaged)}",
                            where=str(self.directory))
        for bad in damaged:
            self._set_aside(bad)
        return None

    def with_weights_of(self, step: int, spec: StateSpec, state: TrainState) -> TrainState:
        """Returns `state` with the weights of the checkpoint of `step`, their average included.

        Raises:
          UserError: it is not there, or is damaged.
        """
        self.wait()
        if not self._is_complete(step):
            raise UserError(f"the checkpoint of the best step, {step}", "none", "bring it back, or "
                            "train in another --workdir", where=str(self.directory))
        held = spec.frozen is not None and not spec.frozen.base  # the frozen ones, too
        shapes = _trees(spec.shapes._replace(opt_state=()), held)
        found = {name: restore_params(self.directory / str(step), tree, name=name)
                 for name, tree in shapes.items()}
        if held and spec.frozen is not None:
            found = {name: split_tree(tree, spec.frozen.accepts)[1]
                     for name, tree in found.items()}
        return state._replace(**found)

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        if not self._is_spoilt:
            with when_disk_full(self.directory):
                self.manager.wait_until_finished()
            self.note()

    def note(self) -> None:
        """Tells `completed` of the checkpoint that was on its way, if it has become complete.

        Raises:
          OSError: it could not be written.
        """
        if self.saving and not self.manager.is_saving_in_progress():
            step, self.saving = self.saving, 0
            with when_disk_full(self.directory):  # the thread's error, now and not at the next save
                self.manager.wait_until_finished()
            if self._is_complete(step):
                self.newest = step
                self.completed(step)

    def renew(self) -> None:
        """Forgets a save that has failed; the next one removes what is left of it."""
        self.saving, self._is_spoilt = 0, True  # Orbax would wait for what cannot end

    def close(self) -> None:
        """Waits as `wait` does, then frees the background threads."""
        self.wait()
        if not self._is_spoilt:
            self.manager.close()

    def _reopen(self) -> None:
        if self._is_spoilt:
            self.manager, self._is_spoilt = self._manager(), False

    def _manager(self) -> ocp.CheckpointManager:
        """Opens the directory; what is left of unfinished saves is removed."""
        atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
        return ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(self._keep), atomicity_options=
                atomicity, cleanup_tmp_directories=True, enable_async_checkpointing=True))

    def _is_complete(self, step: int) -> bool:
        return (self.directory / str(step) / COMMITTED).exists()

    def _set_aside(self, step: int) -> None:
        def rename() -> None:
            names = [f"damaged-{step}", *(f"damaged-{step}.{i}" for i in range(1, 1000))]
            free = next(name for name in names if not (self.directory / name).exists())
            (self.directory / str(step)).rename(self.directory / free)

        agreed(rename)
        self.manager.reload()

    def _check_room(self, size: int, step: int) -> None:
        """Refuses a checkpoint that a local disk may not hold; compressed it may need less."""
        if self.newest and not self._is_complete(self.newest):
            raise FileNotFoundError(
                f"{self.directory}: expected the checkpoint of step {self.newest}, which this run "
                f"has saved, got none before saving step {step}; bring the directory or its mount "
                "back and run the same command again")
        if not os.path.isdir(self.directory):  # a bucket
            return
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OSError(errno.ENOSPC, f"checkpoint of step {step}: expected {size / 1e6:.0f} MB "
                          f"free in {self.directory}, got {free / 1e6:.0f} MB; {AGAIN}")


def read_state(path: epath.Path, spec: StateSpec,
               check: Callable[[About], None]) -> tuple[TrainState, About]:
    """Reads a checkpoint as `Checkpointer.restore` does; raises `Damaged` if it is."""
    target = _trees(spec.shapes, spec.frozen is not None and not spec.frozen.base)
    about = _attempt(lambda: read_about(path))
    check(about)
    _check_names(path, target, about)
    # With a handler, as Orbax's checkpointers wait for all processes, even for one that failed.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        trees = _attempt(lambda: {
            item: _fresh(handler.restore(path / item, args=ocp.args.StandardRestore(shapes)))
            for item, shapes in target.items()})
    _attempt(lambda: verify(trees, about["checksums"]))
    if bad := non_finite(trees):
        raise Damaged(f"{bad} is not finite")
    return _state(spec, about["step"], trees), about


def read_about(path: str | os.PathLike) -> About:
    """Reads the `about` of the checkpoint directory `path`.

    Raises:
      UserError: it is missing, damaged or of a newer format.
    """
    file = epath.Path(path) / "about" / "metadata"
    if not file.exists():
        raise UserError("a checkpoint of lmjax", f"no {file.name} in about/", "check the path",
                        where=str(path))
    try:
        about = json.loads(file.read_text())
        recorded = about.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or no object
        raise UserError("a JSON object with its sha256", first_line(error), "the file is damaged",
                        where=str(file)) from None
    if _digest(about) != recorded:
        raise UserError(f"sha256 {recorded}", _digest(about), "the file is damaged",
                        where=str(file))
    if about["format"] != FORMAT:
        raise UserError(f"checkpoint format {FORMAT}", about["format"], "update lmjax",
                        where=str(file))
    return about


def restore_params(path: str | os.PathLike, shapes: Params, *, name: str = "params") -> Params:
    """Reads one tree of a checkpoint directory and verifies its checksums.

    Args:
      path: the directory of one checkpoint.
      shapes: `ShapeDtypeStruct`s with shardings, on any devices.
      name: "params" or "ema".

    Raises:
      UserError: the checkpoint is damaged.
    """
    about = read_about(path)
    try:
        tree = ocp.StandardCheckpointer().restore(epath.Path(path) / name, shapes)
    except Exception as error:  # noqa: BLE001
        raise UserError("readable arrays", first_line(error), "the checkpoint is damaged, take "
                        "another one", where=str(path)) from None
    verify({name: tree}, about["checksums"])
    return tree


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, oldest first."""
    path = epath.Path(directory)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir()
                  if p.name.isdigit() and (p / COMMITTED).exists())


def when_disk_full(directory: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Raises an OSError that says what to do where the block meets a full disk."""
    return when_full(OSError(errno.ENOSPC, f"{directory}: expected room for a checkpoint, got a "
                             f"full disk; {AGAIN}"))


class _Kept:
    """The preservation policy that keeps the checkpoint of step `checkpointer.kept`."""

    def __init__(self, checkpointer: Checkpointer):
        self.checkpointer = checkpointer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns, per checkpoint, whether to keep it."""
        return [checkpoint.step == self.checkpointer.kept for checkpoint in checkpoints]


class Damaged(Exception):
    """A checkpoint cannot be read, or its arrays are not those that were saved."""


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Whether a line of the log tells more than an error of a background save, raised anyway."""
    return record.exc_info is None or record.filename not in ORBAX_SAVES


def _attempt(read: Callable[[], T]) -> T:
    """Returns what `read` returns; raises `Damaged` on all processes if any of them fails."""
    error: str | None = None
    value = cast(T, None)
    try:
        value = read()
    except Exception as exception:  # noqa: BLE001 - a damaged file makes readers raise anything
        if isinstance(exception, MemoryError) or "Out of memory" in str(exception):
            raise  # says nothing about the checkpoint
        error = first_line(exception)
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.asarray(error is None))
        if error is None and not np.all(fine):
            error = "another process could not read it"
    if error is not None:
        raise Damaged(error)
    return value


def _check_names(path: epath.Path, target: Mapping[str, Any], about: About) -> None:
    """Refuses a checkpoint of other arrays. It is not damaged: other code wrote it."""
    for item, tree in target.items():
        names = {name for name, _ in named_leaves(tree)}
        saved = set(about["checksums"].get(item, ()))
        if names != saved:
            raise UserError(f"the arrays of this run in {item}", f"{sorted(saved - names)[:3]} too "
                            f"many and {sorted(names - saved)[:3]} too few", "use the lmjax that "
                            f"wrote it, {about['versions']}, or another --workdir",
                            where=str(path))


def _trees(state: TrainState, with_frozen: bool) -> dict[str, Any]:
    """Splits a state into the items of a checkpoint.

    Frozen parameters lie among the others, unless they are those of a base model, which the
    checkpoint names. Optax's tuples become a flat dict, which can be read without Optax.
    """
    whole = state.whole if with_frozen else lambda params: params
    trees = {"params": whole(state.params)}
    if state.opt_state:  # imported weights have none
        trees["opt_state"] = dict(_flat(state.opt_state))
    return trees if state.ema is None else {**trees, "ema": whole(state.ema)}


def _state(spec: StateSpec, step: int, trees: Mapping[str, Any]) -> TrainState:
    """The inverse of `_trees`; frozen parameters of a base model are left out."""
    shapes, params, ema, frozen = spec.shapes, trees["params"], trees.get("ema"), None
    if spec.frozen is not None and not spec.frozen.base:
        frozen, params = split_tree(params, spec.frozen.accepts)
        ema = ema and split_tree(ema, spec.frozen.accepts)[1]
    leaves = [trees["opt_state"][name] for name, _ in _flat(shapes.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(shapes.opt_state), leaves)
    placed = jax.device_put(np.int32(step), shapes.step.sharding)
    return TrainState(placed, params, opt_state, ema, frozen)


def _flat(opt_state: Any) -> list[tuple[str, Any]]:
    return [(name.replace("/", "."), leaf) for name, leaf in named_leaves(opt_state)]


def _fresh(tree: Any) -> Any:
    """Copies arrays on a CPU: those that alias a reader's memory cannot be donated to the step."""
    return jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree


def _digest(about: About) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
