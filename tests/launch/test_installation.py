"""The scripts that install and start lmjax; its declared and pinned dependencies; its style."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The extras that each constraint file pins. PyTorch is tested only with the oldest Python.
PINNED_EXTRAS = {
    "constraints-py311.txt": ("formats", "tfds", "test", "oracle"),
    "constraints-py312.txt": ("formats", "tfds", "test"),
}
# Packages whose import name is not their own name.
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "tensorflow-cpu": "tensorflow",
                "tensorboardx": "tensorboardX", "scikit-learn": "sklearn",
                "fonttools": "fontTools", "pyyaml": "yaml"}


def name_of(requirement: str) -> str:
    """ "etils[epath]>=1.9; python_version > '3'" -> "etils" """
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower().replace("_", "-")


def is_for_linux_x86(requirement: str) -> bool:
    return "!= 'linux'" not in requirement


def scripts() -> list[pathlib.Path]:
    files = [path for folder in ("launch", ".ci") for path in (ROOT / folder).iterdir()
             if path.is_file()]
    return [path for path in files if path.suffix == ".sh" or path.read_bytes().startswith(b"#!")]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_failure(path):
    if path.read_bytes().startswith(b"#!/usr/bin/env python3"):
        ast.parse(path.read_text(), feature_version=(3, 10))
        assert os.access(path, os.X_OK), "expected it to be executable"
        return
    subprocess.run(["bash", "-n", path], check=True)
    if path.suffix != ".sh":  # a sourced file has the settings of the script that sources it
        assert "set -euo pipefail" in path.read_text()
        assert os.access(path, os.X_OK), "expected it to be executable"


@pytest.mark.parametrize("name", PINNED_EXTRAS)
def test_constraints_pin_every_dependency_by_name_and_version_only(name):
    lines = (ROOT / "launch" / name).read_text().splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line), line
    needed = PROJECT["dependencies"] + [r for extra in PINNED_EXTRAS[name] for r in EXTRAS[extra]]
    pinned = {line.split("==")[0] for line in lines} | {"lmjax"}
    missing = {name_of(r) for r in needed if is_for_linux_x86(r)} - pinned
    assert not missing, f"{name}: no version for {sorted(missing)}; write it with launch/lock"


def test_every_import_is_declared():
    extras = [requirement for extra in EXTRAS.values() for requirement in extra]
    declared = [name_of(requirement) for requirement in PROJECT["dependencies"] + extras]
    allowed = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared} | {"lmjax"}
    # Modules of the tests themselves.
    allowed |= {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests", "configs"}
    for path in sorted([*(ROOT / "lmjax").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
            assert tops <= allowed, f"{path}: {tops - allowed} is not in pyproject.toml"


def test_style():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """Only the files of the installation, in a directory with a space in its name."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def fake_python(folder: pathlib.Path, version: str) -> pathlib.Path:
    """A stand-in for a Python that makes environments of itself and records the calls of pip."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python3"
    path.write_text(f"""#!/bin/sh
case "$*" in
  *"sys.version_info <"*) exit {int(tuple(map(int, version.split("."))) < (3, 11))} ;;
  *"%d.%d"*) echo {version} ;;
  *--version*) echo Python {version} ;;
  *"-m venv"*)
    for last; do :; done
    mkdir -p "$last/bin"; cd "$last/bin"; cp "$0" python; touch pip ;;
  *"-m pip"*) echo "$@" >> "$CALLS" ;;
esac
""")
    path.chmod(0o755)
    return path


def launch(checkout: pathlib.Path, python: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "LMJAX_PYTHON": str(python),
           "CALLS": str(checkout / "calls"), **env}
    return subprocess.run([checkout / "launch" / "test"], cwd="/", env=env, capture_output=True,
                          text=True)


def test_installs_once_with_the_versions_for_its_python(checkout):
    python = fake_python(checkout / "bin", "3.11")
    calls = checkout / "calls"
    for _ in range(2):
        done = launch(checkout, python)
        assert done.returncode == 0, done.stderr
    first, = calls.read_text().splitlines()
    assert "constraints-py311.txt" in first and f"--editable {checkout}[test]" in first
    # A further extra joins the others. Fewer extras are no reason to install again.
    assert launch(checkout, python, LMJAX_EXTRAS="oracle").returncode == 0
    assert launch(checkout, python).returncode == 0
    _, second = calls.read_text().splitlines()
    assert second.endswith("[oracle,test]")
    # Other versions are a reason.
    with (checkout / "launch" / "constraints-py311.txt").open("a") as file:
        file.write("zzz==1.0\n")
    assert launch(checkout, python).returncode == 0
    assert len(calls.read_text().splitlines()) == 3


def test_a_failed_installation_is_tried_again(checkout):
    python = fake_python(checkout / "bin", "3.12")
    failing = python.read_text().replace('echo "$@" >> "$CALLS"', "echo no such package; exit 1")
    python.write_text(failing)
    done = launch(checkout, python)
    assert done.returncode == 2 and "no such package" in done.stderr
    assert "installing" in launch(checkout, python).stderr


def test_an_unfinished_environment_is_made_again(checkout):
    python = fake_python(checkout / "bin", "3.12")
    shutil.copy(python, fake_python(checkout / ".venv" / "bin", "3.12").with_name("python"))
    assert "making" in launch(checkout, python).stderr
    assert "making" not in launch(checkout, python).stderr


def test_an_old_python_is_refused(checkout):
    done = launch(checkout, fake_python(checkout / "bin", "3.9"))
    assert done.returncode == 2 and "expected LMJAX_PYTHON to be a Python >= 3.11" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("asked", ("", "3.5"))
def test_the_compilation_cache_keeps_the_users_setting(asked, monkeypatch):
    from lmjax.runtime.devices import use_compilation_cache

    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    monkeypatch.delenv(name.upper(), raising=False)
    if asked:
        monkeypatch.setenv(name.upper(), asked)
        jax.config.update(name, float(asked))  # as JAX does at its import
    try:
        use_compilation_cache()
        assert getattr(jax.config, name) == float(asked or 0.2)
    finally:
        jax.config.update(name, before)
