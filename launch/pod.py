"""A pod of Cloud TPU, as gcloud creates, reaches and deletes it. launch/tpu_pod uses it.

Needs only Python and gcloud.
"""

import argparse
import io
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from hosts_env import hosts_env  # noqa: E402  (beside this file)

from lmjax.errors import UserError  # noqa: E402  (from the checkout; neither imports JAX)
from lmjax.runtime.chips import parse_topology  # noqa: E402

# Chip -> the newest software version of Cloud TPU for it.
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5",
            "v6e": "v2-alpha-tpuv6e"}
PRODUCTS = {"v5e": "v5litepod"}  # our name of a chip -> Cloud TPU's, if that differs
# States of a queued resource.
COMING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LEAVING = ("SUSPENDING", "DELETING")
NONE = "NOT_FOUND"
# A new host may be installing packages itself and hold the lock.
APT = "sudo DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=600"
# Shell: chooses the host's Python, and makes sure that it can make environments.
PYTHON = ("export LMJAX_PYTHON=${LMJAX_PYTHON:-$(command -v python3.12 || echo python3.11)}; "
          '"$LMJAX_PYTHON" -c "import ensurepip" 2>/dev/null || '
          f'{{ {APT} update; {APT} install "${{LMJAX_PYTHON##*/}}-venv"; }}')
# Shell: whether the run is alive on a host. After a reboot another process may have its number.
RUNS = 'pgrep -s "$(cat run.pid)" -f lmjax.cli >/dev/null 2>&1'
END = "lmjax: exit code "  # begins the last line of a run's output
DENIED = ("auth login", "active account", "PERMISSION_DENIED")  # in gcloud's lasting errors
LOOK_SECONDS = 0.2  # between two looks of `tail` at a run's log
TRIES = 5  # to reach gcloud's services, and hosts that have just started
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
SAVE_SECONDS = 300  # until a run has saved its step and ended


def say(text: str) -> None:
    """Prints a line for people."""
    print(f"tpu_pod: {text}", file=sys.stderr, flush=True)


class Failed(Exception):
    """A command of gcloud failed."""


class Other(Exception):
    """The pod runs another command of lmjax, which is the message."""


def check_serving(hosts: int, args: argparse.Namespace) -> None:
    """Refuses to serve where `lmjax serve` would not run.

    Raises:
      UserError: more than one host, or the extra is not installed.
    """
    if hosts != 1:
        raise UserError("a slice of one host for serve, such as v5e-8", f"{hosts} hosts",
                        "choose a smaller one, or several pods behind a load balancer",
                        where="--topology")
    if "serve" not in args.extras.split(","):
        raise UserError("the extra serve", args.extras, "write --extras tpu,serve",
                        where="--extras")


