"""Loads models, says what is served and how to call it, and serves."""

import json
import socket
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from lmjax.lm import load
from lmjax.serving.endpoints import Limits
from lmjax.serving.engine import Engine
from lmjax.serving.served_model import Served
from lmjax.serving.server import Serving, address_of

PLAN = ("slots", "max_length", "chunk", "prefix_tokens", "kv_cache", "propose")  # options of `Plan`


def run(options: Namespace, names: Sequence[str], listener: socket.socket, key: str) -> int:
    """Serves until a signal comes, and returns its number.

    Args:
      options: of `lmjax serve`.
      names: of the models.
      listener: the socket.
      key: what clients must know; "" for none.

    Raises:
      UserError: there is no model, or one that cannot be served.
    """
    models = [make(name, path, options)
              for name, path in zip(names, options.checkpoint, strict=True)]
    url = address_of(listener)
    say(*welcome(models, url, bool(key)))
    # As many as can wait and run, and some for what takes no time, such as /health.
    most = len(models) * (options.slots + options.queue) + 128
    serving = Serving(models, Limits(options.timeout, int(options.max_body * 1e6)),
                      listener=listener, key=key,
                      hosts=() if key else ("localhost", "127.0.0.1", "::1"),
                      most=most, drain_seconds=options.drain)
    ended = serving.run()
    say("stopped")
    return ended


def make(name: str, path: str, options: Namespace) -> Served:
    """Loads a model and makes its engine; an encoder only makes vectors."""
    say(f"loading {path}")
    lm = load(path)
    engine = None
    if lm.model.config.family == "decoder":
        say(f"compiling {name}")
        draft = load(options.draft) if options.draft else None
        engine = Engine(lm, draft=draft, queue=options.queue,
                        **{name: getattr(options, name) for name in PLAN})
    served = Served(name, lm, engine)
    if engine:
        engine.start()
    return served


def welcome(models: Sequence[Served], url: str, with_key: bool) -> list[str]:
    """What a person reads when the server is ready."""
    lines = [describe(model) for model in models]
    first, ask = models[0], dict[str, Any]()
    path, ask = "/v1/completions", {"model": first.name, "prompt": "Once"}
    if first.chats:
        path, ask = "/v1/chat/completions", {"model": first.name, "messages": [
            {"role": "user", "content": "Hello"}]}
    elif first.engine is None:
        path, ask = "/v1/embeddings", {"model": first.name, "input": "Hello"}
    header = " -H \"Authorization: Bearer $LMJAX_API_KEY\"" if with_key else ""
    return [*lines, f"serving at {url}: open it in a browser, or call it:",
            f"  curl {url}{path}{header} -H 'Content-Type: application/json' \\",
            f"    -d '{json.dumps(ask)}'",
            f"the base URL for clients of the OpenAI API is {url}/v1; Ctrl-C stops"]


def describe(model: Served) -> str:
    """One line on a model."""
    if model.engine is None:
        return f"{model.name}: vectors of texts of up to {model.max_length:,} tokens"
    kind = "conversations and completions" if model.chats else "completions"
    stats = model.engine.stats()
    return (f"{model.name}: {kind}, step {int(model.lm.about['step']):,}, "
            f"up to {model.max_length:,} tokens, {stats['slots']:g} at a time, "
            f"keys and values {stats['cache_bytes'] / 1e6:,.1f} MB")


def say(*lines: str) -> None:
    """Prints lines at once, also into a pipe."""
    print("\n".join(lines), flush=True)
