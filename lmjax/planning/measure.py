"""Compiles a recipe's train step in this process, and reads off what the compiler says of it.

`python -m lmjax.planning.measure DIR` is the child process of `compile.compiled`.
"""

import contextlib
import gzip
import importlib.metadata
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from lmjax.data.objectives import Objective
from lmjax.errors import UserError, first_line
from lmjax.models.flops import flops_per_row
from lmjax.models.model import ModelConfig
from lmjax.monitoring.progress import to_stderr
from lmjax.nn.kernels.choose import uses_balanced_rows
from lmjax.nn.sequence import num_shards
from lmjax.planning.kernels import StepFacts
from lmjax.runtime.chips import Topology, parse_topology
from lmjax.runtime.devices import matmul_rate
from lmjax.sharding import use_layout
from lmjax.tasks.distillation import stored_fields
from lmjax.tasks.task import Task
from lmjax.training.pretrained import find
from lmjax.training.program import Program, make_program
from lmjax.training.recipe import Recipe, recorded_recipe
from lmjax.training.task_data import open_data, prepare_task
from lmjax.training.teacher import find_teacher
from lmjax.tree import num_elements, shard_bytes

PLATFORMS = ("cpu", "gpu", "cuda", "tpu")  # in place of a topology: the devices at hand


def topology_of(name: str) -> Topology | str:
    """The TPU topology of that name, or the name itself if it is a platform's."""
    return name if name in PLATFORMS else parse_topology(name)


def measure(recipe: Recipe, topology: Topology | str) -> tuple[StepFacts, str]:
    """Compiles the train step for a TPU topology or for the devices of a platform.

    A TPU topology needs the environment that `chips.tpu_compiler` sets, before JAX is imported.

    Returns:
      What the compiler says of the step, and its optimized HLO. A step that needs more memory than
      a chip has gives the key `needs` (bytes) and no HLO.

    Raises:
      UserError: the recipe does not fit the devices, or the compiler failed.
    """
    devices = topology_devices(topology)
    began = time.monotonic()
    program = _program(recipe, devices)
    lowered = program.traced.lower()
    traced = time.monotonic()
    mesh = program.layout.mesh
    facts: StepFacts = {
        "topology": str(topology), "devices": len(devices), "mesh": dict(mesh.shape),
        "device_kind": devices[0].device_kind, "platform": devices[0].platform,
        "versions": versions("jax", "jaxlib", "libtpu"),
        "slices": [getattr(device, "slice_index", 0) for device in mesh.devices.flat],
        **_model_facts(recipe, program),
    }
    try:
        step = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needs := needed_memory(str(error))) is None:
            raise UserError("the step to compile", first_line(error),
                            "change the mesh, model.remat or LIBTPU_INIT_ARGS",
                            where=f"--topology {topology}") from None
        return facts | {"needs": needs}, ""
    here = not isinstance(topology, Topology)
    facts |= {
        "memory": _memory(program, step),
        "seconds": {"trace": traced - began, "compile": time.monotonic() - traced},
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "matmul_flops_per_second": matmul_rate(facts["compute_dtype"]) if here else None,
    }
    return facts, step.as_text()


def _program(recipe: Recipe, devices: Sequence[jax.Device]) -> Program:
    """The program of a recipe, whose data need not be there; but the examples of a task must be.

    They decide the arrays of a batch and the outputs of the head. Without prepared ones, they are
    prepared for the time being.
    """
    taught_by = find_teacher(recipe)
    teacher = None if taught_by is None else taught_by.recipe.model
    if isinstance(recipe.task, Task):
        with tempfile.TemporaryDirectory() as folder:
            directory = recipe.data.directory
            if not directory:
                start, directory = recipe.train.init_from, f"{folder}/data"
                prepare_task(recipe, directory, find(start) if start else None, to_stderr)
            split, _, _, found = open_data(recipe, directory)
            fields = stored_fields(recipe.distill, split.fields)
            return make_program(recipe, devices, fields=fields, vocab_size=split.vocab_size,
                                facts=found, teacher=teacher)
    size = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    objective = Objective(recipe.data.objective, seq_len=recipe.data.seq_len, vocab_size=size)
    return make_program(recipe, devices, fields=stored_fields(recipe.distill, objective.fields),
                        vocab_size=recipe.model.vocab_size or objective.vocab_size,
                        teacher=teacher)