class Pod:
    """A queued resource of Cloud TPU and its nodes, one per slice."""

    def __init__(self, args: argparse.Namespace, checkout: str):
        self.args, self.checkout, self.topology = args, checkout, parse_topology(args.topology)
        chip, slices = self.topology.chip, self.topology.slices
        hosts, _ = self.topology.hosts  # raises a UserError if there is no such slice
        if args.command[0] == "serve":
            check_serving(hosts * slices, args)
        if chip.name not in RUNTIMES:
            raise UserError(f"one of {', '.join(RUNTIMES)}, which queued resources offer",
                            self.topology, "start it with ./launch/gke", "--topology")
        cores = self.topology.chips // slices * chip.cores
        self.product = f"{PRODUCTS.get(chip.name, chip.name)}-{cores}"
        if parse_topology(self.product).shape != self.topology.shape:
            raise UserError(f"the usual shape of {self.product}", self.topology, "give its number",
                            "--topology")
        self.nodes = [args.name] if slices == 1 else [f"{args.name}-{i}" for i in range(slices)]
        self.env, self.command = hosts_env(self.topology, args.env), shlex.join(args.command)
        self.place = ["--project", args.project, "--zone", args.zone]
        self.asking: subprocess.Popen | None = None  # the last change of the queued resource
        self.seen = 0  # how many lines of the first host's log have been shown
        self.started = False
        self.last_state = ""  # "" until the first answer

    def gcloud(self, *words: str, quiet: bool = False, **how: object) -> subprocess.Popen:
        """Starts `gcloud compute tpus ...`, out of reach of this terminal's Ctrl-C."""
        command = ["gcloud", "compute", "tpus", *words, *self.place]
        if not quiet:
            say(shlex.join(command))
        if self.args.dry_run:
            command = ["true"]
        return subprocess.Popen(command, start_new_session=True, **how)

    def queue(self, verb: str, *words: str) -> bool:
        """Runs a verb on the queued resource. Returns whether it succeeded."""
        # No signal may come before `asking` is set, for which `delete` has to wait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        self.asking = self.gcloud(
            "queued-resources", verb, self.args.name, *words,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return not self.asking.wait()

    def state(self, tries: int = 0) -> str:
        """The state of the queued resource, as Cloud TPU names it; NONE if there is none.

        No answer means neither: asks again until there is an answer.

        Args:
          tries: how often to ask; 0: without limit.

        Raises:
          Failed: no answer after `tries`, or no access to the project.
        """
        if self.args.dry_run:
            return "ACTIVE"
        while True:
            asked = self.gcloud(
                "queued-resources", "describe", self.args.name, "--format=value(state.state)",
                quiet=bool(self.last_state), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True)
            out, error = (text.strip() for text in asked.communicate())
            state = out
            if asked.returncode:
                state = NONE if NONE in error else ""
            if state:
                if state != self.last_state:
                    say(f"{self.args.name}: {state}")
                self.last_state = state
                return state
            if not self.last_state and any(part in error for part in DENIED):
                raise Failed(f"expected gcloud to have access to project {self.args.project}, "
                             f"got: {' '.join(error.split())}; run `gcloud auth login`, or ask for "
                             "the role TPU Admin there")
            tries -= 1
            if not tries:
                raise Failed(f"could not describe {self.args.name}: {error}")
            say(f"could not describe {self.args.name}, asking again: {error}")
            time.sleep(self.args.poll)

    def ssh(self, node: str, command: str, worker: str = "0", **how: object) -> subprocess.Popen:
        """Starts a shell command on one host of a node, or on `all` of them."""
        return self.gcloud("tpu-vm", "ssh", node, f"--worker={worker}", *self.args.ssh,
                           "--command", command, **how)

    def everywhere(self, what: str, start: Callable[[str], subprocess.Popen]) -> None:
        """Runs `start` for all nodes at once, and again until it succeeds on all of them."""
        for left in reversed(range(TRIES)):
            running = [start(node) for node in self.nodes]
            if not any([process.wait() for process in running]):
                return
            if left:
                time.sleep(self.args.poll)
        raise Failed(f"could not {what} all hosts of {self.args.name}")

    def create(self) -> bool:
        """Waits until the pod is there. Asks for one first, if there is none or it is unusable.

        Returns whether it was there already.
        """
        args = self.args
        state = NONE if args.dry_run else self.state(tries=0 if self.last_state else TRIES)
        if there := state in (*COMING, "ACTIVE"):
            say(f"{args.name} is there already")
        else:
            if state != NONE:
                self.delete()
            slices = ["--node-id", args.name] if len(self.nodes) == 1 else [
                "--node-prefix", args.name, "--node-count", str(len(self.nodes))]
            kind = [f"--{name}" for name in ("spot", "reserved") if getattr(args, name)]
            runtime = args.runtime_version or RUNTIMES[self.topology.chip.name]
            if not self.queue("create", *slices, "--accelerator-type", self.product,
                              "--runtime-version", runtime, *kind, *args.create):
                raise Failed(f"could not create {args.name}")
            state = self.state()
        while state in COMING:
            time.sleep(args.poll)
            state = self.state()
        if state != "ACTIVE":
            raise Failed(f"expected {args.name} to become ACTIVE, got {state}")
        return there

    def delete(self) -> None:
        """Deletes the pod until there is none."""
        if self.asking:  # `create` may still be asking for one
            self.asking.wait()
        for _ in range(TRIES):
            self.queue("delete", "--force", "--quiet")
            if self.args.dry_run:
                return
            while (state := self.state(tries=TRIES)) in LEAVING:
                time.sleep(self.args.poll)
            if state == NONE:
                return
            time.sleep(self.args.poll)
        raise Failed(f"could not delete {self.args.name}, which may cost money: delete it by hand")

    def running(self) -> str:
        """The command of lmjax that runs on the first host, or ""."""
        for _ in range(TRIES):
            asked = self.ssh(
                self.nodes[0], f"cd lmjax 2>/dev/null && {RUNS} && cat run.command; true",
                stdout=subprocess.PIPE, text=True)
            out = asked.communicate()[0].strip()
            if not asked.returncode:
                return out
            time.sleep(self.args.poll)
        raise Failed(f"could not reach {self.nodes[0]}")

    def install(self) -> None:
        """Copies the checkout, kills what is left of an earlier run, and makes the environment."""
        self.seen = 0
        self.everywhere("copy to", lambda node: self.gcloud(
            "tpu-vm", "scp", self.checkout, f"{node}:lmjax.tgz", "--worker=all", *self.args.ssh))
        kill = ('mkdir -p lmjax; cd lmjax; '
                'pkill -KILL -s "$(cat run.pid 2>/dev/null)" -f lmjax.cli 2>/dev/null || true')
        make = f"tar xzf ../lmjax.tgz; source launch/lib.sh; setup {shlex.quote(self.args.extras)}"
        steps = "; ".join(("set -e", kill, PYTHON, f"({self.args.setup})", make))
        self.everywhere("install on", lambda node: self.ssh(node, steps, "all"))

    def start(self) -> None:
        """Starts the run on all hosts, independent of this terminal. A run that is alive stays."""
        self.started = True
        env = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.env.items())
        run = (f"source launch/lib.sh; setup {shlex.quote(self.args.extras)}; "
               f'{env} "$python" -m lmjax.cli {self.command}; echo "{END}$?"')
        start = (f"cd lmjax && if ! {RUNS}; then "
                 f"printf %s {shlex.quote(self.command)} >run.command; "
                 f"setsid bash -c {shlex.quote(run)} >run.log 2>&1 </dev/null & "
                 "echo $! >run.pid; fi")
        self.everywhere("start on", lambda node: self.ssh(node, start, "all"))

    def follow(self) -> int | None:
        """Shows the output of the first host until the run ends.

        Returns its exit code, or None if the pod was taken away.
        """
        tries = TRIES
        while tries:
            tries -= 1
            follow = f"tail -n +{self.seen + 1} -s {LOOK_SECONDS} -f --pid=$(cat run.pid) run.log"
            stream = self.ssh(self.nodes[0], f"cd lmjax && {follow}", stdout=subprocess.PIPE)
            # Lines are counted as `tail` counts them. A line that breaks off comes again as a whole
            # with the next connection.
            for line in io.TextIOWrapper(stream.stdout, errors="replace", newline="\n"):
                if not line.endswith("\n"):
                    break
                self.seen, tries = self.seen + 1, TRIES
                text, end, code = line.rpartition(END)
                print(text if end else line, end="", flush=True)
                if end:
                    stream.wait()
                    time.sleep(self.args.poll)  # if a host was taken away, the state changes late
                    return int(code)
            stream.wait()
            if self.args.dry_run:
                return 0
            time.sleep(self.args.poll)
            if self.state() != "ACTIVE":
                return None
        raise Failed(f"lost the connection to {self.args.name}, where the run may continue")

    def stop(self) -> None:
        """Asks the run to save its step and end, and waits for that."""
        say("stopping the run, which saves its step")
        wait = f"timeout {SAVE_SECONDS} tail -s {LOOK_SECONDS} -f --pid=$(cat run.pid) /dev/null"
        self.ssh(self.nodes[0], f"cd lmjax && pkill -TERM -P $(cat run.pid); {wait}").wait()
