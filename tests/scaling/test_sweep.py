"""Sweeps: which runs they have, how they go on, and what stops them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmjax.cli.main import main
from lmjax.errors import UserError
from lmjax.scaling import processes
from lmjax.scaling.processes import Job, finished, shares, train_all
from lmjax.scaling.sweep import parse_space

GRID = ["optimizer.peak_lr=1e-3,2e-3", "optimizer.name=adamw,muon"]


def test_a_grid_has_every_combination_with_every_seed():
    runs = parse_space(GRID, [], 0, 2).runs()
    assert len({run.name for run in runs}) == len(runs) == 8
    assert runs[0].name == "peak_lr=1e-3,name=adamw,seed=0"
    assert runs[0].overrides == ("optimizer.peak_lr=1e-3", "optimizer.name=adamw", "train.seed=0",
                                 "data.seed=0")
    assert {run.overrides[2:] for run in runs[4:]} == {("train.seed=1", "data.seed=1")}


def test_more_seeds_keep_the_runs_of_fewer():
    one, three = (parse_space(GRID, [], 0, seeds).runs() for seeds in (1, 3))
    assert three[:4] == one


def test_draws_lie_in_their_limits_and_more_of_them_keep_the_first():
    def draws(number):
        return parse_space(["optimizer.name=adamw,muon"],
                           ["optimizer.peak_lr=1e-4:1e-1", "model.num_layers=2:12"],
                           number, 1).runs()

    runs = draws(200)
    assert runs[:50] == draws(50)
    values = [dict(item.split("=") for item in run.overrides) for run in runs]
    assert {value.pop("train.seed") for value in values} == {"0"}
    rates = sorted(float(value["optimizer.peak_lr"]) for value in values)
    assert 1e-4 <= rates[0] < 3e-4 and 3e-2 < rates[-1] <= 1e-1
    assert 1e-3 < rates[100] < 1e-2  # evenly in the logarithm: the median is near 3e-3
    layers = {int(value["model.num_layers"]) for value in values}
    assert layers == set(range(2, 13))
    assert {value["optimizer.name"] for value in values} == {"adamw", "muon"}


def test_a_name_is_a_directory_whatever_the_values_are():
    runs = parse_space(['data.sources=["[{\\"uri\\": \\"text:a/*.txt\\"}]","b"]'], [], 0, 1).runs()
    assert all("/" not in run.name and len(run.name) <= 100 for run in runs)
    assert runs[0].overrides[0] == 'data.sources=[{"uri": "text:a/*.txt"}]'
    long = parse_space([f"a.b={'x' * 300},{'x' * 300}y"], [], 0, 1).runs()
    assert len({run.name for run in long}) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ((["peak_lr"], [], 0, 1), "--grid: expected KEY=VALUE,VALUE, got 'peak_lr'"),
    ((["a=1,"], [], 0, 1), "--grid a: expected different values"),
    ((["a=1,1"], [], 0, 1), "--grid a: expected different values"),
    ((["a=[1,"], [], 0, 1), "--grid a: expected values with commas"),
    ((["a=1", "a=2"], [], 0, 1), "--grid: expected one item for a, got two"),
    ((["a=1"], ["a=1:2"], 3, 1), "--range: expected one item for a, got two"),
    (([], ["a=2:1"], 3, 1), "--range a: expected LOW:HIGH"),
    (([], ["a=0:1"], 3, 1), "--range a: expected LOW:HIGH"),
    (([], ["a=1:2"], 0, 1), "--range: expected --draws N"),
    (([], [], 0, 1), "say what the runs differ in"),
    ((["a=1"], [], 0, 0), "at least 0 draws and 1 seed"),
])
def test_what_is_no_space_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        parse_space(*arguments)
    assert message in str(error.value)


def test_a_wrong_value_of_one_run_is_refused_before_the_first_trains(tmp_path, capsys):
    argv = ["sweep", "--config", "configs/quickstart.py:tiny", "--workdir", str(tmp_path / "s"),
            "--grid", "optimizer.name=adamw,adamm"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "name=adamm,seed=0: " in error and "did you mean" not in error
    assert not (tmp_path / "s").exists()


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,7")
    assert shares(2) == ["0,2,7", "1,3"]
    assert shares(1) == [""]
    with pytest.raises(UserError, match="at most 5, the number of GPUs, got 6"):
        shares(6)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert shares(3) == ["", "", ""]


def job(name: str, program: str) -> Job:
    return Job(name, 10, [sys.executable, "-c", f"import pathlib\n{program}"])


DONE = "pathlib.Path(W, 'metrics.jsonl').write_text('{\"step\": 10}\\n')"


def test_a_run_that_fails_stops_no_other_and_is_run_again(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(processes, "POLL", 0.01)
    jobs = [job(name, f"W = {str(tmp_path / name)!r}\n{program}") for name, program in (
        ("a", DONE), ("b", "raise SystemExit('no room')"), ("c", DONE))]
    assert train_all(jobs, tmp_path, ["", ""]) == ["b"]
    assert finished(tmp_path) == {"a", "c"}
    error = capfd.readouterr().err
    assert "b: ended with code 1: no room (all of it: " in error
    (tmp_path / "a" / "metrics.jsonl").unlink()  # whose directory somebody has removed
    assert finished(tmp_path) == {"c"}


def test_runs_go_at_the_same_time_but_no_more_than_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "POLL", 0.01)
    program = ("import time\npathlib.Path(T, N).touch()\ntime.sleep(0.3)\n"
               "print(len(list(pathlib.Path(T).iterdir())))\npathlib.Path(T, N).unlink()")
    seen = tmp_path / "seen"
    seen.mkdir()
    jobs = [job(str(i), f"T, N = {str(seen)!r}, '{i}'\n{program}") for i in range(4)]
    train_all(jobs, tmp_path, ["", ""])
    counts = [int((tmp_path / str(i) / processes.LOG).read_text()) for i in range(4)]
    assert max(counts) == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_asks_its_runs_to_stop(tmp_path, sent):
    """The runs get SIGTERM, at which a real one saves and ends; the sweep waits for them."""
    waits = ("import signal, sys, time\n"
             f"signal.signal(signal.SIGTERM, lambda *_: ({DONE}, sys.exit(75)))\n"
             "print('ready', flush=True)\ntime.sleep(60)")
    # A shell without job control starts its background jobs with SIGINT ignored.
    code = ("import signal, sys; from pathlib import Path\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from lmjax.scaling.processes import *\n"
            f"W = {str(tmp_path / 'a')!r}\n"
            f"train_all([Job('a', 10, [sys.executable, '-c', 'import pathlib; W = ' + repr(W) + "
            f"chr(10) + {waits!r}])], Path({str(tmp_path)!r}), [''])")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log = tmp_path / "a" / processes.LOG
    while not (log.exists() and b"ready" in log.read_bytes()):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, sent)
    assert process.wait(20) != 0
    assert (tmp_path / "a" / "metrics.jsonl").exists()
    assert not finished(tmp_path)


@pytest.mark.slow
def test_real_runs_share_their_data_and_the_same_command_goes_on(tmp_path, capfd):
    argv = [sys.executable, "-m", "lmjax.cli", "sweep", "--config", "configs/quickstart.py:tiny",
            "--workdir", str(tmp_path / "s"), "--grid", "optimizer.peak_lr=1e-3,4e-3",
            "--config.train.steps=4", "--config.eval.every=2", "--config.optimizer.warmup_steps=1"]
    subprocess.run(argv, check=True)
    printed = capfd.readouterr().out
    assert "| peak_lr=0.004 |" in printed and "compare.html" in printed
    assert len(list((tmp_path / "s" / "data").iterdir())) == 1
    fingerprints = {json.loads(path.read_text())["data"]["fingerprint"]
                    for path in Path(tmp_path, "s").glob("*/run.json")}
    assert len(fingerprints) == 1
    subprocess.run(argv, check=True)
    assert "2 runs, 2 of them finished" in capfd.readouterr().err
    changed = subprocess.run([*argv, "--config.model.embed_dim=32"], capture_output=True, text=True)
    assert changed.returncode == 2 and "give another --workdir" in changed.stderr
    assert changed.stderr.count("\n") == 1
