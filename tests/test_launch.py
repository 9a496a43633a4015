"""What starts a run elsewhere, against stand-ins for gcloud, kubectl, sbatch and srun that record their calls."""

import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from processes import finish, lines

from lmjax.chips import TPU_FLAGS, parse_topology

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds that a stand-in may take on a busy machine


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Cloud:
    """A folder with stand-ins on the PATH. `answers`: a part of a call -> [output, exit code] of the first such call,
    the second, ...; the last one goes on. A call with None or without an answer succeeds, and one of ssh or scp is
    really done, in a folder of the node's name. From a delete that succeeds to the next create there is no pod to
    describe. An output that ends in ~ breaks off there; a third item is seconds until the call counts as made."""

    FLAGS = {  # of gcloud's reference, by verb
        "create": "node-id node-prefix node-count accelerator-type runtime-version spot reserved network internal-ips",
        "describe": "format", "delete": "force quiet", "ssh": "worker command tunnel-through-iap",
        "scp": "worker tunnel-through-iap"}

    STAND_IN = """#!{python} -IS
import json, subprocess, sys, time
from pathlib import Path
home, words = Path({home!r}), " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
stdin = "" if "gcloud" in sys.argv[0] else sys.stdin.read()
answers = json.loads((home / "answers").read_text())
def answer(part, number):
    return answers[part][min(number, len(answers[part])) - 1]
if " create " in words and " create " in answers and (now := answer(" create ", 1)) and len(now) > 2:
    time.sleep(now[2])
with open(home / "calls", "a") as file:
    file.write(json.dumps({{"words": words, "stdin": stdin}}) + "\\n")
made = [json.loads(line)["words"] for line in (home / "calls").read_text().splitlines()]
if "gcloud" in sys.argv[0]:
    verb, flags = sys.argv[4], sys.argv[5:]
    if "--command" in flags:
        del flags[flags.index("--command") + 1]
    known = {flags!r}[verb].split() + ["project", "zone"]
    unknown = [f for f in flags if f.startswith("-") and f[2:].partition("=")[0] not in known]
    if unknown or sys.argv[1:3] != ["compute", "tpus"] or sys.argv[3] != (
            "tpu-vm" if verb in ("ssh", "scp") else "queued-resources"):
        sys.exit(f"ERROR: (gcloud) unrecognized arguments: {{unknown or sys.argv}}")
there, deletes, looks = True, 0, 0
for call in made:
    if " delete " in call:
        deletes += 1
        there = there and bool(" delete " in answers and (now := answer(" delete ", deletes)) and now[1])
    there = there or " create " in call
    looks += there and " describe " in call
if " describe " in words and not there:
    sys.exit("ERROR: NOT_FOUND: Resource 'pod' was not found")
for part in answers:
    number = looks if part == "describe" else sum(part in call for call in made)
    if part in words and (now := answer(part, number)):
        print(now[0].removesuffix("~"), end="" if now[0].endswith("~") else "\\n", flush=True)
        if now[1]:
            print(now[0], file=sys.stderr)
        sys.exit(now[1])
if "ssh" in sys.argv:
    node = home / "hosts" / sys.argv[sys.argv.index("ssh") + 1]
    sys.exit(subprocess.run(["bash", "-c", sys.argv[sys.argv.index("--command") + 1]], cwd=node).returncode)
if "scp" in sys.argv:
    source, target = sys.argv[sys.argv.index("scp") + 1 :][:2]
    node = home / "hosts" / target.partition(":")[0]
    node.mkdir(parents=True, exist_ok=True)
    (node / target.partition(":")[2]).write_bytes(Path(source).read_bytes())
if "sbatch" in sys.argv[0]:
    sys.exit(subprocess.run(["bash", "-c", stdin]).returncode)
"""

    def __init__(self, home: pathlib.Path):
        self.home = home
        for name in ("gcloud", "kubectl", "sbatch", "scontrol"):
            executable(home / "bin" / name, self.STAND_IN.format(python=sys.executable, home=str(home),
                                                                         flags=self.FLAGS))
        # The Python of the hosts: makes environments of itself, installs nothing, and "trains".
        host = executable(home / "host" / "python3", """#!/bin/sh
case "$*" in
  *"sys.version_info <"*) exit 0 ;;
  *"%d.%d"*) echo 3.12 ;;
  *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cd "$last/bin"; cp "$0" python; touch pip ;;
  *lmjax.cli*) env | grep -e ^LIBTPU -e ^LMJAX_ -e ^MINE; for word; do echo "word $word"; done; eval "$RUN" ;;
esac
""")
        # Without what ./launch/test was told: a host must not install into the environment that runs the tests.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LMJAX_")}
        self.env = {**kept, "PATH": f"{home}/bin:{os.environ['PATH']}", "LMJAX_PYTHON": str(host), "RUN": "true"}
        self.answer({})

    def answer(self, answers: dict[str, list[list | None]]) -> None:
        (self.home / "answers").write_text(json.dumps(answers))

    def calls(self) -> list[dict]:
        path = self.home / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """create, describe, scp, ... in the order of the calls; ssh by what it is for."""
        kinds = {"tar xzf": "install", "setsid": "start", "tail -n": "follow", "pkill": "stop",
                 "&& cat run.command": "running"}
        words = [call["words"] for call in self.calls()]
        return [next((kind for part, kind in kinds.items() if part in w), None) if " ssh " in w else w.split()[4]
                for w in words]

    def start(self, name: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen([ROOT / "launch" / name, *arguments], env=self.env, text=True, cwd=self.home,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, name: str, *arguments: str, expect: int = 0) -> str:
        process = self.start(name, *arguments)
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == expect, out + err
        self.said = err
        return out + (err if expect else "")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


# Cloud TPU ---------------------------------------------------------------------------------------------------

POD = ("--name", "pod", "--project", "p", "--zone", "z", "--topology", "v6e-16", "--spot", "--poll", "0")
TRAIN = ("--", "train", "--config", "configs/synthetic.py:tiny", "--workdir", "/mnt/a b")
NONE, ACTIVE, SUSPENDED = ["NOT_FOUND: no pod", 1], ["ACTIVE", 0], ["SUSPENDED", 0]
QUEUED = ["WAITING_FOR_RESOURCES", 0], ["PROVISIONING", 0], ACTIVE
COMES = NONE, *QUEUED
RUN = ["scp", "install", "start", "follow"]
ONCE = ["describe", "create", "describe", "describe", "describe", *RUN]
AGAIN = ["describe", "running", *RUN]  # on the same pod
END = ["delete", "describe"]
WAITING = f"echo running; trap 'echo saved; exit 0' TERM; sleep {PATIENCE} & wait"  # a run that can be stopped


def test_tpu_pod_creates_runs_and_cleans_up(cloud):
    """The hosts' side really runs: the checkout arrives, the command's words and the flags as they were given."""
    cloud.answer({"describe": COMES})
    out = cloud.run("tpu_pod", *POD, *TRAIN, "--config.sample.prompts=['a NODE']")
    assert cloud.verbs() == [*ONCE, *END]
    assert [line.removeprefix("word ") for line in out.splitlines() if line.startswith("word ")] == [
        "-m", "lmjax.cli", *TRAIN[1:], "--config.sample.prompts=['a NODE']"]
    for line in (f"LIBTPU_INIT_ARGS={' '.join(TPU_FLAGS['v6e'])}", "LMJAX_JOIN_SECONDS=1800", "LMJAX_STOPPED_CODE=75"):
        assert f"{line}\n" in out
    assert "exit code" not in out
    assert (cloud.home / "hosts/pod/lmjax/launch/tpu_pod").read_bytes() == (ROOT / "launch/tpu_pod").read_bytes()
    create = next(call["words"] for call in cloud.calls() if " create " in call["words"])
    for part in ("queued-resources create pod", "--node-id pod", "--accelerator-type v6e-16", "--spot",
                 "--runtime-version v2-alpha-tpuv6e", "--project p --zone z"):
        assert part in create
    assert all("--project p --zone z" in call["words"] for call in cloud.calls())
    assert cloud.said.count(" describe ") == 1 and "tpu_pod: pod: PROVISIONING\n" in cloud.said


def test_tpu_pod_passes_on_what_it_does_not_know(cloud):
    """Variables of the run, of which the user's replace ours, and options of gcloud."""
    cloud.answer({"describe": COMES})
    out = cloud.run("tpu_pod", *POD, "--env", "MINE=a 'b'", "--env", "LIBTPU_INIT_ARGS=--own", "--extras", "tpu,hf",
                    "--create=--network=n --internal-ips", "--ssh=--tunnel-through-iap", *TRAIN)
    assert "MINE=a 'b'\n" in out and "LIBTPU_INIT_ARGS=--own\n" in out
    words = dict(zip(cloud.verbs(), [call["words"] for call in cloud.calls()], strict=True))
    assert "--network=n --internal-ips" in words["create"] and "setup tpu,hf" in words["install"]
    assert all(("--tunnel-through-iap" in words[verb]) == (verb in RUN) for verb in words)


def test_tpu_pod_goes_on_after_a_pre_emption(cloud):
    """Taken away while the output streams, once more before the hosts could be reached, and before it was there."""
    cloud.answer({"describe": [*COMES, *[SUSPENDED] * 2, *QUEUED, *[SUSPENDED] * 2, *[["FAILED", 0]] * 3, *QUEUED],
                  "tail -n": [["step 7", 255], ["done\nlmjax: exit code 0", 0]],
                  " scp ": [None, *[["", 1]] * 5, None]})
    out = cloud.run("tpu_pod", *POD, "--restarts", "3", *TRAIN)
    assert out.split() == ["step", "7", "done"]
    verbs = cloud.verbs()
    assert verbs[:13] == [*ONCE, "describe", "describe", *END] and verbs[-2:] == END and verbs.count("create") == 4
    starts = [call["words"] for call, verb in zip(cloud.calls(), verbs, strict=True) if verb == "start"]
    assert len(starts) == 2 and starts[0] == starts[1]


def test_a_pod_that_cannot_be_made_anew_counts_as_a_restart(cloud):
    cloud.answer({"describe": [*COMES, SUSPENDED], " create ": [None, ["no capacity", 1]], "tail -n": [["~", 255]]})
    assert "could not create pod" in cloud.run("tpu_pod", *POD, "--restarts", "3", *TRAIN, expect=1)
    assert cloud.verbs().count("create") == 4


def test_tpu_pod_finds_the_way_again(cloud):
    """This machine loses its connection while the pod lives: it shows the rest, from the line that it had reached."""
    cloud.answer({"describe": COMES, "tail -n": [
        ["a 1%\ra 2%\nstep 2\nste~", 255], ["step 3\n100%lmjax: exit code 0", 0]]})
    assert cloud.run("tpu_pod", *POD, *TRAIN) == "a 1%\na 2%\nstep 2\nstep 3\n100%"  # as text, \r is a line's end
    assert cloud.verbs() == [*ONCE, "describe", "follow", *END]
    assert [call["words"] for call in cloud.calls() if "tail -n +3 " in call["words"]]


def test_tpu_pod_that_has_lost_the_way_stops_the_run_before_it_deletes(cloud):
    cloud.answer({"describe": COMES, "tail -n": [["~", 255]]})
    cloud.env["RUN"] = WAITING
    assert "lost the way" in cloud.run("tpu_pod", *POD, "--restarts", "1", *TRAIN, expect=1)
    verbs = cloud.verbs()
    assert verbs[-3:] == ["stop", *END] and verbs.count("install") == 1  # it saw that the run was still there
    assert (cloud.home / "hosts/pod/lmjax/run.log").read_text().endswith("saved\nlmjax: exit code 0\n")


def test_tpu_pod_deletes_nothing_that_it_knows_nothing_of(cloud):
    """An answer that does not come is no answer: neither is there no pod, nor is it gone."""
    down = ["UNAVAILABLE: try again", 1]
    cloud.answer({"describe": [NONE, *QUEUED[:2], *[down] * 9, ACTIVE, down, ACTIVE], "tail -n": [
        ["step 1", 255], ["lmjax: exit code 0", 0]]})
    cloud.run("tpu_pod", *POD, *TRAIN)
    verbs = cloud.verbs()
    assert verbs.count("create") == verbs.count("delete") == 1 and "UNAVAILABLE" in cloud.said
    (cloud.home / "calls").unlink()
    cloud.answer({"describe": [down]})
    assert "could not describe pod: UNAVAILABLE" in cloud.run("tpu_pod", *POD, *TRAIN, expect=1)
    assert cloud.verbs() == ["describe"] * 5


@pytest.mark.parametrize("code", [75, 1, 134])
def test_tpu_pod_starts_again_what_was_stopped_or_failed(cloud, code):
    """On the same pod, where that is there: with the checkout and the set-up of the first time."""
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = f"test -e ../again || {{ touch ../again; sh -c 'exit {code}'; exit $?; }}; echo well"
    assert cloud.run("tpu_pod", *POD, *TRAIN).endswith("well\n")
    assert cloud.verbs() == [*ONCE, *AGAIN, *END]


@pytest.mark.parametrize("code, restarts, runs", [(2, "5", 1), (3, "0", 1), (75, "1", 2)])
def test_tpu_pod_ends_with_the_code_of_a_run_that_failed(cloud, code, restarts, runs):
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = f"sh -c 'exit {code}'; exit $?"
    cloud.run("tpu_pod", *POD, "--restarts", restarts, *TRAIN, expect=code)
    assert cloud.verbs().count("create") == 1 and cloud.verbs()[-2:] == END and cloud.verbs().count("start") == runs


@pytest.mark.parametrize("answers, word", [
    ({"describe": [NONE], " create ": [["no quota", 1]]}, "could not create"),
    ({"describe": [NONE, ["FAILED", 0]]}, "got FAILED"),
    ({"describe": COMES, "tar xzf": [["", 1]]}, "could not install on"),
    ({"describe": COMES, " delete ": [["", 1]]}, "could not delete pod, which may cost"),
])
def test_tpu_pod_says_what_gcloud_could_not_do_and_cleans_up(cloud, answers, word):
    """At once: what has never worked is not tried a hundred times."""
    cloud.answer(answers)
    assert word in cloud.run("tpu_pod", *POD, *TRAIN, expect=1)
    assert cloud.verbs()[-2:] == END and cloud.verbs().count("create") == 1


def test_tpu_pod_deletes_until_there_is_none(cloud):
    cloud.answer({"describe": [*COMES, ACTIVE, ["DELETING", 0], ["DELETING", 0], ACTIVE], " delete ": [["", 1], None]})
    cloud.run("tpu_pod", *POD, *TRAIN)
    assert cloud.verbs() == [*ONCE, *END, *END]


@pytest.mark.parametrize("number, keep", [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_tpu_pod_interrupted(cloud, number, keep):
    """The run is asked to save its step, then the pod is deleted; with --keep both go on."""
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = WAITING
    process = cloud.start("tpu_pod", *POD, *(("--keep",) if keep else ()), *TRAIN)
    while (line := process.stdout.readline()) != "running\n":
        assert line, process.stderr.read()
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    host = cloud.home / "hosts/pod/lmjax"
    assert cloud.verbs() == [*ONCE, *([] if keep else ["stop", *END])]
    assert ("saved" in (host / "run.log").read_text()) == (not keep)
    if keep:
        # Another command leaves the run and its files alone.
        (host / "launch/tpu_pod").unlink()
        before = len(cloud.calls())
        assert "expected no other run on pod, got one of `lmjax train" in cloud.run(
            "tpu_pod", *POD, *TRAIN, "--config.train.steps=7", expect=2)
        assert cloud.verbs()[before:] == ["describe", "running"]
        # The same one finds the run, shows it from its first line, and without --keep ends it.
        before = len(cloud.calls())
        again = cloud.start("tpu_pod", *POD, *TRAIN)
        while again.stdout.readline() != "running\n":
            pass
        again.send_signal(number)
        again.communicate(timeout=PATIENCE)
        assert cloud.verbs()[before:] == ["describe", "running", "start", "follow", "stop", *END]
        assert "saved" in (host / "run.log").read_text() and not (host / "launch/tpu_pod").exists()


def test_tpu_pod_interrupted_while_it_asks_for_the_pod(cloud):
    """What comes of the question is deleted, not left behind."""
    cloud.answer({"describe": COMES, " create ": [["", 0, 2]]})
    process = cloud.start("tpu_pod", *POD, *TRAIN)
    while " create " not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and cloud.verbs() == ["describe", "create", *END]


def test_the_documented_set_up_works_and_works_again(cloud):
    """On a host whose Python cannot make environments, after a restart where the disk is mounted already."""
    page = (ROOT / "docs/launching.md").read_text()
    command = shlex.split(re.search(r"```bash\n(./launch/tpu_pod.*?)```", page, re.DOTALL)[1].replace("\\\n", ""))
    host = cloud.env.pop("LMJAX_PYTHON")
    executable(cloud.home / "bin/python3.12", f"""#!/bin/sh
case "$*" in *"import ensurepip"*) test -e {cloud.home}/venv ;; *) exec {host} "$@" ;; esac
""")
    executable(cloud.home / "bin/mountpoint", f"#!/bin/sh\ntest -e {cloud.home}/mounted\n")
    executable(cloud.home / "bin/sudo", f"""#!/bin/sh
echo "$@" >>{cloud.home}/sudo
case "$*" in *python3.12-venv) touch {cloud.home}/venv ;; "mount "*) touch {cloud.home}/mounted ;; esac
""")
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = "test -e ../again || { touch ../again; exit 75; }"
    where = command.index("--")
    cloud.run("tpu_pod", *(word for word in command[1:where] if word != "--dry-run"), "--poll", "0", *command[where:])
    assert cloud.verbs().count("install") == 2
    said = (cloud.home / "sudo").read_text().splitlines()
    lock = "DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=600"
    assert said[:2] == [f"{lock} update", f"{lock} install python3.12-venv"]
    assert [line.split()[0] for line in said[2:]].count("mount") == 1 and "nfs-common" in said[2]


@pytest.mark.long
def test_tpu_pod_trains(cloud, tmp_path):
    """The real `lmjax train`, from the checkout that arrived on the host."""
    host = cloud.home / "host/python3"
    stub = host.read_text().replace('cp "$0" python', f"cp {tmp_path}/real python")
    host.write_text(stub)
    executable(tmp_path / "real", f"""#!/bin/sh
case "$*" in *"pip install"*) ;; *) exec {sys.executable} "$@" ;; esac
""")
    cloud.env |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    cloud.answer({"describe": COMES})
    cloud.run("tpu_pod", *POD, *TRAIN[:-1], str(tmp_path / "a run"), "--config.train.steps=3",
              "--config.optimizer.warmup_steps=1", "--config.eval.every=0")
    assert cloud.verbs() == [*ONCE, *END]
    assert [r["step"] for r in lines(tmp_path / "a run") if "loss" in r] == [1, 2, 3]


def test_tpu_pod_of_two_slices_and_dry_run(cloud):
    process = cloud.start("tpu_pod", *POD[:7], "2xv5p-128", "--reserved", "--dry-run", *TRAIN)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and not cloud.calls()
    for part in ("--node-prefix pod --node-count 2 --accelerator-type v5p-128", "--reserved", "ssh pod-0", "ssh pod-1",
                 "lmjax.tgz pod-0:", "lmjax.tgz pod-1:", "delete pod", *TPU_FLAGS["slices"]):
        assert part in err


@pytest.mark.parametrize("wrong", [("--topology", "v5e:2x8"), ("--topology", "v5p:4x4x12"), ("--topology", "v5e-2"),
                                   ("--topology", "cpu"), ("--env", "A"), ("--config", "configs/nowhere.py")])
def test_tpu_pod_refuses_before_it_asks_for_a_pod(cloud, wrong):
    arguments = (*POD, *TRAIN, *wrong) if wrong[0] == "--config" else (*POD, *wrong, *TRAIN)
    assert f"{wrong[0]}: expected" in cloud.run("tpu_pod", *arguments, expect=2)
    assert not cloud.calls()


# GKE ---------------------------------------------------------------------------------------------------------

JOB = ("--name", "job", "--image", "here/lmjax:1", "--queue", "tpu", "--volume", "claim:/runs")


@pytest.mark.parametrize("topology, slices, hosts, chips", [
    ("v5e:16x16", 1, 64, 4), ("v5e:2x4", 1, 1, 8), ("v5p-128", 1, 16, 4), ("2xv6e:16x16", 2, 64, 4),
    ("v4:2x2x1", 1, 1, 4)])
def test_gke(cloud, topology, slices, hosts, chips):
    yaml = pytest.importorskip("yaml")
    text = cloud.run("gke", *JOB, "--topology", topology, "--spot", "--dry-run", *TRAIN)
    assert not cloud.calls()
    job = yaml.safe_load(text)
    assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpu"
    replicated, = job["spec"]["replicatedJobs"]
    spec, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    container, = pod["containers"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (slices, hosts, hosts)
    assert container["resources"]["limits"] == {"google.com/tpu": chips} and container["args"] == list(TRAIN[1:])
    assert slices * hosts * chips == parse_topology(topology).chips
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "LIBTPU_INIT_ARGS": parse_topology(topology).flags, "LMJAX_JOIN_SECONDS": "1800", "LMJAX_STOPPED_CODE": "75",
        "JAX_COMPILATION_CACHE_DIR": "/runs/.xla-cache"}
    # Stopped and saved fails the Job, which starts the JobSet again; only what was refused ends it.
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["spec"]["failurePolicy"] == {
        "maxRestarts": 100, "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == "x".join(map(str, parse_topology(topology).shape))
    assert selector["cloud.google.com/gke-spot"] == "true"
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    cloud.answer({"kubectl": [["", 3]]})
    cloud.run("gke", *JOB, "--topology", topology, "--spot", *TRAIN, expect=3)
    assert cloud.calls() == [{"words": "kubectl apply -f -", "stdin": text}]


def test_gke_takes_names_that_yaml_would_not_and_the_environment(cloud):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(cloud.run(
        "gke", "--name", "2024", "--queue", "on", "--image", "i", "--topology", "v6e:4x4", "--dry-run", "--env",
        "A=b=c d", "--env", "LIBTPU_INIT_ARGS=--own", "--env", "LMJAX_JOIN_SECONDS=9", *TRAIN))
    assert (job["metadata"]["name"], job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]) == ("2024", "on")
    container, = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "LIBTPU_INIT_ARGS": "--own", "LMJAX_JOIN_SECONDS": "9", "LMJAX_STOPPED_CODE": "75", "A": "b=c d"}
    assert container["args"] == list(TRAIN[1:]) and "volumeMounts" not in container


@pytest.mark.parametrize("wrong", [("--name", "Job"), ("--volume", "claim"), ("--topology", "v5e:3"),
                                   ("--topology", "v5e:3x5"), ("--topology", "v5e:1x2"), ("--env", "A")])
def test_gke_refuses(cloud, wrong):
    assert f"{wrong[0]}: expected" in cloud.run("gke", *JOB, "--topology", "v5e:4x4", *wrong, *TRAIN, expect=2)
    assert not cloud.calls()


# Slurm -------------------------------------------------------------------------------------------------------

SRUN = """#!{python}
import os, re, subprocess, sys
script = open({script!r}).read()
nodes, tasks = (int(re.search(rf"--{{name}}=(\\d+)", script)[1]) for name in ("nodes", "ntasks-per-node"))
env = dict(os.environ, SLURM_JOB_ID="{job}", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=str(nodes * tasks),
           SLURM_STEP_NUM_TASKS=str(nodes * tasks), SLURM_STEP_NUM_NODES=str(nodes), SLURM_GPUS_ON_NODE="2")
running = [subprocess.Popen(sys.argv[3:], env=dict(env, SLURM_PROCID=str(i), SLURM_LOCALID=str(i % tasks)))
           for i in range(nodes * tasks)]
sys.exit(max(process.wait() for process in running))
"""
AS_IT_IS = """#!/bin/sh
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
exec "$@"
"""


def job_id() -> int:
    """One for which the port that JAX takes under Slurm, by the number of the job, is free."""
    for job in range(1000, 5000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 61440 + job % 4096)):
                return job


@pytest.mark.long
def test_slurm(cloud, tmp_path):
    """The script that is submitted really runs: two processes find each other by what Slurm sets, without arguments."""
    executable(cloud.home / "venv/bin/python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    cloud.env |= {"LMJAX_VENV": str(cloud.home / "venv"), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu",
                  "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    options = ("--nodes", "2", "--gpus", "2", "--time", "1:00:00")
    run = ("--", "train", "--config", "configs/synthetic.py:tiny", "--workdir", str(tmp_path / "a run"),
           "--config.train.steps=3", "--config.optimizer.warmup_steps=1", "--config.eval.every=0")
    script = cloud.run("slurm", *options, "--dry-run", *run)
    assert not cloud.calls()
    (tmp_path / "script").write_text(script)
    executable(cloud.home / "bin/srun", SRUN.format(python=sys.executable, script=str(tmp_path / "script"),
                                                    job=job_id()))
    cloud.run("slurm", *options, *run)
    assert cloud.calls() == [{"words": "sbatch --time 1:00:00", "stdin": script}]
    assert json.loads((tmp_path / "a run/run.json").read_text())["mesh"]["data"] == 2
    assert [r["step"] for r in lines(tmp_path / "a run") if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_slurm_queues_again_what_was_stopped_and_saved(cloud, code):
    """And nothing else; the run is told to say so by that code."""
    executable(cloud.home / "venv/bin/python", f'#!/bin/sh\n[ "$LMJAX_STOPPED_CODE" = 75 ] && exit {code}\n')
    executable(cloud.home / "bin/srun", AS_IT_IS)
    cloud.env |= {"LMJAX_VENV": str(cloud.home / "venv"), "SLURM_JOB_ID": "17"}
    cloud.run("slurm", *TRAIN, expect=code)
    calls = [call["words"] for call in cloud.calls()]
    assert calls == ["sbatch", *(["scontrol requeue 17"] if code == 75 else [])]


@pytest.mark.parametrize("options, nodes, tasks, gpus", [
    (("--nodes=4", "--gpus=2"), 4, 1, 2), (("--nodes", "4", "--gpus", "2", "--per-gpu"), 4, 2, 2), ((), 1, 1, 8)])
def test_slurm_options(cloud, options, nodes, tasks, gpus):
    script = cloud.run("slurm", *options, "--dry-run", *TRAIN)
    for name, number in {"nodes": nodes, "ntasks-per-node": tasks, "gpus-per-node": gpus}.items():
        assert f"#SBATCH --{name}={number}\n" in script


def test_slurm_refuses(cloud):
    assert "expected a number behind --gpus" in cloud.run("slurm", "--gpus=", *TRAIN, expect=2)
    assert "expected a number behind --nodes" in cloud.run("slurm", "--nodes", "all", *TRAIN, expect=2)
    assert "expected a command of lmjax" in cloud.run("slurm", "--nodes", "2", expect=2)
    assert "launch/slurm --nodes 4" in cloud.run("slurm", "--help")
    cloud.env["LMJAX_VENV"] = "/nowhere"
    assert "expected an environment at /nowhere" in cloud.run("slurm", *TRAIN, expect=2)


@pytest.mark.parametrize("environ, expected", [
    ({}, None),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}, None),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
      "JAX_LOCAL_DEVICE_IDS": "0"}, None),
])
def test_one_process_a_node_takes_all_its_gpus(environ, expected, monkeypatch):
    from lmjax.runtime import _local_devices

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert _local_devices() == expected


