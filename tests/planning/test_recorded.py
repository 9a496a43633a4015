"""The plans that recipes for pods record: below each `lmjax plan`, the last line that it prints."""

import importlib.util
import pathlib
import re

import jax
import pytest

from lmjax.cli.main import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
RECORDED = [found for path in RECIPES
            for found in re.findall(r"    lmjax plan (.+)\n    # (.+)", path.read_text())]


def test_every_plan_that_a_recipe_names_is_recorded():
    assert len(RECORDED) == sum(path.read_text().count("    lmjax plan ") for path in RECIPES) > 10


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.skipif(not jax.__version__.startswith("0.12."), reason="recorded with jax 0.12")
@pytest.mark.parametrize("command, figures", RECORDED, ids=[command for command, _ in RECORDED])
def test_recorded_plans_are_what_the_compiler_says(command, figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LMJAX_PLAN_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert main(["plan", *command.split()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == figures
