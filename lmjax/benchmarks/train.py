"""`lmjax bench`: compares the training loop with the bare step, the matmul rate and PyTorch.

All contestants run in turn in one process, round after round, and the figures are medians over the
rounds. PyTorch takes part if it is installed.
"""

import contextlib
import dataclasses
import functools
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from lmjax.benchmarks.rounds import Report, Turn, in_turn, write_report
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

SHORT = 5  # steps per round of PyTorch
LONG = 50  # steps per round of the loop, at most; each round saves once
RunSteps = Callable[[int], None]  # runs n steps and returns when they are done


def bench(recipe: Recipe, config: Sequence[str], *, seconds: float = 60.0, out: str = "") -> Report:
    """Measures the training of a recipe on this machine and prints a table.

    Args:
      recipe: what to train.
      config: the arguments after `lmjax train --config` that make this recipe; the time from the
        start of that process to the end of its first step is measured, too.
      seconds: how long to measure, about.
      out: a file for the figures as JSON; "" writes none.
    Returns:
      the figures.
    """
    every = min(recipe.checkpoint.every, LONG)
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, every=0),
                                 sample=dataclasses.replace(recipe.sample, every=0),
                                 checkpoint=dataclasses.replace(recipe.checkpoint, every=every))
    with tempfile.TemporaryDirectory() as workdir:
        run = set_up(recipe, Path(workdir), lambda line: print(line, file=sys.stderr))
        with contextlib.redirect_stderr(io.StringIO()):  # the progress line is written, not shown
            records = Records(run, 0)
        with contextlib.closing(run.checkpointer), contextlib.closing(records):
            times = in_turn(_turns(_contestants(run, records), every), seconds)
    report = _figures(run, times)
    report["start_up_seconds"] = _start_up(config)
    _print(report)
    write_report(report, out)
    return report


def _contestants(run: Run, records: Records) -> dict[str, RunSteps]:
    """Returns, by name, what is compared. The first steps of each are done already."""
    found: dict[str, RunSteps] = {"loop": _loop(run, records)}
    found["loop"](2)  # compiles
    assert run.compiled is not None
    rows = run.train_split.rows(np.arange(run.recipe.train.batch_size))
    batch = jax.device_put(rows, run.layout.sharding(("batch", "seq")))
    found["bare step"] = repeated(run.compiled, run.spec.init(0), batch)
    platform = jax.devices()[0].platform
    try:
        from lmjax.benchmarks.torch_step import torch_step

        for name, compiled in (("torch eager", False), ("torch compiled", True)):
            found[name] = torch_step(run.model.config, rows, dtype=str(run.model.dtype),
                                     platform=platform, compiled=compiled)
        if (optimizer := run.recipe.optimizer.name) != "adamw":
            print(f"PyTorch runs AdamW, this recipe {optimizer}; --config.optimizer.name=adamw "
                  "compares like with like", file=sys.stderr)
    except (ImportError, ValueError) as error:  # not installed, or no class for this model
        print(f"no comparison with PyTorch: {error}", file=sys.stderr)
    for name, steps in found.items():
        if name != "loop":
            steps(2)
    return found


def _turns(contestants: dict[str, RunSteps], every: int) -> list[Turn]:
    """Returns the turns of a round, in which the loop runs `every` steps and saves once.

    The loop runs between two halves of the bare step, so that a machine that slows down favours
    neither.
    """
    half = max(every // 2, 1)
    turns = [("bare step", half), ("loop", every), ("bare step", half),
             *((name, SHORT) for name in contestants if name not in ("loop", "bare step"))]
    return [Turn(name, functools.partial(contestants[name], n), n, "step") for name, n in turns]


def repeated(step: StepFn, state: TrainState, batch: Batch) -> RunSteps:
    """Returns a function that runs n more compiled steps from `state` on, all on one batch."""

    def steps(n: int) -> None:
        nonlocal state
        before = None
        for _ in range(n):
            state, metrics = step(state, batch)
            jax.block_until_ready(before)  # one step ahead, as in the loop; more takes more memory
            before = metrics
        jax.block_until_ready(state)

    return steps


def _loop(run: Run, records: Records) -> RunSteps:
    """Returns a function that runs n more steps of the training loop, with all that it writes."""
    done = 0

    def steps(n: int) -> None:
        nonlocal done
        # What the loop prints would land inside the progress line of `in_turn`.
        with contextlib.redirect_stderr(io.StringIO()):
            run_steps(run, records, StopSignal(), done, done + n)
        done += n
        jax.block_until_ready(run.state)

    return steps


def _figures(run: Run, times: dict[str, list[float]]) -> Report:
    """Returns medians over the rounds: rates, and ratios to the matmul rate and the bare step."""
    tokens = run.recipe.train.batch_size * run.recipe.data.seq_len
    flops = flops_per_row(run.model, run.train_split.fields,
                          run.spec.is_frozen) / run.recipe.data.seq_len
    on_cpu = jax.devices()[0].platform == "cpu"  # forced CPU devices share the cores of one
    peak = matmul_rate(str(run.model.dtype)) * (1 if on_cpu else jax.device_count())
    bare = times["bare step"]
    rows = {}
    for name, values in times.items():
        rate = tokens / statistics.median(values)
        rows[name] = {
            "tokens_per_second": rate, "model_flops_per_second": rate * flops,
            "share_of_matmul_rate": rate * flops / peak, "speed_beside_bare_step":
            statistics.median(b / v for b, v in zip(bare, values, strict=True))}
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(),
            "dtype": str(run.model.dtype), "cores": os.cpu_count(),
            "parameters": num_elements(run.model.shapes), "tokens_per_step": tokens,
            "matmul_flops_per_second": peak, "rounds": len(bare), "rows": rows}


def _start_up(config: Sequence[str]) -> list[float]:
    """Measures three times how long a process takes to the end of its first step, in seconds.

    The first time may include compiling; later ones find the program in the cache.
    """
    found = []
    command = [sys.executable, "-m", "lmjax.cli", "train", "--config", *config, "--workdir"]
    for _ in range(3):
        with tempfile.TemporaryDirectory() as workdir:
            began = time.monotonic()
            process = subprocess.Popen([*command, workdir], stderr=subprocess.PIPE, text=True)
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("step 1/"):
                    found.append(time.monotonic() - began)
                    break
            process.kill()
            process.wait()
    return found


def _print(report: Report) -> None:
    print(f"{report['devices']} x {report['device']}, {report['dtype']}, "
          f"{report['parameters'] / 1e6:.1f}M parameters, "
          f"{report['tokens_per_step']:,} tokens per step, "
          f"matmul {report['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
          f"medians of {report['rounds']} rounds")
    print(f"{'':16}{'tokens/s':>12}{'model GFLOP/s':>16}{'of matmul':>12}{'beside bare step':>19}")
    for name, row in report["rows"].items():
        print(f"{name:16}{row['tokens_per_second']:12,.0f}"
              f"{row['model_flops_per_second'] / 1e9:16.1f}"
              f"{row['share_of_matmul_rate']:12.0%}{row['speed_beside_bare_step']:19.3f}")
    seconds = ", ".join(f"{s:.1f} s" for s in report["start_up_seconds"])
    print(f"process start to first step done: {seconds}")
