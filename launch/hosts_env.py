"""What a run on the hosts of a pod has in its environment, for launch/tpu_pod and launch/gke."""

import argparse
import re

from lmjax.runtime.chips import Topology

STOPPED = 75  # the exit code of a run that was stopped and has saved its step: there is more to do
JOIN_SECONDS = 1800  # for all hosts to come, some of which the cloud may have to find first


def add_env(parser: argparse.ArgumentParser) -> None:
    """--env, which may come several times."""
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the run, on all hosts")


def cloud_name(text: str) -> str:
    """A name that the cloud takes, also with a slice's number behind it."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"expected up to 40 small letters, digits and dashes, got {text!r}")
    return text


def count(text: str) -> int:
    """A number that may be 0."""
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def hosts_env(topology: Topology, given: list[str]) -> dict[str, str]:
    """The variables: what `given`, a list of NAME=VALUE, sets replaces ours.

    Raises:
      ValueError: one of them is not NAME=VALUE.
    """
    wrong = next((item for item in given if not re.match(r"[A-Za-z_]\w*=", item)), None)
    if wrong is not None:
        raise ValueError(f"--env: expected NAME=VALUE, got {wrong!r}; write --env LMJAX_JOIN_SECONDS=600")
    ours = {"LMJAX_JOIN_SECONDS": str(JOIN_SECONDS), "LMJAX_STOPPED_CODE": str(STOPPED)}
    if topology.flags:  # empty would replace what the hosts have
        ours["LIBTPU_INIT_ARGS"] = topology.flags
    return ours | dict(item.split("=", 1) for item in given)
