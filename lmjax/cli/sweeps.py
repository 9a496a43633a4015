"""`lmjax sweep` and `lmjax compare`: many runs of one recipe, and runs beside one another."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from lmjax.cli.arguments import LocalPath
from lmjax.runtime.files import check_writable


def add_sweep(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax sweep`."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", type=LocalPath,
        help="a Python file with get_config(); --config.KEY.PATH=VALUE changes a value of all runs")
    add("--workdir", required=True, type=LocalPath, metavar="DIR",
        help="where the runs go; the same command goes on with those that are not finished")
    add("--grid", nargs="+", default=[], metavar="KEY=VALUE,VALUE",
        help="values of a key, such as optimizer.peak_lr=1e-3,2e-3: a run for each, and for each "
        "combination with other keys")
    add("--range", nargs="+", default=[], metavar="KEY=LOW:HIGH", dest="ranges",
        help="limits of a key, from which --draws draws evenly in the logarithm")
    add("--draws", type=int, default=0, metavar="N",
        help="points drawn at random from --grid and --range, instead of all combinations")
    add("--seeds", type=int, default=1, metavar="N",
        help="runs per point, which differ in weights and in the order of data (default: 1)")
    add("--at-once", type=int, default=1, metavar="N",
        help="runs at the same time; each gets its share of the GPUs (default: 1)")


def sweep(arguments: Namespace, overrides: Sequence[str]) -> int:
    """Trains the runs of a sweep; 1 if one of them failed."""
    from lmjax.scaling.sweep import parse_space, sweep

    space = parse_space(arguments.grid, arguments.ranges, arguments.draws, arguments.seeds)
    return int(bool(sweep(arguments.config, overrides, arguments.workdir, space.runs(),
                          at_once=arguments.at_once)))


def add_compare(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax compare`."""
    add = parser.add_argument
    add("runs", nargs="+", type=LocalPath, metavar="RUN",
        help="the directory of a run, or one that holds such directories")
    add("--metric", default="",
        help="of held-out examples, by which the runs are ordered (default: what they keep their "
        "best step by, or else bits per byte)")
    add("--out", default="compare.html", type=LocalPath, metavar="FILE",
        help="where the page goes (default: compare.html)")


def compare(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes a page that compares runs; prints its table and its path."""
    from lmjax.scaling.compare import write_comparison

    check_writable(arguments.out, "--out", file=True)
    print("\n".join(write_comparison(arguments.runs, arguments.out, arguments.metric)))
    print(arguments.out)
