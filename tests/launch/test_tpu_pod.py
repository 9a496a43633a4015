"""`launch/tpu_pod` with a stand-in for gcloud, which really runs the hosts' commands in folders."""

import re
import shlex
import signal
import sys

import pytest
from cloud import PATIENCE, ROOT, Cloud, executable
from processes import lines

from lmjax.runtime.chips import TPU_FLAGS

POD = ("--name", "pod", "--project", "p", "--zone", "z", "--topology", "v6e-16", "--spot",
       "--poll", "0")
TRAIN = ("--", "train", "--config", "configs/synthetic.py:tiny", "--workdir", "/mnt/a b")
NONE, ACTIVE, SUSPENDED = ["NOT_FOUND: no pod", 1], ["ACTIVE", 0], ["SUSPENDED", 0]
QUEUED = ["WAITING_FOR_RESOURCES", 0], ["PROVISIONING", 0], ACTIVE
COMES = NONE, *QUEUED
RUN = ["scp", "install", "start", "follow"]
ONCE = ["describe", "create", "describe", "describe", "describe", *RUN]
AGAIN = ["describe", "running", *RUN]  # on the same pod
END = ["delete", "describe"]
# A run that can be stopped.
WAITING = f"echo running; trap 'echo saved; exit 0' TERM; sleep {PATIENCE} & wait"

LONG = pytest.mark.long


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_tpu_pod_creates_runs_and_cleans_up(cloud):
    """On the hosts the checkout, the command's words and the flags are as they were given."""
    cloud.answer({"describe": COMES})
    out = cloud.run("tpu_pod", *POD, *TRAIN, "--config.sample.prompts=['a NODE']")
    assert cloud.verbs() == [*ONCE, *END]
    words = [line.removeprefix("word ") for line in out.splitlines() if line.startswith("word ")]
    assert words == ["-m", "lmjax.cli", *TRAIN[1:], "--config.sample.prompts=['a NODE']"]
    for line in (f"LIBTPU_INIT_ARGS={' '.join(TPU_FLAGS['v6e'])}", "LMJAX_JOIN_SECONDS=1800",
                 "LMJAX_STOPPED_CODE=75"):
        assert f"{line}\n" in out
    assert "exit code" not in out
    copied = cloud.home / "hosts/pod/lmjax/launch/tpu_pod"
    assert copied.read_bytes() == (ROOT / "launch/tpu_pod").read_bytes()
    create = next(call["words"] for call in cloud.calls() if " create " in call["words"])
    for part in ("queued-resources create pod", "--node-id pod", "--accelerator-type v6e-16",
                 "--spot", "--runtime-version v2-alpha-tpuv6e", "--project p --zone z"):
        assert part in create
    assert all("--project p --zone z" in call["words"] for call in cloud.calls())
    assert cloud.said.count(" describe ") == 1 and "tpu_pod: pod: PROVISIONING\n" in cloud.said


def test_tpu_pod_passes_on_variables_and_options_of_gcloud(cloud):
    """The user's variables replace ours."""
    cloud.answer({"describe": COMES})
    out = cloud.run("tpu_pod", *POD, "--env", "MINE=a 'b'", "--env", "LIBTPU_INIT_ARGS=--own",
                    "--extras", "tpu,hf", "--create=--network=n --internal-ips",
                    "--ssh=--tunnel-through-iap", *TRAIN)
    assert "MINE=a 'b'\n" in out and "LIBTPU_INIT_ARGS=--own\n" in out
    words = dict(zip(cloud.verbs(), [call["words"] for call in cloud.calls()], strict=True))
    assert "--network=n --internal-ips" in words["create"] and "setup tpu,hf" in words["install"]
    assert all(("--tunnel-through-iap" in words[verb]) == (verb in RUN) for verb in words)


