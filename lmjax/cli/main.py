"""The `lmjax` command."""

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmjax.cli.errors import explain, passing

if TYPE_CHECKING:
    from lmjax.lm import LM

COMMANDS = {
    "train": "train the model of a config, or go on from its last checkpoint",
    "plan": "say what a run would need and take on a TPU topology, by compiling its step without one",
    "prepare": "clean, tokenise and store a config's corpus without training on it",
    "data": "show the rows that a step trained on, or list the order of a run's rows",
    "trace": "say what became of a document that was prepared: kept, or removed by which rule and for which other",
    "generate": "continue prompts with a trained model",
    "score": "bits per byte of text files under a trained model",
    "eval": "lm-eval's tasks on a trained model",
    "import-hf": "turn a Hugging Face directory into a checkpoint",
    "export-hf": "turn a checkpoint into a Hugging Face directory",
    "report": "write report.html from what a run has recorded so far",
    "bench": "measure the train loop, generation or the stages of data, beside others that do the same",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code 0: done, 2: it cannot be run as asked, 1: it failed, and may not the next time.

    A run that was asked to stop, and has saved its step, ends with LMJAX_STOPPED_CODE, or 0 where that is not set.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    bad = [item for item in overrides if not item.startswith("--config.")]
    if bad or (overrides and not hasattr(arguments, "config")):
        return _refuse(f"{(bad or overrides)[0]}: expected an option of `lmjax {arguments.command}`, got an unknown "
                       f"one; see lmjax {arguments.command} --help")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow feeds data only: keep its greetings out
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Each collective holds a thread until all devices have joined it: with few cores' worth of them, several
        # collectives at once can wait for each other for ever.
        os.environ.setdefault("NPROC", "128")
    try:
        return _run(arguments, [item.removeprefix("--config.") for item in overrides])
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, line = explain(error)
        if (code == 1 and not passing(error)) or os.environ.get("LMJAX_TRACEBACK"):
            raise
        return _refuse(line, code)
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    command = arguments.command
    if command == "trace":
        from lmjax.data.preparation.prepare import trace

        print("\n".join(trace(arguments.data, arguments.id)))
        return 0
    if command == "report":
        from lmjax.reporting.report import write_report

        print(write_report(arguments.workdir))
        return 0
    _keep_freed_memory()
    from lmjax.config import load
    from lmjax.runtime.devices import use_compilation_cache  # JAX is imported from here on
    from lmjax.runtime.distributed import together
    from lmjax.training.recipe import build_recipe

    use_compilation_cache()
    if command == "train":
        with together(explain):
            from lmjax.training.loop import train

            stopped = _stopped_code()
            watch = [f"watch.{name}={value}" for name in ("profile", "hlo") if (value := getattr(arguments, name))]
            outcome = train(build_recipe(load(arguments.config, [*overrides, *watch])), arguments.workdir)
        return stopped if outcome == "stopped" else 0
    elif command == "plan":
        from lmjax.planning.plan import plan

        plan(build_recipe(load(arguments.config, overrides)), arguments.topology, out=arguments.out,
             tokens=arguments.tokens, find=arguments.search)
    elif command == "prepare":
        from lmjax.data.preparation.prepare import prepare
        from lmjax.training.pretrained import make_tokenizer

        prepare(build_recipe(load(arguments.config, overrides)).data, arguments.out, make_tokenizer=make_tokenizer)
    elif command == "data":
        from lmjax.cli.data import order, show

        act, needs = {"show": (show, ("step",)), "order": (order, ("first", "last"))}[arguments.action]
        act(arguments.workdir, *(getattr(arguments, name) for name in needs))
    elif command == "bench" and not arguments.seconds > 0:
        raise ValueError(f"--seconds: expected more than 0, got {arguments.seconds}; leave it out for 60")
    elif command == "bench" and arguments.what == "generate":
        from lmjax.benchmarks.generate import bench_generate

        bench_generate(build_recipe(load(arguments.config, overrides)), seconds=arguments.seconds, out=arguments.out)
    elif command == "bench" and arguments.what == "data":
        from lmjax.benchmarks.data import bench_data

        bench_data(seconds=arguments.seconds, out=arguments.out)
    elif command == "bench":
        from lmjax.benchmarks.train import bench

        argv = [arguments.config, *(f"--config.{item}" for item in overrides)]
        bench(build_recipe(load(arguments.config, overrides)), argv, seconds=arguments.seconds, out=arguments.out)
    else:
        _use(arguments)
    return 0


def _stopped_code() -> int:
    """The exit code of a run that was stopped and saved: launchers, which start it again, have it differ from 0."""
    code = os.environ.get("LMJAX_STOPPED_CODE") or "0"
    if not (code.isdecimal() and int(code) < 256):
        raise ValueError(f"LMJAX_STOPPED_CODE: expected an exit code from 0 to 255, got {code!r}; set 75, say")
    return int(code)


def _keep_freed_memory() -> None:
    """On a machine without accelerators, lets the C library keep what XLA frees after a step for the next one.

    XLA allocates a step's temporaries anew each time; given back to the system, each of their pages is
    faulted in and zeroed again, a tenth of a step's time and more. It must come before any thread has made an
    arena of its own, so before JAX is imported. A no-op where there is no glibc.
    """
    accelerators = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(map(os.path.exists, accelerators)):
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1  # of <malloc.h>
        never = -1  # a number is not enough: any that an int can hold is reached with two steps in flight
        for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, never)):
            libc.mallopt(option, value)


