"""A pod in miniature: the same command as several processes of this machine. `launch/local --processes N` runs it.

    ./launch/local --processes 2 --devices-per-process 4 -- train --config configs/synthetic.py --workdir runs/two \
      --config.mesh.data=2 --config.mesh.fsdp=4

They find each other on the loopback interface and compute on the CPU, each with so many devices. What they print comes
with the number of the process in front. When one fails, the others are ended; SIGINT and SIGTERM reach all of them.
Needs nothing but Python.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from check_command import check  # beside this file


def environment(number: int, args: argparse.Namespace, port: int) -> dict[str, str]:
    """What process `number` has in its environment besides what is there."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices_per_process}"
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(args.processes),
            "JAX_PROCESS_ID": str(number), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def relay(number: int, process: subprocess.Popen) -> None:
    """Prints the lines of a process, whole and with its number in front."""
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def tell(running: list[subprocess.Popen], number: int) -> None:
    """Sends a signal to the processes that have not ended."""
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def wait(running: list[subprocess.Popen], patience: float) -> int:
    """Until all have ended. When one fails, the others have `patience` seconds to end by themselves, as lmjax's do.
    Returns the code of the first failure, or 0."""
    failed, deadline = 0, None
    while None in (codes := [process.poll() for process in running]):
        failed = failed or next(filter(None, codes), 0)
        if failed and deadline is None:
            deadline = time.monotonic() + patience
        elif deadline and time.monotonic() > deadline:
            tell(running, signal.SIGKILL)
        time.sleep(0.1)
    return failed or next(filter(None, codes), 0)


def main() -> int:
    """Runs the command; exit code 0, or that of the first process that failed (128 + n where signal n ended it)."""
    parser = argparse.ArgumentParser(prog="launch/local", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="M")
    parser.add_argument("--patience", type=float, default=15.0, metavar="SECONDS", help="after a failure")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument("command", nargs="+", metavar="ARGS", help="of lmjax, behind --")
    args = parser.parse_args()
    if min(args.processes, args.devices_per_process) < 1:
        parser.error(f"expected at least one process and one device each, got {args.processes} and "
                     f"{args.devices_per_process}")
    try:
        check(args.command)
    except ValueError as error:
        parser.error(str(error))
    port, command = free_port(), [sys.executable, "-m", "lmjax.cli", *args.command]
    if args.dry_run:
        for number in range(args.processes):
            print(*(f"{k}={shlex.quote(v)}" for k, v in environment(number, args, port).items()), shlex.join(command))
        return 0
    running: list[subprocess.Popen] = []
    # A session of its own each: a terminal's Ctrl-C comes once, through here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: tell(running, number))
    for number in range(args.processes):
        running.append(subprocess.Popen(command, env={**os.environ, **environment(number, args, port)}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
    relays = [threading.Thread(target=relay, args=item) for item in enumerate(running)]
    for thread in relays:
        thread.start()
    code = wait(running, args.patience)
    for thread in relays:
        thread.join()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
