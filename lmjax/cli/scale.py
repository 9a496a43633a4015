"""`lmjax scale`: settings that hold for all sizes, and what a large run will reach."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from lmjax.cli.arguments import LocalPath
from lmjax.errors import UserError

WHAT = {
    "coord-check": "whether activations keep their size in wider and deeper models",
    "transfer": "whether the best learning rate does",
    "ladder": "trains small models and fits a law to their losses",
    "forecast": "writes down what a run will reach, before it begins",
}


def add_scale(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax scale`."""
    add = parser.add_argument
    add("what", choices=WHAT, help="; ".join(f"{name}: {text}" for name, text in WHAT.items()))
    add("--config", required=True, metavar="FILE[:VARIANT]", type=LocalPath,
        help="a Python file with get_config(); --config.KEY.PATH=VALUE changes a value of all runs")
    add("--workdir", required=True, type=LocalPath, metavar="DIR",
        help="where runs, tables and pictures go; the same command goes on with what is unfinished")
    add("--parametrizations", nargs="+", default=[], metavar="NAME",
        help="which are compared: standard, mup, completep (default: the config's)")
    add("--widths", nargs="+", type=int, default=[], metavar="N",
        help="embed_dim of the models; heads and MLP grow with it; for coord-check, the sizes span "
        "at least a factor of 4")
    add("--depths", nargs="+", type=int, default=[], metavar="N", help="num_layers of the models")
    add("--steps", type=int, default=5, metavar="N",
        help="of coord-check: steps that each model takes (default: 5)")
    add("--seeds", type=int, default=1, metavar="N",
        help="models per size, or runs per rate, over which results are averaged (default: 1)")
    add("--rates", default="", metavar="LOW:HIGH",
        help="of transfer: a grid of learning rates, a factor of sqrt(2) apart, or RATE,RATE,...; "
        "of each size only those around the best are trained")
    add("--sizes", nargs="+", default=[], metavar="WIDTHxDEPTH", help="of ladder: the models")
    add("--ratios", nargs="+", type=float, default=[], metavar="X",
        help="of ladder: tokens per parameter that each model is trained on")
    add("--budgets", nargs="+", type=float, default=[], metavar="FLOPS",
        help="of ladder: budgets for which the best size is told")
    add("--run", default="", type=LocalPath, metavar="DIR",
        help="of forecast: the --workdir that the run of --config will have")
    add("--at-once", type=int, default=1, metavar="N",
        help="of transfer and ladder: runs at the same time; each gets its share of the GPUs "
        "(default: 1)")


def scale(arguments: Namespace, overrides: Sequence[str]) -> int:
    """Runs one of `WHAT`; 1 if a run failed or a check did not hold."""
    return int(ACTIONS[arguments.what](arguments, overrides, Path(arguments.workdir)))


def _coord_check(arguments: Namespace, overrides: Sequence[str], workdir: Path) -> bool:
    from lmjax.runtime.files import write_whole
    from lmjax.scaling.coordinates import coordinate_check, table, write_json
    from lmjax.scaling.pictures import draw_coordinates

    lines = coordinate_check(
        arguments.config, overrides, workdir, steps=arguments.steps, seeds=arguments.seeds,
        parametrizations=_parametrizations(arguments, overrides), widths=arguments.widths,
        depths=arguments.depths)
    write_json(lines, workdir / "coord_check.json")
    write_whole(workdir / "coord_check.md", "\n".join(table(lines)) + "\n")
    draw_coordinates(lines, workdir / "coord_check.png")
    print("\n".join([*table(lines), str(workdir / "coord_check.png")]))
    return not all(line.is_flat for line in lines)


def _transfer(arguments: Namespace, overrides: Sequence[str], workdir: Path) -> bool:
    from lmjax.runtime.files import write_whole
    from lmjax.scaling.pictures import draw_transfers
    from lmjax.scaling.transfer import parse_rates, points_of, read_transfers, search, table

    points = points_of(
        arguments.config, overrides, rates=parse_rates(arguments.rates), seeds=arguments.seeds,
        parametrizations=_parametrizations(arguments, overrides), widths=arguments.widths,
        depths=arguments.depths)
    failed = search(arguments.config, overrides, workdir, points, at_once=arguments.at_once)
    transfers = read_transfers(points, workdir)
    write_whole(workdir / "transfer.md", "\n".join(table(transfers)) + "\n")
    draw_transfers(transfers, workdir / "transfer.png")
    print("\n".join([*table(transfers), str(workdir / "transfer.png")]))
    return bool(failed)


def _parametrizations(arguments: Namespace, overrides: Sequence[str]) -> list[str]:
    from lmjax.cli.recipe import recipe_of

    own = recipe_of(arguments.config, overrides).model.parametrization
    return list(dict.fromkeys(arguments.parametrizations)) or [own]


def _ladder(arguments: Namespace, overrides: Sequence[str], workdir: Path) -> bool:
    from lmjax.scaling.ladder import fit_ladder, parse_sizes, rungs
    from lmjax.scaling.pictures import draw_law
    from lmjax.scaling.sweep import sweep

    sizes = parse_sizes(arguments.sizes)
    if not sizes or not arguments.ratios:
        raise UserError("--sizes and --ratios", "none", "say which models to train, and for how "
                        "long", where="lmjax scale ladder")
    failed = sweep(arguments.config, overrides, workdir,
                   rungs(arguments.config, overrides, sizes, arguments.ratios),
                   at_once=arguments.at_once)
    runs, found, lines = fit_ladder(workdir, arguments.budgets)
    draw_law(list(runs.values()), found, workdir / "law.png")
    print("\n".join([*lines, str(workdir / "law.png")]))
    return bool(failed)


def _forecast(arguments: Namespace, overrides: Sequence[str], workdir: Path) -> bool:
    from lmjax.reporting.forecast import FILE
    from lmjax.scaling.ladder import forecast

    if not arguments.run:
        raise UserError("--run DIR, the --workdir of the run", "none", "add it", where="--run")
    run = Path(arguments.run)
    made = forecast(arguments.config, overrides, workdir, run)
    print(f"loss {made['loss']:.4f} ({made['confidence']:.0%}: {made['low']:.4f} to "
          f"{made['high']:.4f}) with {made['flops']:.3g} FLOPs, {made['times_the_largest']:.1f} "
          f"times those of the largest run of {len(made['runs'])}: {run / FILE}")
    return False


ACTIONS = {"coord-check": _coord_check, "transfer": _transfer, "ladder": _ladder,
           "forecast": _forecast}
