"""`lmjax replay`: repeats one step of a run, and says what happened in it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from lmjax.cli.arguments import LocalPath
from lmjax.cli.errors import explain
from lmjax.errors import UserError
from lmjax.monitoring.progress import to_stderr
from lmjax.runtime.files import check_writable


def add_replay(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax replay`."""
    parser.add_argument("--workdir", required=True, type=LocalPath, metavar="DIR",
                        help="the run's directory; nothing in it is changed")
    parser.add_argument("--step", required=True, type=int, metavar="N",
                        help="the step, from 1 as in metrics.jsonl")
    parser.add_argument("--rows", type=int, default=8, metavar="K",
                        help="compute the loss of every row, and for the K worst the norm of their "
                        "gradient and the step without them; 0: neither (default: 8)")
    parser.add_argument("--without", type=int, action="append", default=[], metavar="ROW",
                        help="also compute the step without this row, by its number in the run")
    parser.add_argument("--modules", action="store_true",
                        help="watch the output of every module and its gradient; a step that is "
                        "not finite is watched in any case")
    parser.add_argument("--before-rewind", action="store_true",
                        help="with the rows that the step had before the run went back and left "
                        "rows out")
    parser.add_argument("--out", default="", type=LocalPath, metavar="FILE",
                        help="the page to write (default: replay-N.html)")


def replay(arguments: Namespace, overrides: Sequence[str]) -> int:
    """Repeats a step; returns 1 if its figures are not those that were recorded."""
    out = arguments.out or f"replay-{arguments.step}.html"
    check_writable(out, "--out", file=True)
    if arguments.rows < 0:
        raise UserError("0 or more", arguments.rows, "correct it", where="--rows")
    from lmjax.runtime.distributed import together

    with together(explain):
        import jax

        from lmjax.reporting.replay_page import write_replay_page
        from lmjax.training.replay import repeat
        from lmjax.training.replay_report import look, row_line

        writes = jax.process_index() == 0
        log = to_stderr if writes else lambda line: None
        found = repeat(arguments.workdir, arguments.step, log,
                       before_rewind=arguments.before_rewind)
        page = look(found, arguments.rows, arguments.without, watch=arguments.modules)
        if writes:
            for line in page.story:
                print(line)
            for row in page.rows:
                print("  " + row_line(row))
            write_replay_page(out, page)
            print(f"page: {out}")
    return 1 if found.differences else 0
