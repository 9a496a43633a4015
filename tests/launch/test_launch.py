"""The launchers, with stand-ins for gcloud, kubectl, sbatch and srun that record their calls."""

import json
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from cloud import PATIENCE, ROOT, Cloud, executable
from processes import finish, lines

from lmjax.runtime.chips import parse_topology

TRAIN = ("--", "train", "--config", "configs/synthetic.py:tiny", "--workdir", "/mnt/a b")
BUCKET = "--config.checkpoint.directory=gs://b/run"


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


# GKE

RUN = (*TRAIN[:-1], "/runs/a b")
JOB = ("--name", "job", "--image", "here/lmjax:1", "--queue", "tpu", "--volume", "claim:/runs")


@pytest.mark.parametrize("topology, slices, hosts, chips", [
    pytest.param("v5e:16x16", 1, 64, 4, marks=pytest.mark.long), ("v5e:2x4", 1, 1, 8),
    pytest.param("v5p-128", 1, 16, 4, marks=pytest.mark.long), ("2xv6e:16x16", 2, 64, 4),
    pytest.param("v4:2x2x1", 1, 1, 4, marks=pytest.mark.long)])
def test_gke(cloud, topology, slices, hosts, chips):
    yaml = pytest.importorskip("yaml")
    text = cloud.run("gke", *JOB, "--topology", topology, "--spot", "--dry-run", *RUN)
    assert not cloud.calls()
    job = yaml.safe_load(text)
    assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpu"
    replicated, = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    container, = pod["containers"]
    assert replicated["replicas"] == slices
    assert spec["parallelism"] == spec["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["args"] == list(RUN[1:])
    assert slices * hosts * chips == parse_topology(topology).chips
    assert {e["name"]: e["value"] for e in container["env"]} == {
        **({"LIBTPU_INIT_ARGS": flags} if (flags := parse_topology(topology).flags) else {}),
        "LMJAX_JOIN_SECONDS": "1800", "LMJAX_STOPPED_CODE": "75",
        "JAX_COMPILATION_CACHE_DIR": "/runs/.xla-cache"}
    # A stopped run fails the Job, which starts the JobSet again. A refused run ends the JobSet.
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}
    selector = pod["nodeSelector"]
    shape = "x".join(map(str, parse_topology(topology).shape))
    assert selector["cloud.google.com/gke-tpu-topology"] == shape
    assert selector["cloud.google.com/gke-spot"] == "true"
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    cloud.answer({"kubectl": [["", 3]]})
    cloud.run("gke", *JOB, "--topology", topology, "--spot", *RUN, expect=3)
    assert cloud.calls() == [{"words": "kubectl apply -f -", "stdin": text}]


def test_gke_quotes_names_and_passes_on_the_environment(cloud):
    """YAML would read the names as a number and as a truth value."""
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(cloud.run(
        "gke", "--name", "2024", "--queue", "on", "--image", "i", "--topology", "v6e:4x4",
        "--dry-run", "--env", "A=b=c d", "--env", "LIBTPU_INIT_ARGS=--own",
        "--env", "LMJAX_JOIN_SECONDS=9", *TRAIN, BUCKET))
    metadata = job["metadata"]
    assert metadata["name"] == "2024"
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "on"
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    container, = spec["template"]["spec"]["containers"]
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "LIBTPU_INIT_ARGS": "--own", "LMJAX_JOIN_SECONDS": "9", "LMJAX_STOPPED_CODE": "75",
        "A": "b=c d"}
    assert container["args"] == [*TRAIN[1:], BUCKET] and "volumeMounts" not in container


@pytest.mark.parametrize("wrong", [
    ("--name", "Job"), ("--volume", "claim"), ("--topology", "v5e:3"), ("--topology", "v5e:3x5"),
    ("--topology", "v5e:1x2"), ("--env", "A"), ("--restarts", "-1")])
def test_gke_refuses(cloud, wrong):
    out = cloud.run("gke", *JOB, "--topology", "v5e:4x4", *wrong, *RUN, expect=2)
    assert f"{wrong[0]}: expected" in out
    assert not cloud.calls()


