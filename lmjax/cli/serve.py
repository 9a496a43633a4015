"""The command `lmjax serve`: models behind the OpenAI API, and a page to talk to them."""

import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import PurePath

from lmjax.cli.arguments import AnyPath, add_kv_cache
from lmjax.config import at_least, at_most
from lmjax.errors import UserError

KEY = "LMJAX_API_KEY"
MODEL_WORD = "checkpoints"  # a run's folder, which names no model


def add_serve(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax serve`."""
    add = parser.add_argument
    add("checkpoint", nargs="+", type=AnyPath, metavar="CHECKPOINT",
        help="a run's directory, one of its checkpoints, or a Hugging Face directory")
    add("--name", action="append", default=[],
        help="what clients call the model; repeat it in the order of the checkpoints (default: "
        "the directory's name)")
    add("--host", default="127.0.0.1",
        help="the address to listen at (default: 127.0.0.1, this machine only); any other needs "
        f"an API key in the environment variable {KEY}")
    add("--port", type=int, default=8000, help="0 finds a free one (default: 8000)")
    add("--slots", type=int, default=16,
        help="requests that are answered at the same time, per model (default: 16)")
    add("--queue", type=int, default=64,
        help="requests that wait for a slot, per model; more get status 429 (default: 64)")
    add("--max-length", type=int, default=0,
        help="tokens of a prompt and its answer together (default: 0, those of a row of training)")
    add("--chunk", type=int, default=64,
        help="tokens of a prompt that are read between two steps (default: 64)")
    add("--prefix-tokens", type=int, default=-1,
        help="tokens of prompts that are kept for requests that begin alike (default: a quarter "
        "of the slots' tokens)")
    add_kv_cache(parser)
    add("--draft", default="", type=AnyPath, metavar="CHECKPOINT",
        help="a small model with the same tokenizer that proposes tokens; the distribution stays "
        "the same")
    add("--propose", type=int, default=4,
        help="tokens that the draft proposes at a time (default: 4)")
    add("--timeout", type=float, default=600.0,
        help="seconds after which an answer is given up (default: 600)")
    add("--max-body", type=float, default=1.0, help="MB of a request's body at most (default: 1)")
    add("--drain", type=float, default=30.0,
        help="seconds that answers have to end in after SIGTERM (default: 30)")


def serve(arguments: Namespace, overrides: Sequence[str]) -> int:
    """Serves until it is told to stop; everything is checked before a model is loaded."""
    names = names_of(arguments.checkpoint, arguments.name)
    at_least(1, slots=arguments.slots, chunk=arguments.chunk, propose=arguments.propose)
    at_least(-1, prefix_tokens=arguments.prefix_tokens)
    if arguments.draft and len(names) > 1:
        raise UserError("one model with --draft", len(names), "serve the others by themselves",
                        where="--draft")
    at_least(0, port=arguments.port, queue=arguments.queue, max_length=arguments.max_length,
             drain=arguments.drain)
    at_most(65535, port=arguments.port)
    if not (arguments.timeout > 0 and arguments.max_body > 0):
        raise UserError("more than 0", f"{arguments.timeout:g} s, {arguments.max_body:g} MB",
                        "give more", where="--timeout, --max-body")
    try:
        from lmjax.serving.server import LOOPBACK, bind
    except ImportError as error:
        raise UserError("the packages of the extra `serve`", f"no {error.name}",
                        "pip install 'lmjax[serve]'", where="lmjax serve") from None
    key = os.environ.get(KEY, "")
    if not key and arguments.host not in LOOPBACK:
        raise UserError(f"an API key in {KEY} to listen at {arguments.host}", "none",
                        f"set one, such as {KEY}=$(openssl rand -hex 32), or leave --host out",
                        where="--host")
    with bind(arguments.host, arguments.port) as listener:
        from lmjax.serving.start import run

        return 130 if run(arguments, names, listener, key) == signal.SIGINT else 0


def names_of(checkpoints: Sequence[str], given: Sequence[str]) -> list[str]:
    """The names of models: those given, or else the names of their directories.

    Raises:
      UserError: two models have one name, or the names are not as many as the models.
    """
    if given and len(given) != len(checkpoints):
        raise UserError(f"{len(checkpoints)} names, one per checkpoint", len(given),
                        "give --name once per checkpoint, or not at all", where="--name")
    names = list(given) or [_name(path) for path in checkpoints]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError("a name of its own per model", f"{twice} twice",
                        "give --name NAME once per checkpoint", where="--name")
    if "" in names or any("/" in name for name in names):
        raise UserError("names without /", repr(names)[:80], "give other ones", where="--name")
    return names


def _name(path: str) -> str:
    """RUN, RUN/checkpoints and RUN/checkpoints/100 are all called RUN."""
    parts = list(PurePath(path.rstrip("/")).parts)
    if len(parts) > 1 and parts[-2] == MODEL_WORD:
        parts.pop()
    if len(parts) > 1 and parts[-1] == MODEL_WORD:
        parts.pop()
    name = parts[-1] if parts else ""
    return name if name.strip("./") else PurePath(os.path.abspath(path)).name
