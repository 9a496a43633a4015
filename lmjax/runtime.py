"""The process: its place among others, its compilation cache, and how it is asked to stop."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils


def start_distributed() -> None:
    """Joins the other processes where the environment names a coordinator; a no-op for a single process.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who takes part. From then
    on an uncaught exception ends this process at once, so that the others notice within seconds.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise ValueError(f"{missing[0]}: expected an integer beside JAX_COORDINATOR_ADDRESS={address}, got "
                         f"{os.environ.get(missing[0])!r}; set it for every process")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(os.environ[names[0]]), int(os.environ[names[1]]))
    sys.excepthook = _die


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, or in ~/.cache/lmjax/xla."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lmjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class StopSignal:
    """Whether this run was asked to stop: SIGTERM (pre-emption) or SIGINT (Ctrl-C)."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False  # set once there is a step to save: until then a signal ends the process at once

    def due(self, step: int) -> bool:
        """True on every process at the same step. Call it once a step."""
        if jax.process_count() > 1:  # the distributed runtime holds SIGTERM and agrees on a step
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received is not None


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Collects SIGTERM and SIGINT while inside; before there is anything to save, and on a second SIGINT, they act."""
    stop = StopSignal()

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and (stop.received == number or not stop.deferred):
            raise KeyboardInterrupt
        if not stop.deferred:
            raise SystemExit(0)
        stop.received = number

    if jax.process_count() > 1:
        yield stop
        return
    before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die(kind: type[BaseException], error: BaseException, trace: object) -> None:
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)  # a normal exit waits for the other processes, which wait for this one
