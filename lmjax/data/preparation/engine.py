"""Runs the stages of data preparation on all cores, in bounded memory, and none of them twice.

A stage writes one folder. The folder has a temporary name until it is complete, and it holds a
receipt: what the stage was made from, by which versions, and a hash of the result. A stage whose
receipt matches what would be made now is not run again. Stages are built from two operations:

  map    calls a function on every shard, in parallel.
  group  brings the records of all shards together by key. The records of each shard are sorted and
         spilled to disk; then ranges of keys are processed, each small enough for the memory limit.

Results come in the order of the shards or of the keys. The written bytes are therefore the same for
any number of workers and any memory limit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import lmjax
from lmjax.data.preparation.workers import Workers
from lmjax.data.store import canonical

Log = Callable[[str], None]
SAMPLED_KEYS = 1024  # per spilled file, to find ranges of keys with equally many records
COPIES = 6  # of a range's records that exist at once while they are sorted and reduced
PACKAGES = ("lmjax", "numpy", "pyarrow", "sentencepiece", "tensorstore", "ftfy")


class Stage(NamedTuple):
    """A finished stage: its folder and its receipt."""

    folder: str
    receipt: dict[str, Any]

    @property
    def name(self) -> str:
        return self.receipt["stage"]

    @property
    def facts(self) -> Any:
        """What `build` returned, as JSON values."""
        return self.receipt["facts"]

    @property
    def digest(self) -> str:
        """The hash of everything that the stage wrote."""
        return self.receipt["output"]

    def path(self, name: str) -> str:
        """The path of a file of the stage."""
        return os.path.join(self.folder, name)


class Engine:
    """Runs stages in one folder, which no other process may use at the same time.

    Args:
      folder: where the folders of the stages are.
      workers: number of processes; 0 takes one per core.
      memory_mib: limit for the records that all processes hold at once.
      log: called with each line of progress.
    """

    def __init__(self, folder: str, *, workers: int = 0, memory_mib: int = 2048, log: Log = print):
        self.folder, self.log = folder, log
        self.workers = Workers(workers or len(os.sched_getaffinity(0)))
        self.memory = memory_mib << 20

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.workers.close()

    def stage(self, name: str, config: Any, inputs: Mapping[str, str],
              build: Callable[[str], Any], *, describe: Callable[[Any], str] = str) -> Stage:
        """Runs the stage `name`, or finds that it was finished before.

        Args:
          name: of the stage, and of its folder.
          config: the settings that decide the result, as JSON values.
          inputs: a digest per input.
          build: writes into the folder that it is given, and returns facts (JSON values).
          describe: turns the facts into a line for the log.
        """
        made_of = {"stage": name, "config": config, "inputs": dict(inputs), "versions": versions()}
        key = hashlib.sha256(canonical(made_of).encode()).hexdigest()
        folder = os.path.join(self.folder, name)
        receipt = _read_receipt(folder)
        if receipt.get("key") == key:
            self.log(f"prepare: {name}: done before")
            return Stage(folder, receipt)
        temporary = f"{folder}.partial"
        for old in (folder, temporary):
            shutil.rmtree(old, ignore_errors=True)
        os.makedirs(temporary)
        start = time.monotonic()
        try:
            facts = json.loads(json.dumps(build(temporary)))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, this makes room
            raise
        files = sorted(os.path.relpath(os.path.join(at, file), temporary)
                       for at, _, names in os.walk(temporary) for file in names)
        digests = self.map(_digest, [os.path.join(temporary, file) for file in files])
        seconds = time.monotonic() - start
        receipt = made_of | {
            "key": key, "facts": facts, "seconds": round(seconds, 3), "workers": self.workers.count,
            "bytes": sum(os.path.getsize(os.path.join(temporary, file)) for file in files),
            "peak_mib": self.workers.peak_mib(),
            "output": hashlib.sha256(canonical([files, digests]).encode()).hexdigest(),
        }
        with open(os.path.join(temporary, "receipt.json"), "w") as out:
            json.dump(receipt, out, indent=1, ensure_ascii=False)
        os.rename(temporary, folder)
        self.log(f"prepare: {name}: {describe(facts)} ({seconds:.1f} s)")
        return Stage(folder, receipt)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Returns `[function(item) for item in items]`; see `Workers.map`."""
        return self.workers.map(function, items)

    def group(self, emit: Callable[[Any], np.ndarray], items: Sequence[Any],
              reduce: Callable[[np.ndarray], np.ndarray], folder: str) -> list[str]:
        """Brings the records of all items together by key.

        Args:
          emit: turns an item into records, uint64 [columns, n]; the first column is the key.
          reduce: turns all records of a range of keys into other records [columns, m]. It gets them
            sorted by key; records with equal keys are in the order in which they were emitted.
          folder: for the spilled records; it is made here, and the caller removes it.
        Returns:
          .npy files of reduced records, in the order of their keys.
        """
        os.makedirs(folder, exist_ok=True)
        spilled = [os.path.join(folder, f"run-{i:06}.npy") for i in range(len(items))]
        samples = self.map(functools.partial(_emit, emit), list(zip(items, spilled, strict=True)))
        size = sum(map(os.path.getsize, spilled))
        ranges = self.ranges(samples, size, folder)
        self.map(functools.partial(_reduce, reduce, spilled), ranges)
        for file in spilled:
            os.remove(file)
        return [path for _, _, path in ranges]

    def ranges(self, samples: Sequence[np.ndarray], size: int,
               folder: str) -> list[tuple[int, int | None, str]]:
        """Cuts the keys into ranges whose records fit into memory.

        Args:
          samples: evenly spaced keys of each spilled file.
          size: of all records, in bytes.
          folder: for the files of the ranges.
        Returns:
          per range its first key, the first key of the next range (None for the last range), and
          the file for its result.
        """
        parts = -(-size * COPIES * self.workers.count // self.memory) or 1
        keys = np.sort(np.concatenate([*samples, np.zeros(0, np.uint64)]))
        cuts = {int(keys[i * len(keys) // parts]) for i in range(1, parts)} if len(keys) else set()
        bounds = sorted(cuts - {0})
        return [(low, high, os.path.join(folder, f"part-{p:06}.npy"))
                for p, (low, high) in enumerate(zip([0, *bounds], [*bounds, None], strict=True))]

    def sort(self, files: Sequence[str], folder: str, out: str) -> int:
        """Sorts the records of .npy files by key, drops repeated ones and writes them to one file.

        Args:
          files: .npy files of records, uint64 [columns, n].
          folder: for spilled records; the caller removes it.
          out: the .npy file to write.
        Returns:
          the number of records that are left.
        """
        parts = self.group(np.load, files, _unique, folder)
        loaded = [np.load(part, mmap_mode="r") for part in parts]
        total, columns = sum(part.shape[1] for part in loaded), loaded[0].shape[0]
        # Not through a memory map: a write to one kills the process if the disk is full.
        with open(out, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {
                "descr": np.lib.format.dtype_to_descr(loaded[0].dtype), "fortran_order": False,
                "shape": (columns, total)})
            for column in range(columns):
                for part in loaded:
                    file.write(np.ascontiguousarray(part[column]).data)
        return total


def versions() -> dict[str, str]:
    """Returns the versions of everything that decides the bytes of a stage."""
    return {"python": platform.python_version(), "unicode": unicodedata.unidata_version,
            **lmjax.installed(*PACKAGES)}


def _read_receipt(folder: str) -> dict[str, Any]:
    """Returns the receipt of a finished stage, or {} if there is none."""
    try:
        with open(os.path.join(folder, "receipt.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def between(rows: np.ndarray, first: int, last: int, shift: int = 0) -> np.ndarray:
    """Returns the columns of sorted records [c, n] with `first <= key >> shift < last`."""
    low, high = np.searchsorted(rows[0], np.array([first << shift, last << shift], np.uint64))
    return np.asarray(rows[:, low:high])


def sort_by_key(rows: np.ndarray) -> np.ndarray:
    """Sorts records [c, n] by key; records with equal keys keep their order."""
    return rows[:, np.argsort(rows[0], kind="stable")]


def sample_keys(key_N: np.ndarray) -> np.ndarray:
    """Returns at most `SAMPLED_KEYS` evenly spaced ones of sorted keys, as uint64."""
    at = np.linspace(0, len(key_N) - 1, min(SAMPLED_KEYS, len(key_N))).astype(np.int64)
    return key_N[at].astype(np.uint64)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _emit(emit: Callable[[Any], np.ndarray], task: tuple[Any, str]) -> np.ndarray:
    item, path = task
    rows = sort_by_key(emit(item))
    np.save(path, rows)
    return sample_keys(rows[0])


def _reduce(reduce: Callable[[np.ndarray], np.ndarray], spilled: Sequence[str],
            task: tuple[int, int | None, str]) -> None:
    low, high, path = task
    pieces = []
    for file in spilled:
        rows = np.load(file, mmap_mode="r")
        first = np.searchsorted(rows[0], np.uint64(low))
        last = rows.shape[1] if high is None else np.searchsorted(rows[0], np.uint64(high))
        pieces.append(np.array(rows[:, first:last]))  # a copy, so that the file's pages are freed
    np.save(path, reduce(sort_by_key(np.concatenate(pieces, axis=1))))


def _unique(rows: np.ndarray) -> np.ndarray:
    new = np.ones(rows.shape[1], bool)
    new[1:] = (rows[:, 1:] != rows[:, :-1]).any(axis=0)
    return rows[:, new]
