"""Stand-ins for gcloud, kubectl, sbatch, srun and scontrol, and for the hosts that they reach."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds that a stand-in may take on a busy machine


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Cloud:
    """A folder with stand-ins, which are first on the PATH.

    `answers` says what they answer: a part of a call -> a list with [output, exit code] of the
    first such call, the second, and so on; the last answer repeats. A call whose answer is None or
    missing succeeds, and ssh and scp are then really done, in a folder with the node's name.
    Between a successful delete and the next create there is no pod to describe. An output that ends
    in ~ breaks off there. A third item is the time in seconds until the call counts as made.
    """

    FLAGS = {  # verb -> its flags in gcloud's reference
        "create": "node-id node-prefix node-count accelerator-type runtime-version spot reserved "
                  "network internal-ips",
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
now = answer(" create ", 1) if " create " in words and " create " in answers else None
if now and len(now) > 2:
    time.sleep(now[2])
if "gcloud" in sys.argv[0]:
    verb, flags = sys.argv[4], sys.argv[5:]
    if "--command" in flags:
        del flags[flags.index("--command") + 1]
    known = {flags!r}[verb].split() + ["project", "zone"]
    unknown = [f for f in flags if f.startswith("-") and f[2:].partition("=")[0] not in known]
    if unknown or sys.argv[1:3] != ["compute", "tpus"] or sys.argv[3] != (
            "tpu-vm" if verb in ("ssh", "scp") else "queued-resources"):
        sys.exit(f"ERROR: (gcloud) unrecognized arguments: {{unknown or sys.argv}}")
with open(home / "calls", "a") as file:
    file.write(json.dumps({{"words": words, "stdin": stdin}}) + "\\n")
made = [json.loads(line)["words"] for line in (home / "calls").read_text().splitlines()]
there, deletes, looks = True, 0, 0
for call in made:
    if " delete " in call:
        deletes += 1
        now = answer(" delete ", deletes) if " delete " in answers else None
        there = there and bool(now and now[1])
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
    command = sys.argv[sys.argv.index("--command") + 1]
    sys.exit(subprocess.run(["bash", "-c", command], cwd=node).returncode)
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
            executable(home / "bin" / name, self.STAND_IN.format(
                python=sys.executable, home=str(home), flags=self.FLAGS))
        # The Python of the hosts: its environments are copies of itself, and it "trains" by $RUN.
        host = executable(home / "host" / "python3", """#!/bin/sh
case "$*" in
  *"sys.version_info <"*) exit 0 ;;
  *"%d.%d"*) echo 3.12 ;;
  *"-m venv"*)
    for last; do :; done
    mkdir -p "$last/bin"; cd "$last/bin"; cp "$0" python; touch pip ;;
  *lmjax.cli*)
    env | grep -e ^LIBTPU -e ^LMJAX_ -e ^MINE
    for word; do echo "word $word"; done
    eval "$RUN" ;;
esac
""")
        # Without the settings of ./launch/test: a host must not install into its environment.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LMJAX_")}
        self.env = {**kept, "PATH": f"{home}/bin:{os.environ['PATH']}",
                    "LMJAX_PYTHON": str(host), "RUN": "true"}
        self.answer({})

    def answer(self, answers: dict[str, list[list | None]]) -> None:
        (self.home / "answers").write_text(json.dumps(answers))

    def calls(self) -> list[dict]:
        path = self.home / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The calls in their order: create, describe, scp, ...; a call of ssh by its purpose."""
        kinds = {"tar xzf": "install", "setsid": "start", "tail -n": "follow", "pkill": "stop",
                 "&& cat run.command": "running"}
        words = [call["words"] for call in self.calls()]
        return [next((kind for part, kind in kinds.items() if part in w), None)
                if " ssh " in w else w.split()[4] for w in words]

    def start(self, name: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen([ROOT / "launch" / name, *arguments], env=self.env, text=True,
                                cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, name: str, *arguments: str, expect: int = 0) -> str:
        process = self.start(name, *arguments)
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == expect, out + err
        self.said = err
        return out + (err if expect else "")