def _use(arguments: argparse.Namespace) -> None:
    from lmjax.lm import load

    lm = load(arguments.checkpoint)
    if arguments.command == "import-hf":
        lm.save(arguments.out)
        return
    if arguments.command == "export-hf":
        lm.export(arguments.out, model_type=arguments.model_type, dtype=arguments.dtype,
                  max_shard_bytes=int(arguments.max_shard_gb * 1e9))
        return
    if arguments.command == "eval":
        from lmjax.lm_eval import evaluate_tasks

        found = json.dumps(evaluate_tasks(lm, arguments.tasks.split(","), task_dir=arguments.task_dir,
                                          num_fewshot=arguments.num_fewshot, limit=arguments.limit), indent=2)
        print(found)
        if arguments.out:
            with open(arguments.out, "w", encoding="utf-8") as file:
                file.write(found + "\n")
        return
    if arguments.command == "generate":
        _generate(lm, arguments)
        return
    for file in arguments.file:
        try:
            with open(file, encoding="utf-8") as opened:
                text = opened.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected UTF-8 text, got {error}; convert it, `iconv -t UTF-8` say") from None
        score = lm.score([text])[0]
        print(f"{file}: {score.bits_per_byte:.4f} bits/byte, perplexity {score.perplexity:.2f}, {score.tokens} tokens")