@pytest.mark.parametrize("workdir, volume", [
    ("/mnt/a", "claim:/runs"), ("/runs/../a", "claim:/runs"), ("/runs2/a", "claim:/runs"),
    ("runs/a", "claim:/runs"), ("/runs/a", "")])
def test_gke_refuses_a_workdir_that_ends_with_its_container(cloud, workdir, volume):
    assert "--workdir: expected a folder under " in cloud.run(
        "gke", *JOB[:-1], volume, "--topology", "v5e:4x4", *TRAIN[:-1], workdir, expect=2)
    assert not cloud.calls()


# All launchers

WRONG = {
    "trian": "expected a command of lmjax after --, got 'trian'; give one of train, plan, ",
    "lmjax train": "got lmjax itself; leave it out: -- train ...",
    "train --config configs/synthetic.py":
        "--workdir: expected a dir for train, got none; write --workdir DIR",
    "train --config configs/synthetic.py --workdir --config.a=1": "--workdir: expected",
    "train --workdir=/runs/a": "--config: expected a file for train, got none",
    "train --config ./configs/no.py:tiny --workdir=/runs/a":
        "--config: expected a file of this checkout"}


LAUNCHERS = (
    ("gke", *JOB, "--topology", "v5e:4x4"), ("slurm", "--dry-run"), ("local", "--processes", "2"),
    ("tpu_pod", "--name", "pod", "--project", "p", "--zone", "z", "--topology", "v6e-16"))


# All launchers share the check, so by default one of them meets all mistakes, and all meet one.
@pytest.mark.parametrize("launcher, command", [
    pytest.param(launcher, command, id=f"{launcher[0]}-{command}",
                 marks=() if launcher[0] == "slurm" or command == "trian" else pytest.mark.long)
    for launcher in LAUNCHERS for command in WRONG])
def test_a_command_that_lmjax_would_refuse_is_not_started(cloud, launcher, command):
    cloud.env |= {"LMJAX_PYTHON": sys.executable, "LMJAX_VENV": str(cloud.home / "venv")}
    assert WRONG[command] in cloud.run(*launcher, "--", *command.split(), expect=2)
    assert not cloud.calls() and not (cloud.home / "venv").exists()


@pytest.mark.parametrize("command", [
    "train --config=configs/synthetic.py:tiny --workdir=/runs/a --config.train.steps=3",
    "train --config /mine.py --workdir /b/a", "report --workdir /runs/a", "bench data",
    *(pytest.param(f"train --config {config} --workdir ~/a", marks=pytest.mark.long) for config in (
        "~/mine.py:tiny", "$HOME/mine.py", "${CONFIGS}/mine.py", "file:///mine.py"))])
def test_a_command_that_lmjax_takes_is_started(cloud, command):
    cloud.env |= {"LMJAX_PYTHON": sys.executable, "LMJAX_VENV": str(cloud.home / "venv")}
    printed = cloud.run("slurm", "--dry-run", "--", *command.split())
    assert command in printed.replace("\\", "")  # without the shell's quotes


@pytest.mark.parametrize("name, flag", [
    ("local", "-h"), ("test", "--help"), ("lock", "-h"), ("slurm", "--help")])
def test_help_installs_nothing(cloud, name, flag):
    cloud.env["LMJAX_VENV"] = str(cloud.home / "venv")
    said = cloud.run(name, *(("--nodes", "2") if name == "slurm" else ()), flag)
    assert f"./launch/{name}" in said and "set -" not in said
    assert not (cloud.home / "venv").exists()


# Slurm

SRUN = """#!{python}
import os, re, subprocess, sys
script = open({script!r}).read()
nodes, tasks = (int(re.search(rf"--{{name}}=(\\d+)", script)[1])
                for name in ("nodes", "ntasks-per-node"))
env = dict(os.environ, SLURM_JOB_ID="{job}", SLURM_STEP_NODELIST="localhost",
           SLURM_NTASKS=str(nodes * tasks), SLURM_STEP_NUM_TASKS=str(nodes * tasks),
           SLURM_STEP_NUM_NODES=str(nodes), SLURM_GPUS_ON_NODE="2")
running = [subprocess.Popen(sys.argv[3:], env=dict(env, SLURM_PROCID=str(i),
                                                   SLURM_LOCALID=str(i % tasks)))
           for i in range(nodes * tasks)]
sys.exit(max(process.wait() for process in running))
"""
AS_IT_IS = """#!/bin/sh
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
exec "$@"
"""