def test_tpu_pod_continues_after_pre_emptions(cloud):
    """While the output streams, before the hosts could be reached, and before the pod was there."""
    cloud.answer({"describe": [*COMES, *[SUSPENDED] * 2, *QUEUED, *[SUSPENDED] * 2,
                               *[["FAILED", 0]] * 3, *QUEUED],
                  "tail -n": [["step 7", 255], ["done\nlmjax: exit code 0", 0]],
                  " scp ": [None, *[["", 1]] * 5, None]})
    out = cloud.run("tpu_pod", *POD, "--restarts", "3", *TRAIN)
    assert out.split() == ["step", "7", "done"]
    verbs = cloud.verbs()
    assert verbs[:13] == [*ONCE, "describe", "describe", *END]
    assert verbs[-2:] == END and verbs.count("create") == 4
    starts = [call["words"] for call, verb in zip(cloud.calls(), verbs, strict=True)
              if verb == "start"]
    assert len(starts) == 2 and starts[0] == starts[1]


@pytest.mark.long
def test_a_pod_that_cannot_be_created_again_counts_as_a_restart(cloud):
    cloud.answer({"describe": [*COMES, SUSPENDED], " create ": [None, ["no capacity", 1]],
                  "tail -n": [["~", 255]]})
    out = cloud.run("tpu_pod", *POD, "--restarts", "3", *TRAIN, expect=1)
    assert "could not create pod" in out
    assert cloud.verbs().count("create") == 4


@pytest.mark.long
def test_tpu_pod_connects_again(cloud):
    """After a lost connection the output continues at the line that it had reached."""
    cloud.answer({"describe": COMES, "tail -n": [
        ["a 1%\ra 2%\nstep 2\nste~", 255], ["step 3\n100%lmjax: exit code 0", 0]]})
    # Read as text, \r ends a line.
    assert cloud.run("tpu_pod", *POD, *TRAIN) == "a 1%\na 2%\nstep 2\nstep 3\n100%"
    assert cloud.verbs() == [*ONCE, "describe", "follow", *END]
    assert [call["words"] for call in cloud.calls() if "tail -n +3 " in call["words"]]


@pytest.mark.long
def test_tpu_pod_without_a_connection_stops_the_run_before_it_deletes(cloud):
    cloud.answer({"describe": COMES, "tail -n": [["~", 255]]})
    cloud.env["RUN"] = WAITING
    out = cloud.run("tpu_pod", *POD, "--restarts", "1", *TRAIN, expect=1)
    assert "lost the connection" in out
    verbs = cloud.verbs()
    assert verbs[-3:] == ["stop", *END]
    assert verbs.count("install") == 1  # it saw that the run was alive
    log = (cloud.home / "hosts/pod/lmjax/run.log").read_text()
    assert log.endswith("saved\nlmjax: exit code 0\n")


@pytest.mark.long
def test_tpu_pod_asks_again_while_gcloud_does_not_answer(cloud):
    """Without an answer it takes the pod neither for absent nor for deleted."""
    down = ["UNAVAILABLE: try again", 1]
    cloud.answer({"describe": [NONE, *QUEUED[:2], *[down] * 9, ACTIVE, down, ACTIVE],
                  "tail -n": [["step 1", 255], ["lmjax: exit code 0", 0]]})
    cloud.run("tpu_pod", *POD, *TRAIN)
    verbs = cloud.verbs()
    assert verbs.count("create") == verbs.count("delete") == 1 and "UNAVAILABLE" in cloud.said
    (cloud.home / "calls").unlink()
    cloud.answer({"describe": [down]})
    out = cloud.run("tpu_pod", *POD, *TRAIN, expect=1)
    assert "could not describe pod: UNAVAILABLE" in out
    assert cloud.verbs() == ["describe"] * 5


@pytest.mark.parametrize("error", [
    "ERROR: You do not currently have an active account selected.\n"
    "Please run:\n  $ gcloud auth login",
    "ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.get' denied"])
def test_tpu_pod_without_access_does_not_ask_again(cloud, error):
    cloud.answer({"describe": [[error, 1]]})
    said = cloud.run("tpu_pod", *POD, *TRAIN, expect=1)
    got = " ".join(error.split())
    assert f"expected gcloud to have access to project p, got: {got}" in said
    assert cloud.verbs() == ["describe"]


@pytest.mark.parametrize("code", [pytest.param(75, marks=LONG), 1, pytest.param(134, marks=LONG)])
def test_tpu_pod_restarts_a_run_that_was_stopped_or_failed(cloud, code):
    """On the same pod, if that is there, after it has installed the checkout again."""
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = (f"test -e ../again || {{ touch ../again; sh -c 'exit {code}'; exit $?; }}; "
                        "echo well")
    assert cloud.run("tpu_pod", *POD, *TRAIN).endswith("well\n")
    assert cloud.verbs() == [*ONCE, *AGAIN, *END]


