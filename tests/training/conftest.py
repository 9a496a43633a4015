"""A finished run that several files damage, resume or change, each in a copy."""

import pathlib
import shutil

import pytest
from processes import FINISHED, run_here


@pytest.fixture(scope="package")
def finished(tmp_path_factory) -> pathlib.Path:
    """The directory of a run of 6 steps with checkpoints at 2, 4 and 6. Nothing may write there."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert run_here(workdir, *FINISHED) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> pathlib.Path:
    """The directory of a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"
