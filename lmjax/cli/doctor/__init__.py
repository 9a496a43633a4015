"""`lmjax doctor PATH`: what a path is, whether it is whole, and what lmjax can do with it.

Nothing is changed, no code of the path is run, and no pickle is opened.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence


def add_doctor(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax doctor`."""
    parser.add_argument("path", nargs="+", metavar="PATH",
                        help="a file, a directory, a bucket, a model's name on the hub, or a "
                        "source such as 'jsonl:books/*.jsonl'")
    parser.add_argument("--quick", action="store_true",
                        help="look at headers and sizes only: do not read weights and tokens")


def doctor(arguments: Namespace, overrides: Sequence[str]) -> int:
    """Prints a diagnosis per path. Returns 2 if one of them has a fault, otherwise 0."""
    from lmjax.cli.doctor.kinds import diagnose  # imports JAX

    bad = False
    for i, path in enumerate(arguments.path):
        if i:
            print()
        found = diagnose(path, whole=not arguments.quick)
        print(found, flush=True)
        bad |= found.is_bad
    return 2 if bad else 0
