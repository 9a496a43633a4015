"""Compiles a recipe's train step for a topology, in a process of its own, and keeps what came out.

A compilation for TPU needs its environment set before JAX is imported, may take gigabytes, and may end the process;
so it gets one, and its results are files: `result.json` and the optimized HLO, `step.hlo.gz`. Those for a topology are
kept in a directory of ~/.cache/lmjax/plan that is named by all that they depend on; those for the devices at hand are
not, as these and how fast they are may be others the next time.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from lmjax.config import plain
from lmjax.data.objectives import Objective
from lmjax.errors import first_line
from lmjax.models.flops import flops_per_row
from lmjax.models.model import ModelConfig
from lmjax.nn.kernels.choose import uses_balanced_rows
from lmjax.nn.sequence import num_shards
from lmjax.runtime.chips import FLAGS, Topology, parse_topology, tpu_compiler
from lmjax.runtime.devices import matmul_rate
from lmjax.sharding import use_layout
from lmjax.training.program import Program, make_program
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.tree import num_elements, shard_bytes

Result = dict[str, Any]
Log = Callable[[str], None]
HERE = ("cpu", "gpu", "cuda", "tpu")  # a topology that is a platform: the devices at hand
# What a compiled step depends on besides its config. A change of any of these files compiles anew.
SOURCES = ("nn/**/*.py", "models/*.py", "data/objectives.py", "data/packing.py", "training/losses.py",
           "training/optim/*.py", "training/step.py", "training/state.py", "training/program.py",
           "training/recipe.py", "sharding.py", "tree.py", "runtime/chips.py", "planning/compile.py")


def cache_directory() -> Path:
    """LMJAX_PLAN_CACHE, or ~/.cache/lmjax/plan."""
    return Path(os.environ.get("LMJAX_PLAN_CACHE") or Path.home() / ".cache" / "lmjax" / "plan")


def compiled(recipe: Recipe, topology: Topology | str, log: Log) -> tuple[Result, str]:
    """(what the compiler says of the train step, its optimized HLO), compiled now or, for TPUs, from the cache.

    topology: of TPUs, or a platform's name for the devices at hand. A step that needs more memory than a chip has
    gives a result with `needs` (bytes) and no HLO.

    Raises:
      ValueError: the recipe does not fit the topology, libtpu is not installed, or the compiler failed.
    """
    flags = {name: os.environ.get(name, "") for name in FLAGS}
    if isinstance(topology, Topology) and not flags["LIBTPU_INIT_ARGS"]:
        flags["LIBTPU_INIT_ARGS"] = topology.flags  # as launch/tpu_pod and launch/gke set them
    request = {"recipe": plain(recipe), "topology": str(topology), "flags": flags}
    if isinstance(topology, Topology) and importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology {topology}: expected the TPU compiler, got no libtpu; install it with "
                         "pip install 'lmjax[tpu]', from a checkout -e '.[tpu]' (it needs no TPU)")
    home = cache_directory() / _key(request)
    if isinstance(topology, Topology) and (home / "result.json").exists():
        return _read(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as work:
        (Path(work) / "request.json").write_text(json.dumps(request))
        _child(work, topology, flags, log)
        if isinstance(topology, Topology):
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(work, f"{work}.done")
            os.replace(f"{work}.done", home)
        return _read(Path(work))


def _read(home: Path) -> tuple[Result, str]:
    text = home / "step.hlo.gz"
    return (json.loads((home / "result.json").read_text()),
            gzip.decompress(text.read_bytes()).decode() if text.exists() else "")


def measure(recipe: Recipe, topology: Topology | str) -> tuple[Result, str]:
    """The same in this process, not kept. For TPU its environment must have been set by `chips.tpu_compiler`.

    Raises:
      ValueError: the recipe does not fit the devices, or the compiler failed.
    """
    devices = _devices(topology)
    began = time.monotonic()
    words = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    objective = Objective(recipe.data.objective, seq_len=recipe.data.seq_len, vocab_size=words)
    vocab_size = recipe.model.vocab_size or objective.vocab_size
    program = make_program(recipe, devices, vocab_size=vocab_size, fields=objective.fields)
    lowered = program.traced.lower()
    traced = time.monotonic()
    result = {"topology": str(topology), "devices": len(devices), "device_kind": devices[0].device_kind,
              "platform": devices[0].platform, "versions": _versions("jax", "jaxlib", "libtpu"),
              "mesh": dict(program.layout.mesh.shape),
              "slices": [getattr(d, "slice_index", 0) for d in program.layout.mesh.devices.flat],
              **_about(recipe, program)}
    try:
        step = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needs := _needed(str(error))) is None:
            raise ValueError(f"--topology {topology}: expected the step to compile, got {first_line(error)}; change "
                             "the mesh, model.remat or LIBTPU_INIT_ARGS") from None
        return result | {"needs": needs}, ""
    seconds = {"trace": traced - began, "compile": time.monotonic() - traced}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = matmul_rate(result["compute_dtype"]) if not isinstance(topology, Topology) else None
    return result | {"memory": _memory(program, step), "seconds": seconds, "host_bytes": peak,
                     "matmul_flops_per_second": rate}, step.as_text()


def window_of(config: ModelConfig) -> int:
    """The window of every layer; 0 where some have none, so that no kernel is charged less than it does."""
    kinds, _ = config.kinds(config.num_layers)
    windows = {config.window(kind) for kind in kinds}
    return windows.pop() if len(windows) == 1 else 0


def _about(recipe: Recipe, program: Program) -> Result:
    model, fields = program.model, {name: leaf.shape[1] for name, leaf in program.batch.items()}
    causal = model.config.family == "decoder"
    with use_layout(program.layout):
        spread = uses_balanced_rows(model.kernel, recipe.data.seq_len, causal=causal,
                                    capacity=model.config.moe.capacity)
        expert_ways = num_shards("experts")
    return {"parameters": num_elements(model.shapes), "tokens": recipe.train.batch_size * recipe.data.seq_len,
            "seq_len": recipe.data.seq_len, "window": window_of(model.config),
            "causal": causal, "spread": spread, "expert_ways": expert_ways,
            "flops_per_token": flops_per_row(model, fields) / recipe.data.seq_len, "compute_dtype": str(model.dtype),
            "attention": {"kernel": model.kernel.name, "reason": model.kernel_reason}}


def _memory(program: Program, step: jax.stages.Compiled) -> dict[str, int]:
    """Bytes a device: what the program's arrays take by kind, and what the compiler allots."""
    said, shapes = step.memory_analysis(), program.spec.shapes
    arguments, temporary = said.argument_size_in_bytes, said.temp_size_in_bytes
    fresh = max(said.output_size_in_bytes - said.alias_size_in_bytes, 0)  # the step's input is donated
    code = said.generated_code_size_in_bytes
    ours = {"parameters": shard_bytes(shapes.params), "optimizer": shard_bytes(shapes.opt_state),
            "average": shard_bytes(shapes.ema), "batch": shard_bytes(program.batch)}
    return {**ours, "padding": arguments - sum(ours.values()), "arguments": arguments, "temporaries": temporary,
            "outputs": fresh, "code": code, "peak": arguments + temporary + fresh + code}


