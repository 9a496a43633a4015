"""The command `lmjax chat`: a conversation in the terminal, or through a pipe."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from lmjax.cli.arguments import AnyPath, add_kv_cache
from lmjax.errors import UserError

HELP = "/reset begins a new conversation, /quit ends it"


def add_chat(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax chat`."""
    add = parser.add_argument
    add("checkpoint", type=AnyPath, metavar="CHECKPOINT",
        help="a run's directory, one of its checkpoints, or a Hugging Face directory")
    add("--system", default="", help="what the system says first")
    add("--max-tokens", type=int, default=256, help="tokens of an answer at most (default: 256)")
    add("--temperature", type=float, default=0.8,
        help="0 takes the most likely token each time (default: 0.8)")
    add("--top-p", type=float, default=1.0,
        help="sample from the most likely tokens that have this probability together (default: 1)")
    add_kv_cache(parser)
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")


def chat(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Answers each line of the input, with all that was said before."""
    from lmjax.decoding.answers import DecodingOptions
    from lmjax.lm import load

    options = {name: getattr(arguments, name)
               for name in ("max_tokens", "temperature", "top_p", "kv_cache", "seed")}
    DecodingOptions(**options)  # refuses a wrong option before the model is loaded
    lm = load(arguments.checkpoint)
    lm.speaker  # noqa: B018 - refuses a model without a chat template at once
    start = [{"role": "system", "content": arguments.system}] if arguments.system else []
    terminal, messages = sys.stdin.isatty(), list(start)
    if terminal:
        print(HELP)
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/quit":
            return
        if said == "/reset":
            messages = list(start)
        elif said.startswith("/"):
            print(f"{said}: {HELP}", file=sys.stderr)
        elif said:
            messages.append({"role": "user", "content": said})
            try:
                answer = lm.chat(messages, **options, stream=_show)
            except UserError as error:  # such as a conversation beyond the learned positions
                print(f"lmjax: error: {error}; /reset begins a new conversation", file=sys.stderr)
                messages.pop()
                continue
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})


def _show(row: int, text: str) -> None:
    print(text, end="", flush=True)
