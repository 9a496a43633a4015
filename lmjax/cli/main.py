"""The `lmjax` command: one table of commands, and the exit code of the one that runs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lmjax.cli import inference, runs
from lmjax.cli.errors import explain, passing
from lmjax.errors import UserError


class Command(NamedTuple):
    """A row of the table.

    `lmjax --help` shows `help`. `run` takes the parsed arguments and the `--config.` overrides, and
    returns an exit code, or None for 0. `needs_jax` is False for a command that never imports JAX.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], int | None]
    needs_jax: bool = True


COMMANDS = {
    "train": Command("train the model of a config, or resume from its last checkpoint",
                     runs.add_train, runs.train),
    "plan": Command("say what a run needs on a TPU topology, by compiling its step without a TPU",
                    runs.add_plan, runs.plan),
    "prepare": Command("clean, tokenise and store a config's corpus without training on it",
                       runs.add_prepare, runs.prepare),
    "data": Command("show the rows that a step trained on, or list the rows of a run in order",
                    runs.add_data, runs.data),
    "trace": Command("say whether a prepared document was kept, or which rule removed it",
                     runs.add_trace, runs.trace, needs_jax=False),
    "generate": Command("continue prompts with a trained model",
                        inference.add_generate, inference.generate),
    "score": Command("bits per byte of text files under a trained model",
                     inference.add_score, inference.score),
    "eval": Command("evaluate a trained model on tasks of lm-eval",
                    inference.add_eval, inference.evaluate),
    "import-hf": Command("turn a Hugging Face directory into a checkpoint",
                         inference.add_import_hf, inference.import_hf),
    "export-hf": Command("turn a checkpoint into a Hugging Face directory",
                         inference.add_export_hf, inference.export_hf),
    "report": Command("write report.html from the records of a run, finished or not",
                      runs.add_report, runs.report, needs_jax=False),
    "bench": Command("measure training, generation or data preparation, beside other libraries",
                     runs.add_bench, runs.bench),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    | code | meaning |
    | --- | --- |
    | 0 | done |
    | 1 | failed; trying again may succeed |
    | 2 | cannot run as asked; trying again will not help |
    | 130 | interrupted (Ctrl-C) |
    | LMJAX_STOPPED_CODE, or 0 if unset | training was asked to stop, and has saved its step |
    """
    arguments, overrides = _parser().parse_known_args(argv)
    bad = [item for item in overrides if not item.startswith("--config.")]
    if bad or (overrides and not hasattr(arguments, "config")):
        return _refuse(str(UserError(f"an option of `lmjax {arguments.command}`", "an unknown one",
                                     f"see lmjax {arguments.command} --help",
                                     where=(bad or overrides)[0])))
    _set_environment()
    command = COMMANDS[arguments.command]
    try:
        if command.needs_jax:
            _start_jax()
        overrides = [item.removeprefix("--config.") for item in overrides]
        return command.run(arguments, overrides) or 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, line = explain(error)
        if (code == 1 and not passing(error)) or os.environ.get("LMJAX_TRACEBACK"):
            raise
        return _refuse(line, code)
    except KeyboardInterrupt:
        return 130


def _set_environment() -> None:
    """Sets the variables that TensorFlow and XLA read when they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # without TensorFlow's start-up messages
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # The size of XLA's thread pool. A collective holds one thread per device until all devices
        # have joined. With few threads, several collectives can wait for each other for ever.
        os.environ.setdefault("NPROC", "128")


def _start_jax() -> None:
    from lmjax.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    from lmjax.runtime.devices import use_compilation_cache  # imports JAX

    use_compilation_cache()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmjax", description="Pretrains language models in JAX.",
                                     allow_abbrev=False)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(parsers.add_parser(name, help=command.help, description=command.help,
                                                 allow_abbrev=False))
    return parser


def _refuse(message: str, code: int = 2) -> int:
    print(f"lmjax: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
