"""`lmjax bench`: the whole loop beside the bare step, the machine's matmul rate, and PyTorch where installed.

Everything that is compared runs in turn in one process, round after round, and the medians over the rounds
are divided: a machine that slows down slows all of them down.
"""

import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.models.flops import flops_per_row
from lmjax.models.model import Batch
from lmjax.runtime.devices import matmul_rate
from lmjax.runtime.signals import StopSignal
from lmjax.training.loop import run_steps
from lmjax.training.recipe import Recipe
from lmjax.training.records import Records
from lmjax.training.run import Run
from lmjax.training.setup import set_up
from lmjax.training.state import TrainState
from lmjax.training.step import StepFn
from lmjax.tree import num_elements

Report = dict[str, Any]
SHORT = 5  # steps in a row of whatever is only a step
LONG = 50  # steps of the loop in a row, at most: it saves once a round, more often than a recipe with longer pauses


def bench(recipe: Recipe, config: Sequence[str], *, seconds: float = 60.0, out: str = "") -> Report:
    """Measures `recipe` on this machine for about `seconds`, prints a table and returns its figures.

    config: the arguments behind `lmjax train --config` that make this recipe; the time from the start of that
    process to its first step is measured, too. out: a file for the figures as JSON.
    """
    every = min(recipe.checkpoint.every, LONG)
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, every=0),
                                 sample=dataclasses.replace(recipe.sample, every=0),
                                 checkpoint=dataclasses.replace(recipe.checkpoint, every=every))
    with tempfile.TemporaryDirectory() as workdir:
        run = set_up(recipe, Path(workdir), lambda line: print(line, file=sys.stderr))
        contestants = _contestants(run)
        times = _in_turn(contestants, seconds, every)
        run.checkpointer.close()
    report = _figures(run, times)
    report["start_up_seconds"] = _start_up(config)
    _print(report)
    if out:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _contestants(run: Run) -> dict[str, Callable[[int], None]]:
    """name -> a function that runs n steps and returns when they are done; all warmed up."""
    found: dict[str, Callable[[int], None]] = {"loop": _loop(run)}
    found["loop"](2)  # compiles
    state = run.spec.init(0)
    rows = run.train_split.rows(np.arange(run.recipe.train.batch_size))
    batch = jax.device_put(rows, run.layout.sharding(("batch", "seq")))
    found["bare step"] = repeated(run.compiled, state, batch)
    platform = jax.devices()[0].platform
    try:
        from lmjax.benchmarks.torch_step import torch_step

        for name, compiled in (("torch eager", False), ("torch compiled", True)):
            found[name] = torch_step(run.model.config, rows, dtype=str(run.model.dtype), platform=platform,
                                     compiled=compiled)
        if (optimizer := run.recipe.optimizer.name) != "adamw":
            print(f"PyTorch's steps are AdamW's, this recipe's {optimizer}'s: --config.optimizer.name=adamw compares "
                  "like with like", file=sys.stderr)
    except (ImportError, ValueError) as error:  # not installed, or a model of which there is no other
        print(f"no comparison with PyTorch: {error}", file=sys.stderr)
    for name, do in found.items():
        if name != "loop":
            do(2)
    return found


def repeated(step: StepFn, state: TrainState, batch: Batch) -> Callable[[int], None]:
    """A function that runs n compiled steps from `state` on, all on one batch, and returns when they are done."""

    def steps(n: int) -> None:
        nonlocal state
        before = None
        for _ in range(n):
            state, metrics = step(state, batch)
            jax.block_until_ready(before)  # one step ahead, as the loop: further ahead needs more memory at a time
            before = metrics
        jax.block_until_ready(state)

    return steps


def _loop(run: Run) -> Callable[[int], None]:
    """The production loop: data, metrics files, progress line and checkpoints included."""
    with contextlib.redirect_stderr(io.StringIO()):  # the progress line is part of the work, not of the result
        records = Records(run, 0)
    done = 0

    def steps(n: int) -> None:
        nonlocal done
        run_steps(run, records, StopSignal(), done, done + n)
        done += n
        jax.block_until_ready(run.state)

    return steps


def _in_turn(contestants: dict[str, Callable[[int], None]], seconds: float,
             checkpoint_every: int) -> dict[str, list[float]]:
    """name -> seconds a step, one figure a round; the rounds go on until the time is over (at least three).

    A round of the loop saves once, as in a real run, and lies between two halves of the bare step's, so that a machine
    that becomes slower favours neither.
    """
    began, half = time.monotonic(), max(checkpoint_every // 2, 1)
    turns = [("bare step", half), ("loop", checkpoint_every), ("bare step", half),
             *((name, SHORT) for name in contestants if name not in ("loop", "bare step"))]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    while time.monotonic() - began < seconds or len(times["loop"]) < 3:
        found: dict[str, list[float]] = {}
        for name, n in turns:
            at = time.monotonic()
            contestants[name](n)
            found.setdefault(name, []).append((time.monotonic() - at) / n)
            print(f"\rround {len(times['loop']) + 1}: {name}: {found[name][-1]:.3f} s/step   ", end="", file=sys.stderr,
                  flush=True)
        for name, values in found.items():
            times[name].append(statistics.mean(values))
    print(file=sys.stderr)
    return times


def _figures(run: Run, times: dict[str, list[float]]) -> Report:
    tokens = run.recipe.train.batch_size * run.recipe.data.seq_len
    flops = flops_per_row(run.model, run.train_split.fields) / run.recipe.data.seq_len
    devices = jax.device_count() if jax.devices()[0].platform != "cpu" else 1  # forced CPU devices share the cores
    peak = matmul_rate(str(run.model.dtype)) * devices
    bare = times["bare step"]
    rows = {}
    for name, values in times.items():
        rate = tokens / statistics.median(values)
        ratio = statistics.median(b / v for b, v in zip(bare, values, strict=True))
        rows[name] = {"tokens_per_second": rate, "model_flops_per_second": rate * flops, "share_of_matmul_rate":
                      rate * flops / peak, "speed_beside_bare_step": ratio}
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "dtype": str(run.model.dtype),
            "cores": os.cpu_count(), "parameters": num_elements(run.model.shapes),
            "tokens_per_step": tokens, "matmul_flops_per_second": peak, "rounds": len(bare), "rows": rows}


def _start_up(config: Sequence[str]) -> list[float]:
    """Seconds from process start to the end of the first step, three times; the first one may still compile."""
    found = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as workdir:
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "lmjax.cli", "train", "--config", *config,
                                        "--workdir", workdir], stderr=subprocess.PIPE, text=True)
            for line in process.stderr:
                if line.startswith("step 1/"):
                    found.append(time.monotonic() - began)
                    break
            process.kill()
            process.wait()
    return found


def _print(report: Report) -> None:
    print(f"{report['devices']} x {report['device']}, {report['dtype']}, {report['parameters'] / 1e6:.1f}M parameters, "
          f"{report['tokens_per_step']:,} tokens a step, matmul {report['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
          f"medians of {report['rounds']} rounds")
    print(f"{'':16}{'tokens/s':>12}{'model GFLOP/s':>16}{'of matmul':>12}{'beside bare step':>19}")
    for name, row in report["rows"].items():
        print(f"{name:16}{row['tokens_per_second']:12,.0f}{row['model_flops_per_second'] / 1e9:16.1f}"
              f"{row['share_of_matmul_rate']:12.0%}{row['speed_beside_bare_step']:19.3f}")
    print(f"process start to first step done: {', '.join(f'{s:.1f} s' for s in report['start_up_seconds'])}")
