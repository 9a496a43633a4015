"""How a process finds the other processes of its run: by variables, Slurm, GKE or Cloud TPU.

`join` is called once, before anything else uses JAX's devices.
"""

import os
import sys
import threading
from typing import Any

import jax
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.distributed import global_state  # no public name gives the coordinator's address

from lmjax.errors import UserError

JOIN_SECONDS = "300"  # how long the processes wait for each other, unless LMJAX_JOIN_SECONDS is set


def join() -> bool:
    """Joins the other processes of the run.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who takes part.
    Without them, JAX asks Slurm, GKE or Cloud TPU. If not all processes have come after
    LMJAX_JOIN_SECONDS (300), this process prints the coordinator's address and exits with code 1.

    Returns:
      Whether there are other processes.

    Raises:
      UserError: the environment names a coordinator without saying who this process is.
    """
    address, named = os.environ.get("JAX_COORDINATOR_ADDRESS"), {}
    if address:
        named = _named_by_variables(address)
    elif not _in_cluster():
        return False
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = os.environ.get("LMJAX_JOIN_SECONDS", JOIN_SECONDS)
    if not seconds.isdigit():
        raise UserError("whole seconds", repr(seconds), "set a number such as 300",
                        where="LMJAX_JOIN_SECONDS")
    # JAX's own timeout, 30 s later, aborts the process without naming the address.
    timer = threading.Timer(int(seconds), _give_up, (address, seconds))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**named, local_device_ids=slurm_gpus(),
                                   initialization_timeout=int(seconds) + 30)
    finally:
        timer.cancel()
    return True


def _named_by_variables(address: str) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that the environment sets."""
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for name in names:
        if not os.environ.get(name, "").isdigit():
            raise UserError(f"an integer beside JAX_COORDINATOR_ADDRESS={address}",
                            repr(os.environ.get(name)), "set it for every process", where=name)
    number, own = (int(os.environ[name]) for name in names)
    return {"coordinator_address": address, "num_processes": number, "process_id": own,
            "cluster_detection_method": "deactivate"}


def _give_up(address: str | None, seconds: str) -> None:
    """Ends a process that still waits for the others."""
    # JAX knows the address only after it has looked up the coordinator's name.
    where = (global_state.coordinator_address or address
             or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS")
             or next(iter(_hosts()), "the address that the cluster names"))
    error = UserError(f"all processes at the coordinator {where} within {seconds} s", "no answer",
                      "start all of them, process 0 on that host, and let its port through")
    print(f"lmjax: error: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # not 2: the others may come later, so that trying again may succeed


def _in_cluster() -> bool:
    """Whether Slurm, GKE or Cloud TPU started this process together with others.

    `jax.distributed.initialize` then needs no arguments.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:  # the tasks of this `srun`
        return True
    # Tests and `lmjax plan` set JAX_PLATFORMS=cpu: on a pod's host they still run alone.
    if not running_in_cloud_tpu_vm or os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    hosts = _hosts()
    if not hosts:  # then JAX asks Cloud TPU's metadata server, unless that is switched off
        return "TPU_SKIP_MDS_QUERY" not in os.environ
    # GKE names the hosts and has no metadata server.
    return len(hosts) > 1 or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1


def _hosts() -> list[str]:
    """The hosts of this slice, if the environment names them as GKE does; the first coordinates."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    return [name for name in names.split(",") if name]


def slurm_gpus() -> list[int] | None:
    """The devices for `jax.distributed.initialize` to use in this process; None: JAX decides.

    Under Slurm with one process per node these are all GPUs of the node; JAX would use only one.
    """
    tasks, nodes, gpus = (os.environ.get(f"SLURM_{name}", "")
                          for name in ("STEP_NUM_TASKS", "STEP_NUM_NODES", "GPUS_ON_NODE"))
    alone = tasks == nodes and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    return list(range(int(gpus))) if gpus.isdigit() and alone else None