def job_id() -> int:
    """A job number for which the port that JAX derives from it under Slurm is free."""
    for job in range(1000, 5000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 61440 + job % 4096)):
                return job


@pytest.mark.slow
def test_slurm(cloud, tmp_path):
    """The submitted script really runs: two processes find each other by Slurm's variables."""
    executable(cloud.home / "venv/bin/python",
               f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    cloud.env |= {"LMJAX_VENV": str(cloud.home / "venv"), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu",
                  "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    options = ("--nodes", "2", "--gpus", "2", "--time", "1:00:00")
    run = ("--", "train", "--config", "configs/synthetic.py:tiny",
           "--workdir", str(tmp_path / "a run"), "--config.train.steps=3",
           "--config.optimizer.warmup_steps=1", "--config.eval.every=0")
    script = cloud.run("slurm", *options, "--dry-run", *run)
    assert not cloud.calls()
    (tmp_path / "script").write_text(script)
    executable(cloud.home / "bin/srun", SRUN.format(
        python=sys.executable, script=str(tmp_path / "script"), job=job_id()))
    cloud.run("slurm", *options, *run)
    assert cloud.calls() == [{"words": "sbatch --time 1:00:00", "stdin": script}]
    assert json.loads((tmp_path / "a run/run.json").read_text())["mesh"]["data"] == 2
    assert [r["step"] for r in lines(tmp_path / "a run") if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_slurm_queues_only_a_run_again_that_was_stopped(cloud, code):
    """Such a run ends with the code that the script has set."""
    executable(cloud.home / "venv/bin/python",
               f'#!/bin/sh\n[ "$LMJAX_STOPPED_CODE" = 75 ] && exit {code}\n')
    executable(cloud.home / "bin/srun", AS_IT_IS)
    cloud.env |= {"LMJAX_VENV": str(cloud.home / "venv"), "SLURM_JOB_ID": "17"}
    cloud.run("slurm", *TRAIN, expect=code)
    calls = [call["words"] for call in cloud.calls()]
    assert calls == ["sbatch", *(["scontrol requeue 17"] if code == 75 else [])]


@pytest.mark.parametrize("options, nodes, tasks, gpus", [
    (("--nodes=4", "--gpus=2"), 4, 1, 2),
    (("--nodes", "4", "--gpus", "2", "--per-gpu"), 4, 2, 2),
    ((), 1, 1, 8)])
def test_slurm_options(cloud, options, nodes, tasks, gpus):
    script = cloud.run("slurm", *options, "--dry-run", *TRAIN)
    expected = {"nodes": nodes, "ntasks-per-node": tasks, "gpus-per-node": gpus}
    for name, number in expected.items():
        assert f"#SBATCH --{name}={number}\n" in script


def test_slurm_refuses(cloud):
    assert "expected a number after --gpus" in cloud.run("slurm", "--gpus=", *TRAIN, expect=2)
    out = cloud.run("slurm", "--nodes", "all", *TRAIN, expect=2)
    assert "expected a number after --nodes" in out
    assert "expected a command of lmjax" in cloud.run("slurm", "--nodes", "2", expect=2)
    assert "launch/slurm --nodes 4" in cloud.run("slurm", "--help")
    cloud.env["LMJAX_VENV"] = "/nowhere"
    assert "expected an environment at /nowhere" in cloud.run("slurm", *TRAIN, expect=2)


@pytest.mark.parametrize("environ, expected", [
    ({}, None),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
     [0, 1, 2, 3]),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}, None),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
      "JAX_LOCAL_DEVICE_IDS": "0"}, None),
])
def test_one_process_per_node_takes_all_its_gpus(environ, expected, monkeypatch):
    from lmjax.runtime.cluster import slurm_gpus

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert slurm_gpus() == expected


