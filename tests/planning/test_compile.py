"""Compiling a step in a child process, and keeping the result."""

import ast
import importlib.util
import json
import pathlib
import re
import sys

import jax
import pytest
from jax.experimental import topologies

import lmjax
from lmjax.config import load
from lmjax.errors import UserError
from lmjax.planning import compile as plan_compile
from lmjax.planning.measure import measure, needed_memory
from lmjax.runtime.chips import GIB, parse_topology
from lmjax.training.recipe import build_recipe


def tiny():
    return build_recipe(load("configs/llama2_7b.py:tiny", ()))


def test_only_steps_for_absent_devices_are_kept(monkeypatch, tmp_path):
    """The devices at hand may be others the next time."""
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    made = []

    def child(work, topology, flags, log):
        made.append(str(topology))
        (pathlib.Path(work) / "result.json").write_text(json.dumps(made))

    monkeypatch.setattr(plan_compile, "_run_child", child)
    v5e = parse_topology("v5e-4")
    for topology, count in (("cpu", 1), ("cpu", 2), (v5e, 3), (v5e, 3)):
        result, text = plan_compile.compiled(tiny(), topology, log=print)
        assert (len(result), text) == (count, "")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_key_covers_every_file_that_makes_the_step():
    """What the compilation imports is in the key, but for what only prints, reads or writes.

    The key covers no other files: a change of a text filter compiles nothing anew.
    """
    package = pathlib.Path(lmjax.__file__).parent
    covered, todo, seen = set(plan_compile.source_files()), [package / "planning/measure.py"], set()
    while todo:
        path = todo.pop()
        if path in seen or path not in covered:
            seen.add(path)
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmjax"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                stems = [package.parent / name.replace(".", "/") for name in names]
                files = [file for stem in stems
                         for file in (stem.with_suffix(".py"), stem / "__init__.py")]
                todo += [file for file in files if file.exists()]
    left_out = {path.relative_to(package).as_posix() for path in seen - covered}
    rooms = {"planning", "runtime", "decoding", "data/text", "data/tokenizers"}
    files = {"errors.py", "data/__init__.py", "data/hashing.py", "data/store.py", "data/chat.py",
             "data/reading.py", "training/best.py", "training/task_data.py",
             "monitoring/progress.py", "monitoring/health.py",  # which judges on the host
             "training/pretrained.py", "training/teacher.py"}  # the key has a teacher's config
    assert {name for name in left_out if name.rpartition("/")[0] not in rooms} <= files, left_out
    assert len(seen & covered) > 40
    # The room of tasks is in the key as a whole: most of its files make a loss or the rows of one.
    extra = {path for path in covered - seen
             if path.name != "__init__.py" and path.parent.name != "tasks"}
    assert {path.relative_to(package).as_posix() for path in extra} == {
        "planning/compile.py",  # the environment of the compiler
        "models/folding.py", "nn/watched.py"}  # of exports and replays, in rooms that are covered


@pytest.mark.parametrize("script, expected", [
    ("exit 2", "got exit code 2: no message; change the mesh"),
    ("echo killed; kill -9 $$", "got exit code -9: killed; if memory ran out"),
    ("echo killed; exit 137", "got exit code 137: killed; if memory ran out"),
    ("echo jax._src.sharding.IndivisibleError: 3 does not divide 4; echo ---; exit 1",
     "got IndivisibleError: 3 does not divide 4; change the mesh")])
def test_a_child_that_fails_says_why(monkeypatch, tmp_path, script, expected):
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(expected)):
        plan_compile.compiled(tiny(), "cpu", log=print)


@pytest.mark.parametrize("message, gib", [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
     "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
     "required for HLO temporaries (32.17G) exceeds available HBM (15.75G). HLO module: jit_step",
     32.17),
    ("RESOURCE_EXHAUSTED: scoped vmem limit exceeded: 20.50M of 16.00M", None)])
def test_the_memory_that_a_step_needs_is_read_from_the_compilers_message(message, gib):
    assert needed_memory(message) == (gib and pytest.approx(gib * GIB, rel=1e-6))


def test_an_unknown_shape_is_refused_with_the_known_ones(monkeypatch):
    def unknown(**_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such thing")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    shapes = "of v5e that is on offer: 1x1, 2x2, .* to 16x16, got v5e:3x5; choose one$"
    with pytest.raises(UserError, match=shapes):
        measure(tiny(), parse_topology("v5e:3x5"))
    with pytest.raises(UserError, match="got INVALID_ARGUMENT: no such thing; "):
        measure(tiny(), parse_topology("v5e:4x4"))  # a shape that libtpu should know
