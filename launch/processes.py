"""Runs one lmjax command as several processes of this machine, as the hosts of a pod would.

`launch/local --processes N` runs it:

    ./launch/local --processes 2 --devices-per-process 4 -- train --config configs/synthetic.py \
      --workdir runs/two --config.mesh.data=2 --config.mesh.fsdp=4

The processes find each other on the loopback interface. Each computes on the CPU with that many
devices. Every line that they print begins with the number of its process. When one process fails,
the others are ended. SIGINT and SIGTERM reach all of them. Needs only Python.
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
    """The variables that process `number` gets in addition to ours."""
    devices = f"--xla_force_host_platform_device_count={args.devices_per_process}"
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def relay(number: int, process: subprocess.Popen) -> None:
    """Prints the lines of a process, each with the number of the process before it."""
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def tell(running: list[subprocess.Popen], number: int) -> None:
    """Sends a signal to those processes that have not ended."""
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def wait(running: list[subprocess.Popen], patience: float) -> int:
    """Waits until all processes have ended.

    After a failure the others have `patience` seconds to end by themselves, as lmjax's do. Then
    they are killed.

    Returns:
      The exit code of the first failure, or 0.
    """
    failed, deadline = 0, None
    while None in (codes := [process.poll() for process in running]):
        failed = failed or next(filter(None, codes), 0)
        if failed and deadline is None:
            deadline = time.monotonic() + patience
        elif deadline and time.monotonic() > deadline:
            tell(running, signal.SIGKILL)
        time.sleep(0.1)
    return failed or next(filter(None, codes), 0)


def arguments() -> argparse.Namespace:
    """Reads the command line and checks it."""
    parser = argparse.ArgumentParser(prog="launch/local", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--processes", type=int, required=True, metavar="N",
                        help="how many processes to start")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="M",
                        help="CPU devices of each process (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=15.0, metavar="SECONDS",
                        help="until the others are killed after one has failed "
                             "(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("command", nargs="+", metavar="ARGS", help="arguments of lmjax, after --")
    args = parser.parse_args()
    if min(args.processes, args.devices_per_process) < 1:
        parser.error("expected at least one process and one device per process, got "
                     f"{args.processes} and {args.devices_per_process}")
    try:
        check(args.command)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Runs the command.

    Returns:
      0, or the exit code of the first process that failed; 128 + n if signal n ended it.
    """
    args = arguments()
    port, command = free_port(), [sys.executable, "-m", "lmjax.cli", *args.command]
    environments = [environment(number, args, port) for number in range(args.processes)]
    if args.dry_run:
        for variables in environments:
            print(*(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
                  shlex.join(command))
        return 0
    running: list[subprocess.Popen] = []
    # Every process gets a session of its own, so that Ctrl-C in a terminal reaches it only once:
    # from here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: tell(running, number))
    for variables in environments:
        running.append(subprocess.Popen(
            command, env={**os.environ, **variables}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True))
    relays = [threading.Thread(target=relay, args=item) for item in enumerate(running)]
    for thread in relays:
        thread.start()
    code = wait(running, args.patience)
    for thread in relays:
        thread.join()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
