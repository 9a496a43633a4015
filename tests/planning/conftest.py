"""A step that is compiled once for the tests of planning."""

import pytest

from lmjax.config import load
from lmjax.planning.measure import measure
from lmjax.training.recipe import build_recipe


@pytest.fixture(scope="session")
def here():
    """A tiny recipe, and the facts and HLO of its step on the 8 CPU devices of the tests."""
    recipe = build_recipe(load("configs/llama2_7b.py:tiny", ("mesh.data=2", "mesh.fsdp=4")))
    return recipe, *measure(recipe, "cpu")
