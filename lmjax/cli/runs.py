"""The commands around a run: train, plan, prepare, data, trace, report, bench.

Each command has a function that adds its arguments and one that runs it. JAX and everything that
imports it are imported in the function that runs, so that `lmjax --help` answers at once.
"""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmjax.cli.arguments import AnyPath, LocalPath, read_text
from lmjax.cli.errors import explain
from lmjax.errors import UserError
from lmjax.runtime.files import check_writable

if TYPE_CHECKING:
    from lmjax.training.recipe import Recipe


def _add_config(parser: ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--config", required=required, default="", metavar="FILE[:VARIANT]",
                        type=LocalPath,
                        help="a Python file with get_config(); "
                        "--config.KEY.PATH=VALUE changes one of its values; a list is JSON, or one "
                        "string")


def _add_workdir(parser: ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=LocalPath, metavar="DIR",
                        help="the run's directory")


def _recipe(arguments: Namespace, overrides: Sequence[str]) -> "Recipe":
    from lmjax.cli.recipe import recipe_of

    return recipe_of(arguments.config, overrides, getattr(arguments, "workdir", None))


def add_train(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax train`."""
    _add_config(parser)
    _add_workdir(parser)
    parser.add_argument("--profile", default="", metavar="A:B",
                        help="trace the steps A to B into WORKDIR/profile")
    parser.add_argument("--hlo", default="", type=LocalPath, metavar="DIR",
                        help="write the step's HLO into DIR")


def train(arguments: Namespace, overrides: Sequence[str]) -> int:
    """Trains, together with the other processes that the environment names."""
    from lmjax.runtime.distributed import together

    with together(explain):
        from lmjax.training.loop import train

        stopped = _stopped_code()
        watch = [f"watch.{name}={getattr(arguments, name)}" for name in ("profile", "hlo")
                 if getattr(arguments, name)]
        outcome = train(_recipe(arguments, [*overrides, *watch]), arguments.workdir)
    return stopped if outcome == "stopped" else 0


def _stopped_code() -> int:
    """The exit code of a run that was stopped and saved.

    A launcher that starts such a run again sets it to a code other than 0.
    """
    code = os.environ.get("LMJAX_STOPPED_CODE") or "0"
    if not (code.isdecimal() and int(code) < 256):
        raise UserError("an exit code from 0 to 255", repr(code), "set 75, for example",
                        where="LMJAX_STOPPED_CODE")
    return int(code)


def add_plan(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax plan`."""
    _add_config(parser)
    parser.add_argument("--topology", required=True, metavar="NAME",
                        help="v5e:16x16, v5p-128, 2xv6e:16x16 (two slices) and so on, "
                        "or cpu or gpu for the devices of this machine")
    parser.add_argument("--search", action="store_true",
                        help="first find the fastest mesh, remat policy and batch size")
    parser.add_argument("--tokens", type=float, default=0.0,
                        help="also estimate days and chip-hours for this number of tokens")
    parser.add_argument("--out", default="", type=LocalPath, metavar="DIR",
                        help="write plan.json, plan.svg and the HLO into DIR")


def plan(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Plans a run."""
    from lmjax.planning.plan import plan

    plan(_recipe(arguments, overrides), arguments.topology, out=arguments.out,
         tokens=arguments.tokens, find=arguments.search)


def add_prepare(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax prepare`."""
    _add_config(parser)
    parser.add_argument("--out", required=True, type=AnyPath, metavar="DIR",
                        help="where the prepared data goes")


def prepare(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prepares a corpus."""
    from lmjax.data.preparation.prepare import prepare
    from lmjax.training.pretrained import make_tokenizer

    prepare(_recipe(arguments, overrides).data, arguments.out, make_tokenizer=make_tokenizer)


def add_data(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax data`."""
    _add_workdir(parser)
    parser.add_argument("action", choices=("show", "order"),
                        help="show: the rows of one step with their text; "
                        "order: one line per row of the run")
    parser.add_argument("--step", type=int, default=1,
                        help="for show: the step, from 1 as in metrics.jsonl (default: 1)")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="ROW",
                        help="for order: the first row (default: 0)")
    parser.add_argument("--to", type=int, default=31, dest="last", metavar="ROW",
                        help="for order: the last row (default: 31)")


def data(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Shows the rows of a run."""
    from lmjax.cli.data import order, show

    if arguments.action == "show":
        show(arguments.workdir, arguments.step)
    else:
        order(arguments.workdir, arguments.first, arguments.last)


def add_trace(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax trace`."""
    parser.add_argument("--data", required=True, type=AnyPath, metavar="DIR",
                        help="a prepared directory")
    parser.add_argument("--id", required=True,
                        help="the document's id, as in ids.txt and ledger.parquet")


def trace(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prints what preparation did with a document."""
    from lmjax.data.preparation.ledger import trace

    print("\n".join(trace(arguments.data, arguments.id)))


def add_report(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax report`."""
    _add_workdir(parser)


def report(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes report.html and prints its path."""
    from lmjax.reporting.report import write_report

    print(write_report(arguments.workdir))


def add_bench(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax bench`."""
    _add_config(parser, required=False)
    parser.add_argument("what", nargs="?", default="train",
                        choices=("train", "generate", "score", "serve", "data", "tasks",
                                 "learning", "pruning"),
                        help="serve: many clients at once beside one and beside offline batches; "
                        "score: likelihoods of texts beside their logits; "
                        "data: the stages of `lmjax prepare` and the rows of training; "
                        "tasks: what pretraining is worth for the recipes of configs/tasks; "
                        "pruning: pruned models, trained on, beside small ones alone; "
                        "learning: steps that optimizers need to the loss of AdamW; "
                        "data, tasks and learning need no --config (default: train)")
    parser.add_argument("--seconds", type=float, default=60.0,
                        help="seconds to measure for, per comparison (default: 60)")
    parser.add_argument("--out", default="", type=LocalPath, metavar="FILE",
                        help="write the results as JSON, too")
    parser.add_argument("--url", default="",
                        help="for serve: ask the server of the OpenAI API at this address, such as "
                        "http://127.0.0.1:8000/v1/completions, with 64 clients; no --config")
    parser.add_argument("--model", default="", metavar="NAME",
                        help="for serve --url: as the server calls it (default: its first)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME",
                        help="for tasks: which recipes of configs/tasks (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME.KEY=VALUE",
                        help="for tasks: overrides of the recipe NAME, or of that of the model it "
                        "starts from, such as tagging.train.steps=100 bert.train.steps=500")
    parser.add_argument("--seeds", type=int, default=3, metavar="N",
                        help="for tasks: runs per start; for learning: runs per optimizer "
                        "(default: 3)")
    parser.add_argument("--optimizers", nargs="+", default=[], metavar="NAME",
                        help="for learning: which rows of its table (default: all)")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="SIZE",
                        help="for learning: 0.7M, 1.5M, 3.2M (default: all three)")
    parser.add_argument("--steps", type=int, default=600, metavar="N",
                        help="for learning: steps of a run; for pruning: of training after it "
                        "(default: 600)")
    parser.add_argument("--run", default="", type=LocalPath, metavar="DIR",
                        help="for pruning: the dense run, trained by --config")
    parser.add_argument("--work", default="runs/pruning", type=LocalPath, metavar="DIR",
                        help="for pruning: where its runs go (default: runs/pruning)")
    parser.add_argument("--ways", nargs="+", default=[], metavar="PARTS",
                        help="for pruning: what `lmjax compress --prune` takes, such as layers=1")
    parser.add_argument("--texts", nargs="+", default=[], type=LocalPath, metavar="FILE",
                        help="for pruning: texts by which what matters least is found")


def bench(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Measures training, inference, serving, data preparation, fine-tuning or optimizers."""
    options = {"seconds": arguments.seconds, "out": arguments.out}
    if not arguments.seconds > 0:
        raise UserError("more than 0", arguments.seconds, "leave it out for 60", where="--seconds")
    if arguments.out:
        check_writable(arguments.out, "--out", file=True)
    if arguments.what == "generate":
        from lmjax.benchmarks.generate import bench_generate

        bench_generate(_recipe(arguments, overrides), **options)
    elif arguments.what == "score":
        from lmjax.benchmarks.score import bench_score

        bench_score(_recipe(arguments, overrides), **options)
    elif arguments.what == "serve" and arguments.url:
        from lmjax.benchmarks.clients import bench_clients

        bench_clients(arguments.url, arguments.model, **options)
    elif arguments.what == "serve":
        from lmjax.benchmarks.serve import bench_serve

        bench_serve(_recipe(arguments, overrides), **options)
    elif arguments.what == "data":
        from lmjax.benchmarks.data import bench_data

        bench_data(**options)
    elif arguments.what == "tasks":
        from lmjax.benchmarks.finetuning import bench_tasks

        if overrides or arguments.config:
            raise UserError("no --config, since the recipes are those of configs/tasks", "one",
                            "write --set NAME.KEY=VALUE", where="--config")
        bench_tasks(arguments.tasks, arguments.set, seeds=arguments.seeds, out=arguments.out)
    elif arguments.what == "learning":
        from lmjax.benchmarks.learning import bench_learning

        if overrides or arguments.config:
            raise UserError("no --config, since the recipe is configs/quickstart.py", "one",
                            "leave it out", where="--config")
        bench_learning(arguments.optimizers, arguments.sizes, seeds=arguments.seeds,
                       steps=arguments.steps, out=arguments.out)
    elif arguments.what == "pruning":
        from lmjax.benchmarks.pruning import bench_pruning

        texts = [read_text(path) for path in arguments.texts]
        bench_pruning(_recipe(arguments, overrides), run=arguments.run, work=arguments.work,
                      ways=arguments.ways, steps=arguments.steps, texts=texts, out=arguments.out)
    else:
        from lmjax.benchmarks.train import bench

        argv = [arguments.config, *(f"--config.{item}" for item in overrides)]
        bench(_recipe(arguments, overrides), argv, **options)