def _devices(topology: Topology | str) -> Sequence[jax.Device]:
    if not isinstance(topology, Topology):
        try:
            return jax.devices(topology)
        except RuntimeError as error:
            raise ValueError(f"--topology {topology}: expected devices of that kind here, got {error}; name a TPU "
                             "topology or another platform") from None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name,
                                             **topology.options).devices
    except RuntimeError as error:
        _ = topology.hosts  # says which shapes there are, if this is none of them
        raise ValueError(f"--topology {topology}: expected one that libtpu knows, got {first_line(error)}; "
                         "try another shape") from None


def _needed(error: str) -> int | None:
    """Bytes that a program which did not fit wanted (of temporaries alone, where these do not fit by themselves), from
    the compiler's message; None for any other failure."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of \S+ hbm|\(([\d.]+)([KMGT])\) exceeds available HBM", error)
    if found is None:
        return None
    number, unit = filter(None, found.groups())
    return int(float(number) * 1024 ** (" KMGT".index(unit)))


def _key(request: Result) -> str:
    """Of everything that a compilation's result depends on."""
    package = Path(__file__).parents[1]
    code = {str(file.relative_to(package)): file.read_text() for part in SOURCES for file in package.glob(part)}
    whole = json.dumps([request, code, _versions("jax", "jaxlib", "libtpu", "flax", "optax")], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def _versions(*names: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _child(work: str, topology: Topology | str, flags: dict[str, str], log: Log) -> None:
    """Runs `main` in a process with the environment that it needs, and tells the time while it lasts."""
    environ = {**os.environ, **flags}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environ.get("PYTHONPATH")]))
    if isinstance(topology, Topology):
        tpu_compiler(environ)
    began, told = time.monotonic(), 0.0
    with open(Path(work) / "log", "w+") as said:
        child = subprocess.Popen([sys.executable, "-m", "lmjax.planning.compile", work], env=environ, stdout=said,
                                 stderr=said)
        try:
            while child.poll() is None:
                time.sleep(0.1)
                if (passed := time.monotonic() - began) > told + 10:
                    told = passed
                    log(f"compiling for {topology}: {passed:.0f} s")
        finally:
            child.kill()
            child.wait()
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if child.returncode == 2:
        raise ValueError(lines[-1])
    if child.returncode:
        raise ValueError(f"--topology {topology}: expected the step to compile, got exit code {child.returncode}: "
                         f"{lines[-1] if lines else 'no message'}; if memory ran out, use a machine with more of it")


def main(work: str) -> int:
    """The child: request.json in, result.json and step.hlo.gz out. 2: it cannot be done, as the last line says."""
    request = json.loads((Path(work) / "request.json").read_text())
    name = request["topology"]
    try:
        result, text = measure(build_recipe(request["recipe"]), name if name in HERE else parse_topology(name))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    if text:
        (Path(work) / "step.hlo.gz").write_bytes(gzip.compress(text.encode(), 5))
    (Path(work) / "result.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
