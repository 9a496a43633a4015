"""The `lmjax` command."""

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train the model of a config, or go on from its last checkpoint",
    "prepare": "clean, tokenise and store a config's corpus without training on it",
    "trace": "say what became of a document that was prepared: kept, or removed by which rule and for which other",
    "generate": "continue prompts with a trained model",
    "score": "bits per byte of text files under a trained model",
    "report": "write report.html from what a run has recorded so far",
    "bench": "measure the train loop, the bare step, and PyTorch beside them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code 0: done (or stopped on request and saved), 2: it cannot be run as asked."""
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
    except (ValueError, OSError) as error:
        if os.environ.get("LMJAX_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and "expected" not in message:
            message = f"expected to read and write files, got {message}; make room or check the path, then try again"
        return _leave(_refuse(message))
    except KeyboardInterrupt:
        return _leave(130)


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    command = arguments.command
    if command == "trace":
        from lmjax.prepare import trace

        print("\n".join(trace(arguments.data, arguments.id)))
        return 0
    if command == "report":
        from lmjax.report import write_report

        print(write_report(arguments.workdir))
        return 0
    _keep_freed_memory()
    from lmjax import runtime  # JAX is imported from here on

    recipe = None
    if hasattr(arguments, "config"):
        from lmjax.config import load
        from lmjax.recipe import build_recipe

        recipe = build_recipe(load(arguments.config, overrides))
    runtime.use_compilation_cache()
    if command == "train":
        from lmjax.train import train

        runtime.start_distributed()
        train(recipe, arguments.workdir)
    elif command == "prepare":
        from lmjax.prepare import prepare

        prepare(recipe.data, arguments.out)
    elif command == "bench":
        from lmjax.bench import bench

        bench(recipe, [arguments.config, *(f"--config.{item}" for item in overrides)], seconds=arguments.seconds,
              out=arguments.out)
    else:
        _use(arguments)
    return 0


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
        for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
            libc.mallopt(option, value)


def _use(arguments: argparse.Namespace) -> None:
    from lmjax.lm import load

    lm = load(arguments.checkpoint)
    if arguments.command == "generate":
        answers = lm.generate(arguments.prompt, max_tokens=arguments.max_tokens, temperature=arguments.temperature,
                              top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed)
        for prompt, answer in zip(arguments.prompt, answers, strict=True):
            print(prompt + answer)
        return
    for file in arguments.file:
        with open(file, encoding="utf-8") as text:
            score = lm.score([text.read()])[0]
        print(f"{file}: {score.bits_per_byte:.4f} bits/byte, perplexity {score.perplexity:.2f}, {score.tokens} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmjax", description="Pretrains language models in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
           for name, text in COMMANDS.items()}
    for name in ("train", "prepare", "bench"):
        sub[name].add_argument("--config", required=True, metavar="FILE[:VARIANT]",
                               help="a Python file with get_config(); --config.KEY.PATH=VALUE changes a value of it")
    for name in ("train", "report"):
        sub[name].add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")
    sub["trace"].add_argument("--data", required=True, metavar="DIR", help="a prepared directory")
    sub["trace"].add_argument("--id", required=True, help="of the document, as in ids.txt and ledger.parquet")
    sub["prepare"].add_argument("--out", required=True, metavar="DIR", help="where the prepared data goes")
    sub["bench"].add_argument("--seconds", type=float, default=60.0, help="time to measure for, per comparison")
    sub["bench"].add_argument("--out", default="", metavar="FILE", help="write the figures as JSON, too")
    for name in ("generate", "score"):
        sub[name].add_argument("checkpoint", metavar="CHECKPOINT", help="a run's directory or one of its checkpoints")
    sub["score"].add_argument("file", nargs="+", metavar="FILE", help="a UTF-8 text file")
    add = sub["generate"].add_argument
    add("--prompt", action="append", required=True, help="repeat it for several in one batch")
    add("--max-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=0, help="0: no limit")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    return parser


def _leave(code: int) -> int:
    """Ends a process of several at once: a normal exit waits for the others, which may wait for this one."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        sys.stderr.flush()
        os._exit(code)
    return code


def _refuse(message: str) -> int:
    print(f"lmjax: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
