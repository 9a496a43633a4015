"""The process: its place among others, its compilation cache, how it is asked to stop, and directories it makes."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
from jax._src.distributed import global_state  # its client is the key-value store, which has no public name
from jax.experimental import multihost_utils

T = TypeVar("T")
Explain = Callable[[BaseException], tuple[int, str]]  # the exit code and the line of an error
WEEK_MS = 7 * 24 * 3600 * 1000  # longer than any preparation: what fails meanwhile ends the wait
LOOK_SECONDS = 0.5  # between looks at whether a process has failed
FAREWELL_SECONDS = 5.0  # for the others to learn of it before the coordinator goes
_FAILED, _HEARD = "lmjax/failed", "lmjax/heard"  # folders of the store
_turns = itertools.count()


@contextlib.contextmanager
def together(explain: Explain) -> Iterator[None]:
    """Runs the block with the other processes that the environment names; they end together.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who takes part. Whatever one
    of them raises ends all, within seconds and wherever they wait: each prints the line of the first error, as
    `explain` words it, and exits with its code. Without a coordinator there is just the block.

    Raises:
      ValueError: the environment names a coordinator and does not say who this process is.
    """
    if not _join():
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), name="lmjax-watch", daemon=True)
    watch.start()
    try:
        yield
        # Nobody stops listening while another can still fail.
        global_state.client.wait_at_barrier("lmjax/done", WEEK_MS)
    except (Exception, KeyboardInterrupt) as error:
        code, line = explain(error)
        if code == 1 or os.environ.get("LMJAX_TRACEBACK"):
            traceback.print_exception(error)
        failure = json.dumps([code, f"process {global_state.process_id}: {line}"])
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
            global_state.client.key_value_set(f"{_FAILED}/first", failure)
        watch.join()  # it ends this process like the others
        os._exit(code)
    done.set()
    watch.join()


def agreed(do: Callable[[], T]) -> T:
    """What `do` returns on process 0, a JSON value: the others wait for it. What it raises there ends all."""
    if global_state.client is None:
        return do()
    key = f"lmjax/agreed/{next(_turns)}"
    if global_state.process_id == 0:
        global_state.client.key_value_set(key, json.dumps(do()))
    return json.loads(global_state.client.blocking_key_value_get(key, WEEK_MS))


def _watch(done: threading.Event) -> None:
    """Ends this process once any has failed, whatever its main thread waits for."""
    client, process = global_state.client, global_state.process_id
    while not done.wait(LOOK_SECONDS):
        failures = []
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX itself ends who loses the coordinator
            failures = client.key_value_dir_get(_FAILED)
        if not failures:
            continue
        code, line = json.loads(failures[0][1])
        print(f"lmjax: error: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_HEARD}/{process}", "")
            deadline = time.monotonic() + FAREWELL_SECONDS
            # The store goes with process 0, and JAX aborts who is left without it.
            while (process == 0 and len(client.key_value_dir_get(_HEARD)) < global_state.num_processes
                   and time.monotonic() < deadline):
                time.sleep(0.1)
            time.sleep(0.2 * (process == 0))
        os._exit(code)  # a normal exit waits for the other processes


def _join() -> bool:
    """Whether there are other processes; if so, they have been joined."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return False
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise ValueError(f"{missing[0]}: expected an integer beside JAX_COORDINATOR_ADDRESS={address}, got "
                         f"{os.environ.get(missing[0])!r}; set it for every process")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(os.environ[names[0]]), int(os.environ[names[1]]))
    return True


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `out` when the block is done and goes if it fails.

    Raises:
      ValueError: `out` is there already.
    """
    out = out.expanduser().absolute()
    if out.exists():
        raise ValueError(f"--out: expected a directory that does not exist yet, got {out}; choose another")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


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
