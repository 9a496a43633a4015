"""Every command and every line of Python in the docs runs, in the order in which it is read.

A script stands in for `lmjax`: it calls the real command with a smaller model and corpus, and fewer
steps. The default run only checks that each command and its config are understood; the tests marked
`long` and `slow` run them.
"""

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import sysconfig
import typing

import pytest

from lmjax.cli.main import COMMANDS, main
from lmjax.config import load
from lmjax.tasks.table import AnyTask
from lmjax.training.recipe import Recipe, build_recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {
    "configs/quickstart.py": ["train.steps=4", "optimizer.warmup_steps=1", "train.batch_size=4",
                              "checkpoint.every=2", "eval.batches=2", "sample.every=0",
                              "data.heldout_fraction=0.1", "data.tokenizer.vocab_size=400"],
    "configs/synthetic.py": ["train.steps=4", "optimizer.warmup_steps=1"],
    "configs/bert.py": ["train.steps=2", "optimizer.warmup_steps=1", "checkpoint.every=2",
                        "eval.every=2", "data.heldout_fraction=0.2",
                        "data.tokenizer.vocab_size=399"],
    "configs/tasks/classification.py": ["train.init_from=runs/bert", "train.steps=4"],
    "configs/tasks/embeddings.py": ["train.init_from=runs/bert", "train.steps=4"],
    "configs/tasks/preferences.py": ["train.init_from=runs/quickstart", "train.steps=4"],
    "configs/tasks/sums.py": ["train.steps=8"],
    "configs/tasks/grpo.py": ["train.init_from=runs/sums", "train.steps=4"],
    "configs/t5.py": ["train.steps=2", "optimizer.warmup_steps=1", "checkpoint.every=2",
                      "eval.every=2", "data.heldout_fraction=0.2",
                      "data.tokenizer.vocab_size=400"],
    "configs/tasks/pairs.py": ["train.init_from=runs/t5", "train.steps=4"],
    "configs/tasks/chat.py": ["train.init_from=runs/quickstart", "train.steps=4"],
    "configs/tasks/tagging.py": ["train.init_from=runs/bert", "train.steps=4"],
    "configs/tasks/questions.py": ["train.init_from=runs/bert", "train.steps=4"],
    "configs/llama2_7b.py": ["mesh.fsdp=1"],
    "configs/data/python_stdlib.py": ["data.tokenizer.vocab_size=512",
                                      "data.curate.decontaminate.sources=[]"],
    "configs/bench.py": ["model.embed_dim=32", "model.mlp_dim=32", "train.batch_size=2",
                         "data.seq_len=32"],
}
STAND_IN = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from lmjax.cli.main import main
args, small = sys.argv[1:], {SMALL!r}
given = " ".join(args)
for config, overrides in small.items():
    if config in args:
        variant = "" if "bench" in config or "data" in config else ":tiny"
        args[args.index(config)] = config + variant
        uri = ["data.sources.0.uri=text:{sysconfig.get_paths()['stdlib']}/json/*.py"]
        uri = uri if any(name in config for name in ("quickstart", "bert", "t5")) and (
            "config.data.sources" not in given) else []
        args += ["--config." + item for item in overrides + uri
                 if "config." + item.split("=")[0] not in given]
if args[0] == "plan":  # the TPU compiler is not on every machine that runs tests
    args = [item for item in args if item != "--search"]
    args[args.index("--topology") + 1] = "cpu"
if args[0] == "bench":
    args += ["--seconds", "1"]
    sys.modules["torch"] = None  # it compiles for half a minute; tests/benchmarks compares
sys.exit(main(args))
"""
# Other tests run these (tests/launch/test_installation.py, tests/benchmarks, tests/scaling,
# tests/tasks/test_glosses.py), or a test machine cannot.
ELSEWHERE = ("./launch/local", "./launch/test", "pip install", "pip download", "lmjax sweep",
             "lmjax scale",
             *(f"lmjax bench {what}" for what in (
                 "generate", "score", "tasks", "learning", "pruning", "serve --url")))


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A function that runs a script in a directory like a checkout, with `lmjax` on the PATH."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "docs", "examples", "lmjax", "launch", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    for name, text in (("lmjax", STAND_IN), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}",
                   "PYTHONPATH": str(ROOT),
                   "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
                   "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    def run(command: list[str], script: str) -> str:
        done = subprocess.run(command, input=script, cwd=folder, env=environment,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    return run


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words after `lmjax` of every command on the page."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    # A quoted value may span lines; a command ends where its quotes are closed.
    words = r"(?:'[^']*'|\"[^\"]*\"|[^'\"\n])*"
    found = re.findall(rf"^(?:\w+=\S+ )*lmjax ({words})", lines, re.MULTILINE)
    return [shlex.split(words, comments=True) for words in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_its_config_are_understood(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        seen = []
        run = functools.partial(lambda seen, *given: seen.append(given), seen)
        row = COMMANDS[words[0]]._replace(run=run, needs_jax=False)
        with monkeypatch.context() as patch:
            patch.setitem(COMMANDS, words[0], row)
            assert main(words) == 0, (words, capsys.readouterr().err)
        (arguments, overrides), = seen
        if getattr(arguments, "config", ""):
            build_recipe(load(arguments.config, overrides))


# The longest pages only with -m slow, for the time that .ci/run has.
SLOW = ("speed.md", "data.md", "huggingface.md", "finetuning.md", "adapting.md", "tagging.md",
        "distillation.md", "compression.md", "planning.md", "extending.md", "training.md",
        "learning.md", "reliability.md", "serving.md", "sweeps.md")


@pytest.mark.parametrize("page", [
    pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else pytest.mark.long)
    for page in PAGES], ids=lambda page: page.name)
def test_every_command_runs(page, shell):
    if page.name != "README.md":  # whose run the other pages look at
        train = "lmjax train --config configs/quickstart.py --workdir runs/quickstart"
        shell(["bash", "-eu"], f"test -e runs/quickstart || {train}")
    for script in blocks(page, "bash"):
        if not script.startswith(ELSEWHERE):
            shell(["bash", "-eu"], script)
    for script in blocks(page, "python"):
        assert shell([sys.executable, "-"], script).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_setting_exists(page):
    sections = "model|data|optimizer|mesh|adapter|train|eval|checkpoint|sample|watch|distill"
    for section, key in re.findall(rf"`({sections})\.(?!safetensors)(\w+)`", page.read_text()):
        group = getattr(Recipe(), section)
        assert hasattr(group, key), f"{section}.{key}"
    for path in re.findall(r"--config\.([a-z][\w.]+)=", page.read_text()):
        found, (group, *keys) = Recipe(), path.split(".")
        if group == "task":
            assert any(hasattr(kind, keys[0]) for kind in typing.get_args(AnyTask)), path
            continue
        for key in (group, *keys):
            found = found[int(key)] if key.isdigit() else getattr(found, key)
