"""The `lmjax` command: the table of its subcommands, and `main`, which runs one of them."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO, cast

from lmjax.cli import inference, runs
from lmjax.cli.arguments import parse
from lmjax.cli.chat import add_chat, chat
from lmjax.cli.compress import add_compress, compress
from lmjax.cli.doctor import add_doctor, doctor
from lmjax.cli.errors import explain, is_transient
from lmjax.cli.gguf import add_export_gguf, add_import_gguf, export_gguf, import_gguf
from lmjax.cli.predict import add_predict, predict
from lmjax.cli.replay import add_replay, replay
from lmjax.cli.scale import add_scale, scale
from lmjax.cli.serve import add_serve, serve
from lmjax.cli.sweeps import add_compare, add_sweep, compare, sweep
from lmjax.errors import masked


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
    "plan": Command("estimate the memory and time of a run on a TPU topology, without a TPU",
                    runs.add_plan, runs.plan),
    "prepare": Command("clean, tokenise and store a config's corpus without training on it",
                       runs.add_prepare, runs.prepare),
    "data": Command("show the rows that a step trained on, or list the rows of a run in order",
                    runs.add_data, runs.data),
    "replay": Command("repeat one step of a run to the bit, and say what happened in it",
                      add_replay, replay),
    "trace": Command("say whether a prepared document was kept, or which rule removed it",
                     runs.add_trace, runs.trace, needs_jax=False),
    "generate": Command("continue prompts with a trained model",
                        inference.add_generate, inference.generate),
    "chat": Command("talk with a model that was fine-tuned on conversations",
                    add_chat, chat),
    "serve": Command("serve models to clients of the OpenAI API, with a page for the browser",
                     add_serve, serve),
    "score": Command("compute the bits per byte of text files under a trained model",
                     inference.add_score, inference.score),
    "explain": Command("say how much each token of a text adds to a likelihood, with a picture",
                       inference.add_explain, inference.explain),
    "eval": Command("evaluate a trained model on tasks of lm-eval",
                    inference.add_eval, inference.evaluate),
    "predict": Command("answer the examples in a file with a model that was trained for a task",
                       add_predict, predict),
    "compress": Command("pack a model's weights as int8 or int4, or picture what that costs",
                        add_compress, compress),
    "import-hf": Command("turn a Hugging Face directory into a checkpoint",
                         inference.add_import_hf, inference.import_hf),
    "export-hf": Command("turn a checkpoint into a Hugging Face directory",
                         inference.add_export_hf, inference.export_hf),
    "import-gguf": Command("turn a GGUF file into a checkpoint", add_import_gguf, import_gguf),
    "export-gguf": Command("turn a checkpoint into a GGUF file, for llama.cpp",
                           add_export_gguf, export_gguf),
    "doctor": Command("say what a path is, whether it is whole, and what can be done with it",
                      add_doctor, doctor),
    "report": Command("write report.html from the records of a run, finished or not",
                      runs.add_report, runs.report, needs_jax=False),
    "compare": Command("write a page that compares runs: figures, curves, settings that differ",
                       add_compare, compare, needs_jax=False),
    "sweep": Command("train one recipe with many settings and seeds, and compare the runs",
                     add_sweep, sweep),
    "scale": Command("tune a small model for a large one, and say what a large run will reach",
                     add_scale, scale),
    "bench": Command("measure training, generation, scoring, serving, data preparation or "
                     "fine-tuning, and compare with other libraries",
                     runs.add_bench, runs.bench),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    | code | meaning |
    | --- | --- |
    | 0 | done |
    | 1 | failed: a fault (with its traceback), or an error that a retry may cure |
    | 2 | cannot run as asked; trying again will not help |
    | 130 | interrupted (Ctrl-C) |
    | value of LMJAX_STOPPED_CODE | training was asked to stop, and has saved a checkpoint |

    LMJAX_STOPPED_CODE is an environment variable; the code is 0 if it is not set.

    Args:
      argv: the arguments. By default those of this process, which then ends at once if the code is
        not 0.
    """
    if argv is not None:
        return _run(argv)
    # Standard output is what was asked for: a model may write code with a `token=`.
    sys.stderr = cast(TextIO, Masked(sys.stderr))
    try:
        code = _run(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        _end_process(code)
    return code


class Masked:
    """A stream of text that writes *** in the place of credentials, in tracebacks, too."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text; returns how many letters it had."""
        self._stream.write(masked(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _end_process(code: int) -> NoReturn:
    """Ends the process without waiting for its other threads, which may be stuck after a failure.

    Orbax, for example, leaves threads that wait minutes for a directory that could not be made.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, a closed file
            stream.flush()
    os._exit(code)


def _run(argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code; a fault is raised."""
    try:
        arguments, overrides = parse(_parser(), argv)
        _set_environment()
        command = COMMANDS[arguments.command]
        if command.needs_jax:
            _start_jax()
        return command.run(arguments, overrides) or 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        # Python flushes stdout at exit. Into the closed pipe, that would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, line = explain(error)
        if (code == 1 and not is_transient(error)) or os.environ.get("LMJAX_TRACEBACK"):
            raise
        return _print_error(line, code)
    except KeyboardInterrupt:
        return 130


def _set_environment() -> None:
    """Sets the variables that TensorFlow and XLA read when they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # without TensorFlow's start-up messages
    # Turns TensorFlow's oneDNN kernels off, which may round differently. lmjax computes with JAX:
    # TensorFlow only reads and batches data.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # The size of XLA's thread pool. A collective holds one thread per device until all devices
        # have joined. With few threads, several collectives can wait for each other forever.
        os.environ.setdefault("NPROC", "128")


def _start_jax() -> None:
    from lmjax.runtime.allocator import keep_freed_memory

    # On a CPU, the next step reuses the memory of the last one: mapping it again would take time.
    # JAX starts threads when it is imported, and the setting has to come before them.
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


def _print_error(message: str, code: int = 2) -> int:
    """Prints the line of an error and returns its exit code."""
    sys.stderr.write(f"lmjax: error: {message}\n")  # whole, as other processes may write too
    return code


if __name__ == "__main__":
    sys.exit(main())
