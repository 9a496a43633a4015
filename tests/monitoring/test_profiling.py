"""Traces of chosen steps, and the HLO of the step."""

import json

import pytest

from lmjax.cli import main as cli
from lmjax.monitoring.profiling import Profiler


@pytest.mark.long
def test_a_run_writes_its_trace_and_its_hlo(watched):
    workdir, first, again = watched
    assert f"step 3: the trace is in {workdir / 'profile'}" in first
    assert ("expected steps 2:3 to come, got a run that goes on from step 3; tracing nothing"
            in again)
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert (workdir / "hlo/step.hlo.txt").read_text().startswith("HloModule")
    assert "stablehlo" in (workdir / "hlo/step.stablehlo.mlir").read_text()


def test_a_resumed_run_says_which_steps_it_can_no_longer_trace(tmp_path):
    said = "watch.profile: expected steps 3:6 to come, got a run that goes on from step"
    profiler = Profiler("3:6", tmp_path)
    assert [profiler.missed(start) for start in (0, 2, 3, 6)] == [
        "", "", f"{said} 3; tracing steps 4:6", f"{said} 6; tracing nothing"]
    assert not Profiler("", tmp_path).missed(9)


@pytest.mark.parametrize("value, word", [
    ("5", "steps A:B"), ("0:3", "steps A:B"), ("5:3", "A not after B"),
    ("5:99", "steps up to train.steps=")])
def test_a_profile_that_names_no_steps_is_refused(value, word, tmp_path, capsys):
    command = ["train", "--config", "configs/synthetic.py:tiny", "--workdir", str(tmp_path),
               "--profile", value]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "watch.profile: expected" in error and word in error
    assert json.dumps(value)[1:-1] in error
