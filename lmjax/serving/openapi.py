"""The published description of the API, made of the types that check and write its bodies."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter

import lmjax
from lmjax.serving import replies, schema
from lmjax.serving.served_model import Served


class Operation(NamedTuple):
    """What can be done at a path."""

    path: str
    summary: str
    body: Any = None  # of the request; None: GET
    reply: Any = None  # None: text
    streams: bool = False
    open: bool = False  # whether it needs no key


OPERATIONS = (
    Operation("/v1/completions", "Continue prompts", schema.CompletionRequest, replies.Completion,
              streams=True),
    Operation("/v1/chat/completions", "Answer in a conversation", schema.ChatRequest,
              replies.Chat, streams=True),
    Operation("/v1/embeddings", "Compute a vector per text", schema.EmbeddingRequest,
              replies.Embeddings),
    Operation("/v1/models", "List the models", None, replies.Models),
    Operation("/v1/models/{model}", "Describe a model", None, replies.ModelInfo),
    Operation("/tokenize", "Turn a text into token ids", schema.TokenizeRequest, replies.Tokens),
    Operation("/detokenize", "Turn token ids into a text", schema.DetokenizeRequest,
              replies.Text),
    Operation("/health", "Say whether requests are taken", None, replies.Health, open=True),
    Operation("/metrics", "Report figures to Prometheus"),
)
# What a client of server-sent events hands on.
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a part of the answer as JSON; [DONE] at the end"}}}
PLACE = "#/components/schemas/{model}"


def document(models: Sequence[Served], *, with_key: bool) -> dict[str, Any]:
    """The OpenAPI document of a server.

    Args:
      models: what it serves.
      with_key: whether it asks for an API key.
    """
    types: Any = [kind for one in OPERATIONS for kind in (one.body, one.reply) if kind]
    types.append(replies.ErrorReply)
    made, shared = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in types], ref_template=PLACE)
    refs = {kind: made[kind, "validation"] for kind in types}
    parts = shared["$defs"]
    narrow(parts, models)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmjax serve", "version": lmjax.__version__},
        "paths": {one.path: {"post" if one.body else "get": _operation(one, refs, models,
                                                                       with_key)}
                  for one in OPERATIONS},
        "components": {"schemas": parts, **({"securitySchemes": {
            "key": {"type": "http", "scheme": "bearer"}}} if with_key else {})},
    }


def narrow(parts: dict[str, Any], models: Sequence[Served]) -> None:
    """Puts what this server knows into the schemas: its models, and the ids of their tokens."""
    for name, wanted in _models_of(models):
        parts[name]["properties"]["model"]["enum"] = wanted
    least = min(model.names.vocab_size for model in models)
    for node in _nodes(parts):
        if node.get("format") == schema.TOKEN:
            node["exclusiveMaximum"] = least
        if "patternProperties" in node:
            [value] = node["patternProperties"].values()
            node |= {"patternProperties": {below(least): value}, "additionalProperties": False}


def below(n: int) -> str:
    """A regular expression of the whole numbers from 0 to n - 1, with n above 10, in decimal."""
    last = str(n - 1)
    # As many digits as n - 1: equal to it up to a digit that is smaller, and then any digits.
    smaller = [f"{last[:i]}[{int(i == 0)}-{int(digit) - 1}][0-9]{{{len(last) - i - 1}}}"
               for i, digit in enumerate(last) if int(digit) > int(i == 0)]
    fewer = f"[1-9][0-9]{{0,{len(last) - 2}}}"
    return f"^({'|'.join(['0', fewer, *smaller, last])})$"


def _models_of(models: Sequence[Served]) -> Iterator[tuple[str, list[str]]]:
    """The bodies that name a model, each with the models that it may name."""
    everyone = [model.name for model in models]
    yield "CompletionRequest", [model.name for model in models if model.engine] or everyone
    yield "ChatRequest", [model.name for model in models if model.chats] or everyone
    for name in ("EmbeddingRequest", "TokenizeRequest", "DetokenizeRequest"):
        yield name, everyone


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All objects in a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(
            node, list) else ():
        yield from _nodes(child)


def _operation(one: Operation, refs: dict[Any, Any], models: Sequence[Served],
               with_key: bool) -> dict[str, Any]:
    def content(schema: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schema}}

    good: dict[str, Any] = content(refs[one.reply]) if one.reply else {
        "text/plain": {"schema": {"type": "string"}}}
    if one.streams:
        good["text/event-stream"] = {"schema": EVENT}
    failed = {"description": "an error", "content": content(refs[replies.ErrorReply])}
    made: dict[str, Any] = {
        "operationId": one.path.strip("/").replace("/", "_"), "summary": one.summary,
        "responses": {"200": {"description": "done", "content": good}, "4XX": failed,
                      "5XX": failed}}
    if one.path == "/health":
        made["responses"]["503"] = {"description": "the server is about to end",
                                    "content": content(refs[one.reply])}
    if one.body:
        made["requestBody"] = {"required": True, "content": content(refs[one.body])}
    if "{model}" in one.path:
        made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {
            "type": "string", "enum": [model.name for model in models]}}]
    if with_key and not one.open:
        made["security"] = [{"key": []}]
    return made
