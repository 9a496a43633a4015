"""Starts real processes of the real command, for tests that kill, move and compare runs."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lmjax.cli import main as cli
from lmjax.models.model import build_model
from lmjax.training.checkpoint import checkpoint_steps, read_about, restore_params
from lmjax.training.recipe import build_recipe
from lmjax.tree import split_tree

ROOT = pathlib.Path(__file__).resolve().parents[1]


def start(workdir: pathlib.Path, *overrides: str, config: str = "configs/synthetic.py:tiny",
          devices: int = 1, env: dict[str, str] | None = None, first: str = "",
          more: Sequence[str] = ()) -> subprocess.Popen:
    """Starts `lmjax train` in a process of its own; its output goes to <workdir>.log.

    Args:
      workdir: the run's directory.
      overrides: `key.path=value` for the config.
      config: the config file.
      devices: the number of CPU devices to simulate.
      env: further environment variables.
      first: Python to run in the process before the command.
      more: further overrides.
    """
    code = f"{first}\nimport sys\nfrom lmjax.cli.main import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, "train", "--config", config, "--workdir", str(workdir),
               *(f"--config.{item}" for item in (*overrides, *more))]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags,
                   "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"), **(env or {})}
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(workdir: pathlib.Path, *overrides: str, expect: int = 0, **options: object) -> str:
    """Starts a run, waits for its end, and returns what it printed."""
    log = pathlib.Path(f"{workdir}.log")
    before = log.stat().st_size if log.exists() else 0
    code = start(workdir, *overrides, **options).wait(timeout=300)
    printed = log.read_text()[before:]
    assert code == expect, printed
    return printed


def finish_after_a_kill(workdir: pathlib.Path, *overrides: str, **options: object) -> None:
    """Kills a run once it has a checkpoint, and finishes it with the same command."""
    process = start(workdir, *overrides, **options)
    wait_for(process, lambda: checkpoint_steps(workdir / "checkpoints"))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert "resuming at step" in finish(workdir, *overrides, **options)


# Overrides of configs/synthetic.py:tiny that end quickly, for `run_here`.
FINISHED = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=2",
            "checkpoint.keep_last=9", "eval.every=0", "checkpoint.patience_seconds=0")


def run_here(workdir: pathlib.Path, *overrides: str,
             config: str = "configs/synthetic.py:tiny") -> int:
    """Runs `lmjax train` in this process, which saves the imports; returns the exit code."""
    return cli.main(["train", "--config", config, "--workdir", str(workdir),
                     *(f"--config.{item}" for item in overrides)])


def start_together(workdir: pathlib.Path, *overrides: str, processes: int, devices: int,
                   only: dict[int, dict[str, object]] | None = None,
                   **options: object) -> list[subprocess.Popen]:
    """Starts one run in several processes, which find each other over the loopback interface.

    only: options of `start` for a single process, by its number.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [start(workdir, *overrides, devices=devices, env={**shared, "JAX_PROCESS_ID": str(i)},
                  **options, **(only or {}).get(i, {})) for i in range(processes)]


def finish_together(workdir: pathlib.Path, *overrides: str, processes: int, expect: int = 0,
                    timeout: float = 300, **options: object) -> str:
    """Calls `start_together`, waits for the end, and returns what the processes printed."""
    running = start_together(workdir, *overrides, processes=processes, **options)
    try:
        codes = [process.wait(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    printed = pathlib.Path(f"{workdir}.log").read_text()
    assert codes == [expect] * processes, printed
    return printed


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Waits until `happened()` or until the process has ended."""
    deadline = time.monotonic() + 200
    while not happened() and process.poll() is None:
        assert time.monotonic() < deadline, "what the test waits for did not happen in 200 s"
        time.sleep(0.002)


def lines(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    """The records of a JSON-lines file of the run; an unfinished last line is left out."""
    if not (workdir / name).exists():
        return []
    text = (workdir / name).read_text()
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def one_line(printed: str) -> str:
    """The line of the error in the output of a command that failed."""
    line, = (line for line in printed.splitlines() if line.startswith("lmjax: error: "))
    return line


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    """The content of every file below `folder`, except for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def losses(workdir: pathlib.Path) -> np.ndarray:
    """The training losses by step, then the losses on held-out data."""
    return np.array([record[key] for key in ("loss", "eval/loss") for record in lines(workdir)
                     if key in record])


def final_checksums(workdir: pathlib.Path) -> dict:
    """The checksums in the newest checkpoint; those of the parameters are checked on the arrays."""
    step = checkpoint_steps(workdir / "checkpoints")[-1]
    path = workdir / "checkpoints" / str(step)
    about = read_about(path)
    recipe = build_recipe(about["recipe"])
    model = build_model(recipe.model, vocab_size=0, platform="cpu",
                        dtype="float32").with_adapters(recipe.adapter).with_projection(
                            about.get("projected_dim", 0))
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole),
                          split_tree(model.shapes, about["checksums"]["params"].__contains__)[0])
    restore_params(path, shapes)  # raises if the arrays do not have these checksums
    return {"step": step, "data": about["data"], **about["checksums"]}


def assert_same_run(a: pathlib.Path, b: pathlib.Path,
                    names: Sequence[str] = ("metrics.jsonl", "samples.jsonl")) -> None:
    """Asserts equal bits of parameters, optimizer state, data position, metrics and samples."""
    assert final_checksums(a) == final_checksums(b)
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