def topology_devices(topology: Topology | str) -> Sequence[jax.Device]:
    """The devices of a TPU topology, which need not be here, or those of a platform."""
    where = f"--topology {topology}"
    if not isinstance(topology, Topology):
        try:
            return jax.devices(topology)
        except RuntimeError as error:
            raise UserError("devices of that kind here", error,
                            "name a TPU topology or another platform", where=where) from None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name,
                                            **topology.options).devices
    except RuntimeError as error:
        _ = topology.hosts  # a shape that cannot be had is refused here, with the shapes that can
        raise UserError("one that libtpu knows", first_line(error), "try another shape",
                        where=where) from None


def _model_facts(recipe: Recipe, program: Program) -> StepFacts:
    model, seq_len = program.model, recipe.data.seq_len
    fields = {name: leaf.shape[1] for name, leaf in program.batch.items()}
    causal = model.config.family == "decoder"
    with use_layout(program.layout):
        spread = uses_balanced_rows(model.kernel, seq_len, causal=causal,
                                    capacity=model.config.moe.capacity)
        expert_ways = num_shards("experts")
    return {
        "parameters": num_elements(model.shapes), "compute_dtype": str(model.dtype),
        "tokens": recipe.train.batch_size * seq_len, "seq_len": seq_len,
        "window": _window(model.config), "causal": causal, "spread": spread,
        "expert_ways": expert_ways,
        "flops_per_token": flops_per_row(model, fields, program.spec.is_frozen) / seq_len,
        "attention": {"kernel": model.kernel.name, "reason": model.kernel_reason},
    }


def _window(config: ModelConfig) -> int:
    """The attention window of every layer; 0 if they differ, so that no layer counts too little."""
    kinds, _ = config.kinds(config.num_layers)
    windows = {config.window(kind) for kind in kinds}
    return windows.pop() if len(windows) == 1 else 0


def _memory(program: Program, step: jax.stages.Compiled) -> dict[str, int]:
    """Bytes per device: the program's arrays by kind, and what the compiler allots."""
    analysis, shapes = step.memory_analysis(), program.spec.shapes
    assert analysis is not None, "the compiler tells the memory of every program"
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    # The state is donated: only outputs that do not take the place of an input are new.
    outputs = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    code = analysis.generated_code_size_in_bytes
    ours = {kind: shard_bytes(tree) for kind, tree in (
        ("parameters", shapes.params), ("frozen", shapes.frozen), ("teacher", shapes.teacher),
        ("optimizer", shapes.opt_state), ("average", shapes.ema), ("batch", program.batch))}
    return {**ours, "padding": arguments - sum(ours.values()), "arguments": arguments,
            "temporaries": temporaries, "outputs": outputs, "code": code,
            "peak": arguments + temporaries + outputs + code}


def needed_memory(message: str) -> int | None:
    """Bytes that a program which did not fit needs, from the compiler's message.

    If the temporaries alone do not fit, the message gives only theirs. None: another failure.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]) of \S+ hbm|"
                      r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    if found is None:
        return None
    number, unit = filter(None, found.groups())
    return int(float(number) * 1024 ** (" KMGT".index(unit)))


def versions(*names: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(work: str) -> int:
    """Reads request.json from `work`; writes result.json and step.hlo.gz there, or error.json.

    Returns:
      0: compiled, or it needs too much memory. 2: a user's mistake, which error.json holds.
    """
    folder = Path(work)
    request = json.loads((folder / "request.json").read_text())
    try:
        recipe = recorded_recipe(request["recipe"])
        facts, text = measure(recipe, topology_of(request["topology"]))
    except UserError as error:
        (folder / "error.json").write_text(json.dumps([str(part) for part in error.args]))
        return 2
    if text:
        (folder / "step.hlo.gz").write_bytes(gzip.compress(text.encode(), 5))
    (folder / "result.json").write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
