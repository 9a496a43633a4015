"""Runs as processes of their own, some of them at the same time."""

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmjax.errors import UserError
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.monitoring.progress import to_stderr
from lmjax.monitoring.units import human_seconds

POLL = 0.5  # seconds between looks at the processes
SHOW = 30.0  # seconds between lines of progress
TPUS = ("accel[0-9]*", "vfio/[0-9]*")  # in /dev, on a TPU VM
FINISHED = "finished.jsonl"
LOG = "log.txt"
TAIL = 4096  # bytes of the end of a file, which hold its last line


@dataclass(frozen=True)
class Job:
    """A run that is to be trained."""

    name: str  # of its directory
    steps: int
    argv: Sequence[str]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    cards: str  # of the GPUs that it has; "" on a machine without


def shares(at_once: int) -> list[str]:
    """Deals the machine's NVIDIA GPUs out.

    Returns:
      for each of the runs at the same time its value of CUDA_VISIBLE_DEVICES; "" where there are no
      GPUs, or one run that gets all of them.

    Raises:
      UserError: at_once is less than 1, more than there are GPUs, or more than 1 on a TPU.
    """
    if at_once < 1:
        raise UserError("at least 1", at_once, "correct it", where="--at-once")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    cpu = os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    if cpu:
        cards = []
    elif given is not None:
        cards = [card for card in given.split(",") if card]
    else:
        cards = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia*"))
                 if path.name.removeprefix("nvidia").isdecimal()]
    if at_once > 1 and not (cpu or cards) and _has_tpu():
        raise UserError("1 on a TPU, whose chips belong to one process", at_once,
                        "leave it out: each run uses all chips", where="--at-once")
    if not cards or at_once == 1:
        return [""] * at_once
    if at_once > len(cards):
        raise UserError(f"at most {len(cards)}, the number of GPUs", at_once, "lower it",
                        where="--at-once")
    return [",".join(cards[i::at_once]) for i in range(at_once)]


def _has_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and any(
        path for name in TPUS for path in Path("/dev").glob(name))


def finished(workdir: Path) -> set[str]:
    """The names of the runs that ended well, and whose files are still there."""
    file = workdir / FINISHED
    lines = read_jsonl(file) if file.exists() else ()
    return {line["run"] for line in lines if (workdir / line["run"] / "metrics.jsonl").exists()}


def train_all(jobs: Sequence[Job], workdir: Path, cards: Sequence[str]) -> list[str]:
    """Runs all jobs, as many at a time as there are `cards`.

    A run that fails stops no other. On Ctrl-C and SIGTERM the running ones are asked to stop, which
    saves them.

    Returns:
      the names of those that failed.

    Raises:
      KeyboardInterrupt: it was asked to stop.
    """
    waiting, free, failed = list(jobs), list(cards), list[str]()
    running = list[_Running]()
    done, began, shown = 0, time.monotonic(), 0.0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.pop(0), workdir, free.pop(0)))
            time.sleep(POLL)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.cards)
                done += 1
                if one.process.returncode:
                    failed.append(one.job.name)
                _record(one, workdir)
            if time.monotonic() - shown >= SHOW and running:
                shown = time.monotonic()
                _show(running, done, len(jobs), shown - began, workdir)
    finally:  # after Ctrl-C or an error some are running: they save their step and end
        for one in running:
            one.process.send_signal(signal.SIGTERM)
        for one in running:
            one.process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _start(job: Job, workdir: Path, cards: str) -> _Running:
    folder = workdir / job.name
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": cards} if cards else {}),
                   "LMJAX_STOPPED_CODE": "75"}  # a run that was stopped is not finished
    with (folder / LOG).open("ab") as log:
        # In a session of its own: Ctrl-C reaches it as SIGTERM only, once.
        process = subprocess.Popen(job.argv, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
    return _Running(job, process, cards)


def _record(one: _Running, workdir: Path) -> None:
    name, code = one.job.name, one.process.returncode
    if code:
        to_stderr(f"{name}: ended with code {code}: {_last_line(workdir / name / LOG)} "
                  f"(all of it: {workdir / name / LOG})")
        return
    with (workdir / FINISHED).open("a") as file:
        file.write(json.dumps({"run": name, "step": one.job.steps}) + "\n")


def _show(running: Sequence[_Running], done: int, of: int, seconds: float, workdir: Path) -> None:
    """Says how many runs are done, how far the others are, and how long the rest will take."""
    shares_done, told = float(done), []
    for one in running:
        try:
            step = int(json.loads(_last_line(workdir / one.job.name / "metrics.jsonl"))["step"])
        except (ValueError, KeyError):
            step = 0
        shares_done += step / one.job.steps
        told.append(f"{one.job.name} at step {step:,} of {one.job.steps:,}")
    rest = seconds * (of - shares_done) / shares_done if shares_done > 0.01 else 0
    left = f" | about {human_seconds(rest)} left" if rest else ""
    to_stderr(f"{done} of {of} done | {', '.join(told)}{left}")


def _last_line(path: Path) -> str:
    """The last whole line of a file; "" if it has none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode("utf-8", "replace").rstrip("\n").splitlines()
    return lines[-1] if lines else ""
