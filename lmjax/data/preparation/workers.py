"""A pool of worker processes that call functions in parallel.

The workers are plain subprocesses that exchange pickles through their pipes. `multiprocessing`
would either fork, which copies JAX's locks in whatever state they are, or run the user's own script
again.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lmjax.errors import UserError


class Workers:
    """At most `count` processes, each started when it is first needed."""

    def __init__(self, count: int):
        self.count = count
        self.started: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Returns `[function(item) for item in items]`, computed by the workers.

        The function, the items and the results must be picklable. With one worker or one item, the
        calls run in this process.

        Raises:
          UserError: a worker was killed, most likely because memory ran out.
          Exception: whatever `function` raised.
        """
        threads = min(self.count, len(items))
        if threads < 2:
            return [function(item) for item in items]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            try:
                return list(pool.map(functools.partial(self._call, function), items))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def close(self) -> None:
        """Kills all workers."""
        for process in self.started:
            process.kill()
            process.wait()
            assert process.stdin and process.stdout
            process.stdin.close()
            process.stdout.close()

    def peak_mib(self) -> int:
        """Returns the largest memory that any one process has held so far: this one or a worker.

        Without /proc, workers that are still alive are not counted.
        """
        processes: list[int | str] = ["self", *(worker.pid for worker in self.started)]
        try:
            return max(map(held_kib, processes)) >> 10
        except OSError:
            who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
            return max(resource.getrusage(group).ru_maxrss for group in who) >> 10

    def _call(self, function: Callable[[Any], Any], item: Any) -> Any:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _start()
            self.started.append(process)
        assert process.stdin and process.stdout
        try:
            pickle.dump((function, item), process.stdin)
            process.stdin.flush()
            ok, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            process.wait()
            raise UserError("a worker to finish", f"one that ended with {process.returncode} "
                            "(-9: most likely out of memory)",
                            "lower data.curate.memory_mib or data.curate.workers",
                            where="prepare") from error
        self._idle.put(process)
        if not ok:
            raise result
        return result


def held_kib(process: int | str) -> int:
    """Returns the most memory that a process has held, in KiB; 0 for a process that has ended."""
    with open(f"/proc/{process}/status") as file:
        lines = [line for line in file if line.startswith("VmHWM:")]  # a zombie has none
    return int(lines[0].split()[1]) if lines else 0


def work() -> None:
    """The loop of a worker process. It ends when the parent process ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which kills us
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries go to stderr, away from the results
    while True:
        try:
            function, item = pickle.load(tasks)
        except EOFError:
            return
        try:
            result = True, function(item)
        except Exception as error:  # raised again in the parent
            result = False, error
        pickle.dump(result, results)
        results.flush()


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-c", "from lmjax.data.preparation.workers import work; work()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