# Processes of this machine

STUB = """
import os, signal, sys, time
me, what = os.environ["JAX_PROCESS_ID"], sys.argv[2]
def end(number, frame):
    print(f"signal {number}", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)
print(what, me, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"], flush=True)
if what == "fail" and me == "1":
    sys.exit(3)
if what == "die" and me == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what != "end":
    time.sleep(60)
"""


@pytest.fixture
def stub(tmp_path):
    """A function that starts three processes of a stub of `python -m lmjax.cli`."""
    (tmp_path / "lmjax").mkdir()
    (tmp_path / "lmjax/__init__.py").touch()
    (tmp_path / "lmjax/cli.py").write_text(STUB)
    return lambda what: subprocess.Popen(
        [sys.executable, ROOT / "launch/processes.py", "--processes", "3", "--patience", "0.3",
         "--", "report", what],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize("what, code", [("end", 0), ("fail", 3), ("die", 128 + signal.SIGKILL)])
def test_processes_end_together(stub, what, code):
    process = stub(what)
    out, _ = process.communicate(timeout=PATIENCE)
    pattern = rf"\[(\d)\] {what} \1 3 (127\.0\.0\.1:\d+)"
    said = [re.fullmatch(pattern, line) for line in out.splitlines()]
    assert sorted(match[1] for match in said) == ["0", "1", "2"]
    assert len({match[2] for match in said}) == 1
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_all_processes(stub, number):
    process = stub("wait")
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    assert sorted(out.split("\n")) == ["", *(f"[{i}] signal {int(number)}" for i in range(3))]
    assert process.returncode == 0


def test_local_runs_processes(cloud):
    """They use the environment that launch/lib.sh makes; a dry run makes none."""
    cloud.env["LMJAX_VENV"] = str(cloud.home / "venv")
    arguments = ("--processes", "2", "--devices-per-process", "4", "--dry-run", *TRAIN)
    python = cloud.env.pop("LMJAX_PYTHON")
    printed = cloud.run("local", *arguments).splitlines()
    assert len(printed) == 2 and not (cloud.home / "venv").exists()
    for number, line in enumerate(printed):
        words = shlex.split(line)
        assert f"JAX_PROCESS_ID={number}" in words and "JAX_NUM_PROCESSES=2" in words
        assert words[-6:] == ["lmjax.cli", *TRAIN[1:]]
        assert any(w.endswith("--xla_force_host_platform_device_count=4") for w in words)
    assert cloud.run("local", "--dry-run", *arguments[:4], *TRAIN).count("JAX_PROCESS_ID=") == 2
    cloud.env |= {"LMJAX_PYTHON": python, "RUN": "true"}
    host = pathlib.Path(python)
    echo = '  *processes.py*) shift; echo "$@" ;;\nesac'
    host.write_text(host.read_text().replace("esac", echo))
    passed_on = ["--processes", "2", "--", "train"]
    assert cloud.run("local", *passed_on).split() == passed_on


def test_local_says_what_it_would_do(cloud):
    cloud.env["LMJAX_VENV"] = str(cloud.home / "venv")
    said = cloud.run("local", "--config.train.steps=2", "--dry-run")
    assert said.endswith("train --config configs/quickstart.py --workdir runs/quickstart "
                         "--config.train.steps=2 \n")
    assert f"{cloud.home}/venv/bin/python -m lmjax.cli train" in said
    assert not (cloud.home / "venv").exists()


def test_gpu_check_refuses_a_time_below_0():
    command = [sys.executable, ROOT / "launch/gpu_check", "--dry-run", "--seconds", "-1"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2 and "--seconds: expected 0 or more, got -1" in done.stderr


@pytest.mark.long
def test_a_coordinator_that_cannot_be_reached(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        printed = finish(tmp_path / "run", expect=1, env={
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
            "LMJAX_JOIN_SECONDS": "2"})
    assert time.monotonic() - began < 60
    said = [line for line in printed.splitlines() if line.startswith("lmjax: error: ")]
    assert len(said) == 1
    assert f"all processes at the coordinator {address} within 2 s, got no answer" in said[0]
