"""Runs the stages that turn text into training data: all cores, bounded memory, nothing done twice.

A stage writes one folder. It comes into being under another name and is renamed when whole, with a receipt: what
it was made from, by what, and what came out. A stage whose receipt says that the same would be made again is not
run again. A stage is made of two things:

  map    a function of one shard, run on all cores;
  group  the shards' records brought together by key: each shard's are sorted and spilled to disk, and the ranges of
         keys are then worked on one after the other, each small enough for the memory that there is.

Results come in the order of the shards or of the keys. So the bytes are the same for any number of workers, and for
any memory.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import queue
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.store import canonical

Log = Callable[[str], None]
SAMPLED_KEYS = 1024  # of each run of records, to find ranges of keys that hold as much
COPIES = 6  # of a range's records that exist at once while it is sorted and reduced
VERSIONS = ("lmjax", "numpy", "pyarrow", "sentencepiece", "tensorstore", "ftfy")


class Stage(NamedTuple):
    """A finished stage: its folder and its receipt."""

    folder: str
    receipt: dict[str, Any]

    @property
    def facts(self) -> Any:
        """What `build` returned, as JSON values."""
        return self.receipt["facts"]

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


class Engine:
    """Stages in one folder, which nobody else may be using.

    Args:
      folder: where the stages lie.
      workers: processes; 0 is one for each core.
      memory_mib: what all of them may hold in records at once.
      log: called with each line of progress.
    """

    def __init__(self, folder: str, *, workers: int = 0, memory_mib: int = 2048, log: Log = print):
        self.folder, self.log = folder, log
        self.workers = workers or len(os.sched_getaffinity(0))
        self.memory = memory_mib << 20
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def stage(self, name: str, config: Any, inputs: Mapping[str, str], build: Callable[[str], Any], *,
              describe: Callable[[Any], str] = str) -> Stage:
        """Makes the stage `name`, or finds it made.

        Args:
          config: what decides its result besides the inputs: JSON values.
          inputs: a digest for each input.
          build: writes into the folder that it is given, and returns facts (JSON values) for the receipt.
          describe: the facts in words, for the log.
        """
        made_of = {"stage": name, "config": config, "inputs": dict(inputs), "versions": versions()}
        key = hashlib.sha256(canonical(made_of).encode()).hexdigest()
        folder = os.path.join(self.folder, name)
        receipt = read_receipt(folder)
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
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for what comes next
            raise
        files = sorted(os.path.relpath(os.path.join(at, file), temporary)
                       for at, _, names in os.walk(temporary) for file in names)
        digests = self.map(_digest, [os.path.join(temporary, file) for file in files])
        seconds = time.monotonic() - start
        receipt = made_of | {
            "key": key, "facts": facts, "seconds": round(seconds, 3), "workers": self.workers,
            "bytes": sum(os.path.getsize(os.path.join(temporary, file)) for file in files),
            "peak_mib": _peak_mib(self._started),
            "output": hashlib.sha256(canonical([files, digests]).encode()).hexdigest(),
        }
        with open(os.path.join(temporary, "receipt.json"), "w") as out:
            json.dump(receipt, out, indent=1, ensure_ascii=False)
        os.rename(temporary, folder)
        self.log(f"prepare: {name}: {describe(facts)} ({seconds:.1f} s)")
        return Stage(folder, receipt)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """[function(item) for item in items], in the workers; both have to be picklable."""
        workers = min(self.workers, len(items))
        if workers < 2:
            return [function(item) for item in items]
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            try:
                return list(threads.map(functools.partial(self._call, function), items))
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def group(self, emit: Callable[[Any], np.ndarray], items: Sequence[Any],
              reduce: Callable[[np.ndarray], np.ndarray], folder: str) -> list[str]:
        """Brings records together by key.

        Args:
          emit: of an item: records, uint64 [columns, n]; the first column is the key.
          reduce: of all records whose keys lie in a range, sorted by key and for equal keys in the order in which
            they were emitted: records [columns, m] of any kind.
          folder: made, for the spilled records; the caller removes it.
        Returns:
          .npy files of what was reduced, in the order of the keys.
        """
        os.makedirs(folder, exist_ok=True)
        runs = [os.path.join(folder, f"run-{i:06}.npy") for i in range(len(items))]
        samples = self.map(functools.partial(_emit, emit), list(zip(items, runs, strict=True)))
        size = sum(map(os.path.getsize, runs))
        ranges = self.ranges(samples, size, folder)
        self.map(functools.partial(_reduce, reduce, runs), ranges)
        for run in runs:
            os.remove(run)
        return [path for _, _, path in ranges]

    def ranges(self, samples: Sequence[np.ndarray], size: int, folder: str) -> list[tuple[int, int | None, str]]:
        """(first key, first of the next, file to be written) of ranges of keys that fit into memory.

        samples: keys of each run of records. size: of all records, in bytes.
        """
        parts = -(-size * COPIES * self.workers // self.memory) or 1
        keys = np.sort(np.concatenate([*samples, np.zeros(0, np.uint64)]))
        bounds = sorted({int(keys[i * len(keys) // parts]) for i in range(1, parts)} - {0}) if len(keys) else []
        return [(low, high, os.path.join(folder, f"part-{p:06}.npy"))
                for p, (low, high) in enumerate(zip([0, *bounds], [*bounds, None], strict=True))]

    def sort(self, files: Sequence[str], folder: str, out: str) -> int:
        """Sorts the records of .npy files by key, drops repeated ones, writes one file; returns how many are left."""
        parts = self.group(np.load, files, _unique, folder)
        loaded = [np.load(part, mmap_mode="r") for part in parts]
        total, columns = sum(part.shape[1] for part in loaded), loaded[0].shape[0]
        with open(out, "wb") as file:  # not through a memory map: a disk that is full then kills the process
            np.lib.format.write_array_header_1_0(file, {
                "descr": np.lib.format.dtype_to_descr(loaded[0].dtype), "fortran_order": False,
                "shape": (columns, total)})
            for column in range(columns):
                for part in loaded:
                    file.write(np.ascontiguousarray(part[column]))
        return total

    def _call(self, function: Callable[[Any], Any], item: Any) -> Any:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _start_worker()
            self._started.append(process)
        try:
            pickle.dump((function, item), process.stdin)
            process.stdin.flush()
            ok, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            process.wait()
            raise ValueError(f"prepare: expected a worker to finish, got one that ended with {process.returncode} "
                             "(-9: most likely out of memory); lower data.curate.memory_mib or "
                             "data.curate.workers") from error
        self._idle.put(process)
        if not ok:
            raise result
        return result


def versions() -> dict[str, str]:
    """Of what decides the bytes of a stage."""
    found = {"python": platform.python_version(), "unicode": unicodedata.unidata_version}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_receipt(folder: str) -> dict[str, Any]:
    """The receipt of a finished stage, {} where there is none."""
    try:
        with open(os.path.join(folder, "receipt.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def between(rows: np.ndarray, first: int, last: int, shift: int = 0) -> np.ndarray:
    """The columns of sorted records [c, n] whose key >> shift is in [first, last)."""
    low, high = np.searchsorted(rows[0], np.array([first << shift, last << shift], np.uint64))
    return np.asarray(rows[:, low:high])


def work() -> None:
    """The loop of a worker process: it ends when its parent does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the results
    while True:
        try:
            function, item = pickle.load(tasks)
        except EOFError:
            return
        try:
            result = True, function(item)
        except Exception as error:  # handed to the parent, whatever it is
            result = False, error
        pickle.dump(result, results)
        results.flush()


