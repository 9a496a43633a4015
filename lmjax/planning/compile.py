"""Compiles a recipe's train step in a child process, and keeps the results for TPU topologies.

A compilation for TPU needs its environment before JAX is imported, may take gigabytes of memory,
and may end its process, so it gets a process of its own. Its results are files: `result.json` and
the optimized HLO, `step.hlo.gz`. They are kept in ~/.cache/lmjax/plan, in a directory that is named
by a hash of everything that they depend on. Results for the devices at hand are not kept: the next
time these devices, or their speed, may be different.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmjax.config import plain
from lmjax.data.text.sources import identity
from lmjax.errors import UserError, first_line
from lmjax.planning.kernels import StepFacts
from lmjax.planning.measure import versions
from lmjax.runtime.chips import FLAGS, Topology, tpu_compiler
from lmjax.runtime.files import cache_directory
from lmjax.tasks.task import Task
from lmjax.training.recipe import Recipe
from lmjax.training.teacher import find_teacher

Log = Callable[[str], None]
# The files and folders of lmjax/ that decide, together with the config, what a step compiles to:
# the model, the step, and the arrays of a batch. A change of their text compiles every step anew.
SOURCES = (
    "nn", "models", "tasks", "training/optim",
    *(f"training/{name}.py" for name in ("frozen", "program", "pruning", "recipe", "state",
                                         "statistics", "step")),
    *(f"data/{name}.py" for name in ("augmentation", "config", "denoising", "objectives", "packing",
                                     "rows")),
    "config", "sharding.py", "tree.py", "runtime/chips.py", "planning/compile.py",
    "planning/measure.py")
CACHE = "LMJAX_PLAN_CACHE"  # the variable with the directory; ~/.cache/lmjax/plan without it
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")  # whose versions decide it too


def compiled(recipe: Recipe, topology: Topology | str, log: Log) -> tuple[StepFacts, str]:
    """The results of `measure.measure`, from a child process or, for TPU topologies, the cache.

    Raises:
      UserError: the recipe does not fit the topology, libtpu is not installed, or the compiler
        failed.
    """
    on_tpu = isinstance(topology, Topology)
    flags = {name: os.environ.get(name, "") for name in FLAGS}
    if isinstance(topology, Topology) and not flags["LIBTPU_INIT_ARGS"]:
        flags["LIBTPU_INIT_ARGS"] = topology.flags  # as launch/tpu_pod and launch/gke set them
    request = {"recipe": plain(recipe), "topology": str(topology), "flags": flags}
    if (teacher := find_teacher(recipe)) is not None:
        request["teacher"] = plain(teacher.recipe.model)
    if isinstance(recipe.task, Task) and not recipe.data.directory:  # then they are read
        request["examples"] = [identity(source) for source in recipe.data.sources]
    if on_tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler", "no libtpu", "install it with pip install "
                        "'lmjax[tpu]', from a checkout -e '.[tpu]' (it needs no TPU)",
                        where=f"--topology {topology}")
    cache, is_writable = (cache_directory("plan", os.environ.get(CACHE, ""), CACHE) if on_tpu
                          else (None, False))
    home = cache / _key(request) if cache else None
    if home and (home / "result.json").exists():
        return _read(home)
    if not is_writable:
        cache = home = None
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        (Path(work) / "request.json").write_text(json.dumps(request))
        _run_child(work, topology, flags, log)
        if home:
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(work, f"{work}.done")
            os.replace(f"{work}.done", home)
        return _read(Path(work))


def _read(home: Path) -> tuple[StepFacts, str]:
    text = home / "step.hlo.gz"
    return (json.loads((home / "result.json").read_text()),
            gzip.decompress(text.read_bytes()).decode() if text.exists() else "")


def source_files() -> list[Path]:
    """The files that `SOURCES` names, in a fixed order."""
    package = Path(__file__).parents[1]
    paths = [package / name for name in SOURCES]
    return sorted(file for path in paths
                  for file in ([path] if path.suffix else path.rglob("*.py")))


def _key(request: dict[str, Any]) -> str:
    """A hash of everything that the result of a compilation depends on."""
    package = Path(__file__).parents[1]
    code = {str(file.relative_to(package)): file.read_text() for file in source_files()}
    whole = json.dumps([request, code, versions(*PACKAGES)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def _run_child(work: str, topology: Topology | str, flags: dict[str, str], log: Log) -> None:
    """Runs `measure.main` in a process with the environment that it needs; logs every 10 s."""
    environ = {**os.environ, **flags}
    checkout = str(Path(__file__).parents[2])
    environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [checkout, environ.get("PYTHONPATH")]))
    if isinstance(topology, Topology):
        tpu_compiler(environ)
    command = [sys.executable, "-m", "lmjax.planning.measure", work]
    began, told = time.monotonic(), 0.0
    with open(Path(work) / "log", "w+") as output:
        child = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        try:
            while child.poll() is None:
                time.sleep(0.1)
                if (passed := time.monotonic() - began) > told + 10:
                    told = passed
                    log(f"compiling for {topology}: {passed:.0f} s")
        finally:
            child.kill()
            child.wait()
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    error = Path(work) / "error.json"
    if child.returncode == 2 and error.exists():
        raise UserError(*json.loads(error.read_text()))
    if child.returncode:
        raise _failure(child.returncode, lines, where=f"--topology {topology}")


def _failure(code: int, lines: list[str], where: str) -> UserError:
    """The error for a child process that ended with `code`, not 0, after printing `lines`."""
    if code < 0 or code == 137:  # a signal ended it; 128 + 9 where a shell reports SIGKILL
        return UserError("the step to compile",
                         f"exit code {code}: {lines[-1] if lines else 'no message'}",
                         "if memory ran out, use a machine with more of it", where=where)
    # After the exception, JAX prints that it has left frames out of the traceback.
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    if raised:
        got = re.sub(r"^(\w+\.)*", "", raised[-1])
    else:
        got = f"exit code {code}: {lines[-1] if lines else 'no message'}"
    return UserError("the step to compile", first_line(got),
                     "change the mesh, model.remat or LIBTPU_INIT_ARGS", where=where)