# Processes of this machine -----------------------------------------------------------------------------------

STUB = """
import os, signal, sys, time
me = os.environ["JAX_PROCESS_ID"]
def end(number, frame):
    print(f"signal {number}", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)
print(sys.argv[1], me, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"], flush=True)
if sys.argv[1] == "fail" and me == "1":
    sys.exit(3)
if sys.argv[1] == "die" and me == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] != "end":
    time.sleep(60)
"""


@pytest.fixture
def stub(tmp_path):
    """Where `python -m lmjax.cli` is a stub, and a function that starts it as three processes."""
    (tmp_path / "lmjax").mkdir()
    (tmp_path / "lmjax/__init__.py").touch()
    (tmp_path / "lmjax/cli.py").write_text(STUB)
    return lambda what: subprocess.Popen(
        [sys.executable, ROOT / "launch/processes.py", "--processes", "3", "--patience", "0.3", "--", what],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize("what, code", [("end", 0), ("fail", 3), ("die", 128 + signal.SIGKILL)])
def test_processes_end_together(stub, what, code):
    process = stub(what)
    out, _ = process.communicate(timeout=PATIENCE)
    said = [re.fullmatch(rf"\[(\d)\] {what} \1 3 (127\.0\.0\.1:\d+)", line) for line in out.splitlines()]
    assert sorted(match[1] for match in said) == ["0", "1", "2"] and len({match[2] for match in said}) == 1
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
    """Of the environment that launch/lib.sh makes; a dry run makes none."""
    cloud.env["LMJAX_VENV"] = str(cloud.home / "venv")
    arguments = ("--processes", "2", "--devices-per-process", "4", "--dry-run", "--", "train", "--config", "a b")
    python = cloud.env.pop("LMJAX_PYTHON")
    printed = cloud.run("local", *arguments).splitlines()
    assert len(printed) == 2 and not (cloud.home / "venv").exists()
    for number, line in enumerate(printed):
        words = shlex.split(line)
        assert f"JAX_PROCESS_ID={number}" in words and "JAX_NUM_PROCESSES=2" in words
        assert words[-4:] == ["lmjax.cli", "train", "--config", "a b"]
        assert any(w.endswith("--xla_force_host_platform_device_count=4") for w in words)
    cloud.env |= {"LMJAX_PYTHON": python, "RUN": "true"}
    host = pathlib.Path(python)
    host.write_text(host.read_text().replace("esac", '  *processes.py*) shift; echo "$@" ;;\nesac'))
    assert cloud.run("local", "--processes", "2", "--", "train").split() == ["--processes", "2", "--", "train"]


def test_a_coordinator_that_cannot_be_reached(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        printed = finish(tmp_path / "run", expect=2, env={
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
            "LMJAX_JOIN_SECONDS": "2"})
    assert time.monotonic() - began < 60
    said = [line for line in printed.splitlines() if line.startswith("lmjax: error: ")]
    assert len(said) == 1 and f"all processes at the coordinator {address} within 2 s, got no answer" in said[0]