def _start_worker() -> subprocess.Popen:
    # Not multiprocessing: a fork would copy JAX's locks, and its other ways run the user's own script once more.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", "from lmjax.data.preparation.engine import work; work()"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _peak_mib(workers: Sequence[subprocess.Popen]) -> int:
    """The most memory that any one process has held so far, this one or one of its workers.

    Where there is no /proc, workers that still live are not counted.
    """
    try:
        return max(_held_kib(process) for process in ("self", *(worker.pid for worker in workers))) >> 10
    except OSError:
        return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) >> 10


def _held_kib(process: int | str) -> int:
    with open(f"/proc/{process}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM:")), 0)  # a zombie has none


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _emit(emit: Callable, task: tuple[Any, str]) -> np.ndarray:
    item, path = task
    rows = emit(item)
    rows = rows[:, np.argsort(rows[0], kind="stable")]
    np.save(path, rows)
    return sample_keys(rows[0])


def sample_keys(key_N: np.ndarray) -> np.ndarray:
    """Some of sorted keys, evenly: uint64."""
    at = np.linspace(0, len(key_N) - 1, min(SAMPLED_KEYS, len(key_N))).astype(np.int64)
    return key_N[at].astype(np.uint64)


def _reduce(reduce: Callable, runs: Sequence[str], task: tuple[int, int | None, str]) -> None:
    low, high, path = task
    pieces = []
    for run in runs:
        rows = np.load(run, mmap_mode="r")
        first = np.searchsorted(rows[0], np.uint64(low))
        last = rows.shape[1] if high is None else np.searchsorted(rows[0], np.uint64(high))
        pieces.append(np.array(rows[:, first:last]))  # a copy: pages of every run that was searched would add up
    rows = np.concatenate(pieces, axis=1)
    np.save(path, reduce(rows[:, np.argsort(rows[0], kind="stable")]))


def _unique(rows: np.ndarray) -> np.ndarray:
    new = np.ones(rows.shape[1], bool)
    new[1:] = (rows[:, 1:] != rows[:, :-1]).any(axis=0)
    return rows[:, new]
