"""The process: its place among others, its compilation cache, how it is asked to stop, and directories it makes."""

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
from typing import NamedTuple, NoReturn, TypeVar

import jax
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.distributed import global_state  # its client is the key-value store, which has no public name

T = TypeVar("T")
Explain = Callable[[BaseException], tuple[int, str]]  # the exit code and the line of an error
WEEK_MS = 7 * 24 * 3600 * 1000  # longer than any preparation: what fails meanwhile ends the wait
LOOK_SECONDS = 0.5  # between looks at whether a process has failed
FAREWELL_SECONDS = 5.0  # for the others to learn of it before the coordinator goes
_FAILED, _HEARD, _PLACES, _LATE = (f"lmjax/{name}" for name in ("failed", "heard", "places", "late"))  # of the store
_turns = itertools.count()


@contextlib.contextmanager
def together(explain: Explain) -> Iterator[None]:
    """Runs the block with the other processes that the environment names; they end together.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who takes part; without them Slurm,
    GKE and Cloud TPU do, where JAX finds out by itself. Whatever one of them raises ends all, within seconds and
    wherever they wait: each prints the line of the first error, as `explain` words it, and exits with its code.
    Without others there is just the block.

    Raises:
      ValueError: the environment names a coordinator and does not say who this process is.

    When not all of them have come together after LMJAX_JOIN_SECONDS (300), it says so and exits with code 1.
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


def process() -> int:
    """The number of this process, without a look at its devices."""
    return global_state.process_id


class Place(NamedTuple):
    """Where a process is. moves: how often it has moved on; of two processes the one with fewer is behind."""

    moves: int
    step: int
    doing: str


def tell(place: Place) -> None:
    """Tells the other processes where this one is."""
    if global_state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            global_state.client.key_value_set(f"{_PLACES}/{global_state.process_id}",
                                              json.dumps([place, socket.gethostname()]), allow_overwrite=True)


def places(mine: Place) -> dict[int, tuple[Place, str]]:
    """By process, where each said last that it is, and its host; without others, `mine`."""
    found = {}
    if global_state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = {int(key.rsplit("/", 1)[1]): json.loads(value)
                     for key, value in global_state.client.key_value_dir_get(_PLACES)}
    return ({number: (Place(*place), host) for number, (place, host) in found.items()}
            or {global_state.process_id: (mine, socket.gethostname())})


def tell_late(step: int, seconds: float) -> None:
    """Tells the other processes that this one begins `step` late, having waited `seconds` for its data."""
    if global_state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            global_state.client.key_value_set(f"{_LATE}/{global_state.process_id}",
                                              json.dumps([step, seconds, socket.gethostname()]), allow_overwrite=True)


def late_with(step: int) -> tuple[int, str] | None:
    """The process, and its host, that told of the longest wait for the data of `step`, if one did."""
    found = []
    if global_state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for key, value in global_state.client.key_value_dir_get(_LATE):
                of, seconds, host = json.loads(value)
                found += [(seconds, int(key.rsplit("/", 1)[1]), host)] * (of == step)
    return max(found)[1:] if found else None


def fail(code: int, line: str) -> NoReturn:
    """Ends this process and all others with `line` and `code`, from any thread and whatever the main one waits for."""
    if global_state.client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
            global_state.client.key_value_set(f"{_FAILED}/first", json.dumps([code, line]))
        time.sleep(2 * FAREWELL_SECONDS)  # the thread of `together` prints the line and ends this process
    print(f"lmjax: error: {line}", file=sys.stderr, flush=True)
    os._exit(code)


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
    address, named = os.environ.get("JAX_COORDINATOR_ADDRESS"), {}
    if address:
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        missing = [name for name in names if not os.environ.get(name, "").isdigit()]
        if missing:
            raise ValueError(f"{missing[0]}: expected an integer beside JAX_COORDINATOR_ADDRESS={address}, got "
                             f"{os.environ.get(missing[0])!r}; set it for every process")
        named = {"coordinator_address": address, "num_processes": int(os.environ[names[0]]),
                 "process_id": int(os.environ[names[1]]), "cluster_detection_method": "deactivate"}
    elif not _in_cluster():
        return False
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = os.environ.get("LMJAX_JOIN_SECONDS", "300")
    if not seconds.isdigit():
        raise ValueError(f"LMJAX_JOIN_SECONDS: expected whole seconds, got {seconds!r}; set a number such as 300")
    def give_up() -> None:
        where = (global_state.coordinator_address or address or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS")
                 or next(iter(_hosts()), "the address that the cluster names"))  # JAX looks its name up, first
        print(f"lmjax: error: expected all processes at the coordinator {where} within {seconds} s, got no answer; "
              "start all of them, process 0 on that host, and let its port through", file=sys.stderr, flush=True)
        os._exit(1)  # the others may come yet: worth another try

    patience = threading.Timer(int(seconds), give_up)  # JAX, when its own is at an end, aborts without the address
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(**named, local_device_ids=_local_devices(), initialization_timeout=int(seconds) + 30)
    finally:
        patience.cancel()
    return True


def _in_cluster() -> bool:
    """Whether Slurm, GKE or Cloud TPU started this process, so that `jax.distributed.initialize` needs no argument."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:  # of this `srun`
        return True
    # Neither tests nor the planner's compiler are processes of a pod, whatever machine they are on.
    if not running_in_cloud_tpu_vm or os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    hosts = _hosts()
    if not hosts:  # then Cloud TPU's metadata name them
        return "TPU_SKIP_MDS_QUERY" not in os.environ
    return len(hosts) > 1 or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1  # GKE, which skips the metadata


def _hosts() -> list[str]:
    """The hosts of this slice, the first of which coordinates, where the environment names them as GKE's does."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    return [name for name in names.split(",") if name]


def _local_devices() -> list[int] | None:
    """Under Slurm with one process a node, all GPUs of the node, where JAX would take the first; else as JAX has it."""
    tasks, nodes, gpus = (os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_TASKS", "STEP_NUM_NODES",
                                                                           "GPUS_ON_NODE"))
    alone = tasks == nodes and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    return list(range(int(gpus))) if gpus.isdigit() and alone else None


