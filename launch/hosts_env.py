"""The environment of a run on the hosts of a pod, for launch/tpu_pod and launch/gke."""

import argparse
import re

from lmjax.errors import UserError
from lmjax.runtime.chips import Topology

STOPPED = 75  # exit code of a run that was stopped after it had saved: it can be continued
JOIN_SECONDS = 1800  # until all hosts have joined; the cloud may first have to find some of them


def add_env(parser: argparse.ArgumentParser) -> None:
    """Adds the option --env, which may be given several times."""
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                        help="a variable of the run's environment, on all hosts; may be repeated")


def cloud_name(text: str) -> str:
    """Checks a name for the cloud; it leaves room for the number of a slice."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"expected up to 40 lower-case letters, digits and dashes, got {text!r}")
    return text


def count(text: str) -> int:
    """Reads a whole number of 0 or more."""
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def hosts_env(topology: Topology, given: list[str]) -> dict[str, str]:
    """The variables of the run's environment.

    Args:
      topology: where the run is; its TPU flags are among the variables.
      given: NAME=VALUE items of the user, which replace ours.

    Raises:
      UserError: an item is not NAME=VALUE.
    """
    wrong = next((item for item in given if not re.match(r"[A-Za-z_]\w*=", item)), None)
    if wrong is not None:
        raise UserError("NAME=VALUE", repr(wrong), "write --env LMJAX_JOIN_SECONDS=600", "--env")
    ours = {"LMJAX_JOIN_SECONDS": str(JOIN_SECONDS), "LMJAX_STOPPED_CODE": str(STOPPED)}
    if topology.flags:  # an empty value would replace the flags that the hosts have
        ours["LIBTPU_INIT_ARGS"] = topology.flags
    return ours | dict(item.split("=", 1) for item in given)