def _generate(lm: "LM", arguments: argparse.Namespace) -> None:
    from lmjax.lm import load

    options = {name: getattr(arguments, name) for name in (
        "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "num_beams",
        "length_penalty")}
    if arguments.draft:
        options["draft"] = load(arguments.draft)
    if arguments.stream:
        if len(arguments.prompt) > 1:
            raise ValueError(f"--stream: expected one --prompt, got {len(arguments.prompt)}; leave --stream out")
        print(arguments.prompt[0], end="", flush=True)
        lm.generate(arguments.prompt, stream=lambda row, text: print(text, end="", flush=True), **options)
        print()
        return
    for prompt, answer in zip(arguments.prompt, lm.generate(arguments.prompt, **options), strict=True):
        print(prompt + answer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmjax", description="Pretrains language models in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
           for name, text in COMMANDS.items()}
    for name in ("train", "plan", "prepare", "bench"):
        sub[name].add_argument("--config", required=name != "bench", default="", metavar="FILE[:VARIANT]",
                               help="a Python file with get_config(); --config.KEY.PATH=VALUE changes a value of it")
    for name in ("train", "report", "data"):
        sub[name].add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")
    sub["train"].add_argument("--profile", default="", metavar="A:B", help="trace these steps into WORKDIR/profile")
    sub["train"].add_argument("--hlo", default="", metavar="DIR", help="write the step's HLO there")
    sub["plan"].add_argument("--topology", required=True, metavar="NAME",
                             help="v5e:16x16, v5p-128, 2xv6e:16x16 (two slices), ..., or cpu or gpu: what is here")
    sub["plan"].add_argument("--search", action="store_true", help="find the best mesh, remat policy and batch first")
    sub["plan"].add_argument("--tokens", type=float, default=0.0, help="a budget to reckon days and chip-hours for")
    sub["plan"].add_argument("--out", default="", metavar="DIR", help="write plan.json, plan.svg and the HLO there")
    sub["trace"].add_argument("--data", required=True, metavar="DIR", help="a prepared directory")
    sub["trace"].add_argument("--id", required=True, help="of the document, as in ids.txt and ledger.parquet")
    sub["prepare"].add_argument("--out", required=True, metavar="DIR", help="where the prepared data goes")
    sub["data"].add_argument("action", choices=("show", "order"), help="show: one step's rows and their text; order: "
                             "a line for each row of the run")
    sub["data"].add_argument("--step", type=int, default=1, help="for show: as metrics.jsonl counts, from 1")
    sub["data"].add_argument("--from", type=int, default=0, dest="first", metavar="ROW", help="for order, from 0")
    sub["data"].add_argument("--to", type=int, default=31, dest="last", metavar="ROW", help="for order: the last one")
    sub["bench"].add_argument("what", nargs="?", choices=("train", "generate", "data"), default="train",
                              help="data: the stages of `lmjax prepare` and training rows; it needs no --config")
    sub["bench"].add_argument("--seconds", type=float, default=60.0, help="time to measure for, per comparison")
    sub["bench"].add_argument("--out", default="", metavar="FILE", help="write the figures as JSON, too")
    sub["import-hf"].add_argument("checkpoint", metavar="DIR", help="with config.json and safetensors")
    sub["import-hf"].add_argument("--out", required=True, metavar="DIR", help="where the checkpoint goes")
    for name in ("generate", "score", "eval", "export-hf"):
        sub[name].add_argument("checkpoint", metavar="CHECKPOINT", help="a run's directory or one of its checkpoints")
    sub["score"].add_argument("file", nargs="+", metavar="FILE", help="a UTF-8 text file")
    add = sub["eval"].add_argument
    add("--tasks", required=True, metavar="NAME,...", help="tasks of lm-eval or of --task-dir")
    add("--task-dir", default="", metavar="DIR", help="task files of your own")
    add("--num-fewshot", type=int, default=None)
    add("--limit", type=int, default=None, help="examples a task")
    add("--out", default="", metavar="FILE", help="write the results as JSON, too")
    add = sub["export-hf"].add_argument
    add("--out", required=True, metavar="DIR", help="where the Hugging Face directory goes")
    add("--model-type", default="", help="the family to write it as (default: the first that fits)")
    add("--dtype", default="", help="float32, bfloat16 or float16 (default: that of the import, or float32)")
    add("--max-shard-gb", type=float, default=5.0, help="size of a weights file")
    add = sub["generate"].add_argument
    add("--prompt", action="append", required=True, help="repeat it for several in one batch")
    add("--max-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=0, help="0: no limit")
    add("--top-p", type=float, default=1.0)
    add("--min-p", type=float, default=0.0, help="drop tokens less likely than this share of the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that were there become less likely")
    add("--stop", action="append", default=[], help="end before this string; repeat it for several")
    add("--num-beams", type=int, default=1, help="beam search with so many beams")
    add("--length-penalty", type=float, default=1.0, help="of beams: their likelihoods are divided by length^this")
    add("--draft", default="", metavar="CHECKPOINT", help="a small model that proposes tokens (same distribution)")
    add("--stream", action="store_true", help="print as it is generated")
    add("--seed", type=int, default=0)
    return parser


def _refuse(message: str, code: int = 2) -> int:
    print(f"lmjax: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