@pytest.mark.parametrize("code, restarts, runs", [
    (2, "5", 1), pytest.param(3, "0", 1, marks=LONG), (75, "1", 2),
    pytest.param(3, "9", 4, marks=LONG),
    pytest.param(75, "5", 6, marks=LONG)])
def test_tpu_pod_ends_with_the_code_of_a_run_that_failed(cloud, code, restarts, runs):
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = f"sh -c 'exit {code}'; exit $?"
    cloud.run("tpu_pod", *POD, "--restarts", restarts, *TRAIN, expect=code)
    verbs = cloud.verbs()
    assert verbs.count("create") == 1 and verbs[-2:] == END and verbs.count("start") == runs


@pytest.mark.long
@pytest.mark.parametrize("answers, word", [
    ({"describe": [NONE], " create ": [["no quota", 1]]}, "could not create"),
    ({"describe": [NONE, ["FAILED", 0]]}, "got FAILED"),
    ({"describe": COMES, "tar xzf": [["", 1]]}, "could not install on"),
    ({"describe": COMES, " delete ": [["", 1]]}, "could not delete pod, which may cost money"),
])
def test_tpu_pod_gives_up_on_what_never_worked_and_cleans_up(cloud, answers, word):
    cloud.answer(answers)
    assert word in cloud.run("tpu_pod", *POD, *TRAIN, expect=1)
    assert cloud.verbs()[-2:] == END and cloud.verbs().count("create") == 1


@pytest.mark.long
def test_tpu_pod_deletes_until_there_is_none(cloud):
    cloud.answer({"describe": [*COMES, ACTIVE, ["DELETING", 0], ["DELETING", 0], ACTIVE],
                  " delete ": [["", 1], None]})
    cloud.run("tpu_pod", *POD, *TRAIN)
    assert cloud.verbs() == [*ONCE, *END, *END]


@pytest.mark.parametrize("number, keep", [
    pytest.param(signal.SIGINT, False, marks=LONG), (signal.SIGTERM, False),
    (signal.SIGINT, True)])
def test_tpu_pod_interrupted(cloud, number, keep):
    """The run saves its step, then the pod is deleted. With --keep both continue."""
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
        # Another command touches neither the run nor its files.
        (host / "launch/tpu_pod").unlink()
        before = len(cloud.calls())
        assert "expected no other run on pod, got one of `lmjax train" in cloud.run(
            "tpu_pod", *POD, *TRAIN, "--config.train.steps=7", expect=2)
        assert cloud.verbs()[before:] == ["describe", "running"]
        # The same command shows the run from its first line, and without --keep ends it.
        before = len(cloud.calls())
        again = cloud.start("tpu_pod", *POD, *TRAIN)
        while again.stdout.readline() != "running\n":
            pass
        again.send_signal(number)
        again.communicate(timeout=PATIENCE)
        verbs = cloud.verbs()[before:]
        assert verbs == ["describe", "running", "start", "follow", "stop", *END]
        assert "saved" in (host / "run.log").read_text()
        assert not (host / "launch/tpu_pod").exists()


@pytest.mark.long
def test_tpu_pod_interrupted_while_it_asks_for_the_pod(cloud):
    """The pod that it asked for is deleted."""
    cloud.answer({"describe": COMES, " create ": [["", 0, 2]]})
    process = cloud.start("tpu_pod", *POD, *TRAIN)
    while " create " not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and cloud.verbs() == ["describe", "create", *END]


