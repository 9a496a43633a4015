"""The processes of a run: they start together, send each other small messages, and end together.

The messages go through the key-value store of JAX's coordinator, which process 0 runs. They need no
devices, so they arrive even while a process waits in a collective.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax._src.distributed import global_state  # no public name gives the key-value store

from lmjax.runtime import cluster

T = TypeVar("T")
Explain = Callable[[BaseException], tuple[int, str]]  # the exit code and the line of an error
WEEK_MS = 7 * 24 * 3600 * 1000  # longer than any preparation; a failure elsewhere ends a wait early
THREADS = "lmjax-"  # how the names of lmjax's threads begin
LOOK_SECONDS = 0.5  # between looks at whether a process has failed
FAREWELL_SECONDS = 5.0  # how long process 0 waits until the others have heard of a failure
# Keys of the store.
_FAILURE, _HEARD, _PLACES, _LATE, _AGREED, _DONE = (
    f"lmjax/{name}" for name in ("failed", "heard", "places", "late", "agreed", "done"))
_agreements = itertools.count()


@contextlib.contextmanager
def together(explain: Explain) -> Iterator[None]:
    """Runs the block together with the other processes of the run; an error in one ends them all.

    After an error, every process prints the line of the first error and exits with its code. This
    takes seconds, whatever the processes wait for. A process without others just runs the block.
    An error that nobody catches in a thread of lmjax counts as one of the process.

    Args:
      explain: gives the exit code and the line of an error.

    Raises:
      UserError: `cluster.join` cannot tell who takes part.
    """
    with _watching_threads(explain):
        if not cluster.join():
            yield
            return
        with _watching_others(explain):
            yield


@contextlib.contextmanager
def _watching_threads(explain: Explain) -> Iterator[None]:
    """Ends all processes if a thread of lmjax, such as the watchdog's, ends with an exception."""
    before = threading.excepthook

    def ended(thread: threading.ExceptHookArgs) -> None:
        name = thread.thread.name if thread.thread else ""
        if name.startswith(THREADS) and thread.exc_value is not None:
            traceback.print_exception(thread.exc_value)
            code, line = explain(thread.exc_value)
            fail(code, f"process {process()}, thread {name}: {line}")
        before(thread)

    threading.excepthook = ended
    try:
        yield
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def _watching_others(explain: Explain) -> Iterator[None]:
    """Runs the block of `together` in a process that has others."""
    done = threading.Event()
    watcher = threading.Thread(target=_end_with_others, args=(done,), name=f"{THREADS}others",
                               daemon=True)
    watcher.start()
    try:
        yield
        # Each keeps watching until the last one is done, because that one may still fail.
        _store().wait_at_barrier(_DONE, WEEK_MS)
    except (Exception, KeyboardInterrupt) as error:
        code, line = explain(error)
        if code == 1 or os.environ.get("LMJAX_TRACEBACK"):
            traceback.print_exception(error)
        _write(f"{_FAILURE}/first", [code, f"process {process()}: {line}"])
        watcher.join()  # ends this process like the others
        os._exit(code)
    done.set()
    watcher.join()


def agreed(do: Callable[[], T]) -> T:
    """Runs `do` on process 0 and returns its result on every process.

    Every process has to call it, in the same order. An exception of `do` ends all processes.

    Args:
      do: returns a JSON value.
    """
    if _store() is None:
        return do()
    key = f"{_AGREED}/{next(_agreements)}"
    if process() == 0:
        _store().key_value_set(key, json.dumps(do()))
    return json.loads(_store().blocking_key_value_get(key, WEEK_MS))


def process() -> int:
    """The number of this process. Unlike `jax.process_index`, it does not wait for the devices."""
    return global_state.process_id


class Place(NamedTuple):
    """What a process is doing. The process with the fewest moves keeps the others waiting."""

    moves: int  # how often the process has begun something new
    step: int
    doing: str


def tell(place: Place) -> None:
    """Tells the other processes what this process is doing."""
    _write(f"{_PLACES}/{process()}", [place, socket.gethostname()], overwrite=True)


def places(mine: Place) -> dict[int, tuple[Place, str]]:
    """Returns what each process last told with `tell`, by process number, and its host.

    Without other processes this is `mine` alone.
    """
    found = {number: (Place(*place), host) for number, (place, host) in _read(_PLACES).items()}
    return found or {process(): (mine, socket.gethostname())}


def tell_late(step: int, seconds: float) -> None:
    """Tells the others that this process began `step` late: it waited `seconds` for its data."""
    _write(f"{_LATE}/{process()}", [step, seconds, socket.gethostname()], overwrite=True)


def late_with(step: int) -> tuple[int, str] | None:
    """Returns the process that waited longest for its data of `step`, and its host.

    None if no process has told that it was late.
    """
    found = [(seconds, number, host) for number, (late_step, seconds, host) in _read(_LATE).items()
             if late_step == step]
    return max(found)[1:] if found else None


def fail(code: int, line: str) -> NoReturn:
    """Prints `line` and exits with `code`, in all processes.

    Any thread may call it, whatever the main thread waits for.
    """
    if _store() is not None:
        _write(f"{_FAILURE}/first", [code, line])
        time.sleep(2 * FAREWELL_SECONDS)  # the thread of `together` usually ends this process
    sys.stderr.write(f"lmjax: error: {line}\n")
    sys.stderr.flush()
    os._exit(code)


def _end_with_others(done: threading.Event) -> None:
    """Ends this process as soon as any process has failed, whatever its main thread waits for."""
    while not done.wait(LOOK_SECONDS):
        failures = []
        # JAX itself ends a process that loses the coordinator
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            failures = _store().key_value_dir_get(_FAILURE)
        if not failures:
            continue
        code, line = json.loads(failures[0][1])
        sys.stderr.write(f"lmjax: error: {line}\n")
        sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _store().key_value_set(f"{_HEARD}/{process()}", "")
            if process() == 0:
                _wait_until_heard()
        os._exit(code)  # a normal exit would wait for the other processes


def _wait_until_heard() -> None:
    """Keeps the store open until the others know of the failure: JAX aborts them when it goes."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    while (len(_store().key_value_dir_get(_HEARD)) < global_state.num_processes
           and time.monotonic() < deadline):
        time.sleep(0.1)
    time.sleep(0.2)


def _store() -> Any:
    """The client of the coordinator's key-value store; None in a process without others."""
    return global_state.client


def _write(key: str, value: Any, overwrite: bool = False) -> None:
    """Stores a JSON value for the other processes, if there are any.

    Does nothing if the key is taken (without `overwrite`) or the coordinator has gone.
    """
    if _store() is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _store().key_value_set(key, json.dumps(value), allow_overwrite=overwrite)


def _read(folder: str) -> dict[int, Any]:
    """Returns the JSON values under `folder`, by process number."""
    found = {}
    if _store() is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = {int(key.rsplit("/", 1)[1]): json.loads(value)
                     for key, value in _store().key_value_dir_get(folder)}
    return found