@pytest.mark.long
def test_the_documented_set_up_works_and_works_again(cloud):
    """The host's Python cannot make environments; after a restart its disk is mounted already."""
    page = (ROOT / "docs/launching.md").read_text()
    text = re.search(r"```bash\n(./launch/tpu_pod.*?)```", page, re.DOTALL)[1]
    command = shlex.split(text.replace("\\\n", ""))
    host = cloud.env.pop("LMJAX_PYTHON")
    executable(cloud.home / "bin/python3.12", f"""#!/bin/sh
case "$*" in *"import ensurepip"*) test -e {cloud.home}/venv ;; *) exec {host} "$@" ;; esac
""")
    executable(cloud.home / "bin/mountpoint", f"#!/bin/sh\ntest -e {cloud.home}/mounted\n")
    executable(cloud.home / "bin/sudo", f"""#!/bin/sh
echo "$@" >>{cloud.home}/sudo
case "$*" in
  *python3.12-venv) touch {cloud.home}/venv ;;
  "mount "*) touch {cloud.home}/mounted ;;
esac
""")
    cloud.answer({"describe": COMES})
    cloud.env["RUN"] = "test -e ../again || { touch ../again; exit 75; }"
    where = command.index("--")
    options = [word for word in command[1:where] if word != "--dry-run"]
    cloud.run("tpu_pod", *options, "--poll", "0", *command[where:])
    assert cloud.verbs().count("install") == 2
    said = (cloud.home / "sudo").read_text().splitlines()
    lock = "DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=600"
    assert said[:2] == [f"{lock} update", f"{lock} install python3.12-venv"]
    assert "nfs-common" in said[2]
    assert [line.split()[0] for line in said[2:]].count("mount") == 1


@pytest.mark.long
def test_tpu_pod_trains(cloud, tmp_path):
    """The real `lmjax train`, from the checkout that arrived on the host."""
    host = cloud.home / "host/python3"
    stub = host.read_text().replace('cp "$0" python', f"cp {tmp_path}/real python")
    host.write_text(stub)
    executable(tmp_path / "real", f"""#!/bin/sh
case "$*" in *"pip install"*) ;; *) exec {sys.executable} "$@" ;; esac
""")
    cloud.env |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu",
                  "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    cloud.answer({"describe": COMES})
    cloud.run("tpu_pod", *POD, *TRAIN[:-1], str(tmp_path / "a run"), "--config.train.steps=3",
              "--config.optimizer.warmup_steps=1", "--config.eval.every=0")
    assert cloud.verbs() == [*ONCE, *END]
    assert [r["step"] for r in lines(tmp_path / "a run") if "loss" in r] == [1, 2, 3]


def test_tpu_pod_of_two_slices_and_dry_run(cloud):
    process = cloud.start("tpu_pod", *POD[:7], "2xv5p-128", "--reserved", "--dry-run", *TRAIN)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and not cloud.calls()
    for part in ("--node-prefix pod --node-count 2 --accelerator-type v5p-128", "--reserved",
                 "ssh pod-0", "ssh pod-1", "lmjax.tgz pod-0:", "lmjax.tgz pod-1:", "delete pod",
                 *TPU_FLAGS["slices"]):
        assert part in err


def test_tpu_pod_serves_on_one_host(cloud):
    serve = ("--", "serve", "/mnt/a b", "--port", "8000")
    one = (*POD[:7], "v5e-8", "--extras", "tpu,serve", "--dry-run", *serve)
    _, err = cloud.start("tpu_pod", *one).communicate(timeout=PATIENCE)
    assert "lmjax.cli serve" in err and "--port 8000" in err and "v5litepod-8" in err
    assert "--topology: expected a slice of one host" in cloud.run(
        "tpu_pod", *POD, "--extras", "tpu,serve", *serve, expect=2)
    assert "--extras: expected the extra serve" in cloud.run(
        "tpu_pod", *POD[:7], "v5e-8", *serve, expect=2)
    assert not cloud.calls()


@pytest.mark.parametrize("wrong", [
    ("--topology", "v5e:2x8"), ("--topology", "v5p:4x4x12"), ("--topology", "v5e-2"),
    ("--topology", "cpu"), ("--env", "A"), ("--restarts", "-3"), ("--poll", "-1"),
    ("--name", "My_Pod"), ("--config", "configs/nowhere.py")])
def test_tpu_pod_refuses_before_it_asks_for_a_pod(cloud, wrong):
    in_command = wrong[0] == "--config"
    arguments = (*POD, *TRAIN, *wrong) if in_command else (*POD, *wrong, *TRAIN)
    assert f"{wrong[0]}: expected" in cloud.run("tpu_pod", *arguments, expect=2)
    assert not cloud.calls()
