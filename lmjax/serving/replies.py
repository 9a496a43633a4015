"""The bodies of responses, in the forms of the OpenAI API; /openapi.json publishes these types."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from lmjax.serving.answering import Answer, Delta
from lmjax.serving.requests import Piece
from lmjax.serving.served_model import Served

LOWEST = -9999.0  # the API's number for a token of probability 0
Reason = Literal["stop", "length"]


class ErrorBody(TypedDict):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """The body of every response that is no success."""

    error: ErrorBody


class CachedTokens(TypedDict):
    """Prompt tokens whose keys and values were at hand."""

    cached_tokens: int


class Usage(TypedDict):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionScores(TypedDict):
    """The log-probabilities of tokens, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One continuation, or a part of it."""

    index: int
    text: str
    logprobs: CompletionScores | None
    finish_reason: Reason | None


class Completion(TypedDict):
    """Continuations of prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Scored(TypedDict):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(Scored):
    """A token of an answer, with the likeliest tokens in its place."""

    top_logprobs: list[Scored]


class ChatScores(TypedDict):
    """The log-probabilities of an answer's tokens."""

    content: list[ScoredToken]
    refusal: None


class ChatMessage(TypedDict):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatScores | None
    finish_reason: Reason | None


class Chat(TypedDict):
    """Answers in a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Vector(TypedDict):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """Vectors of texts."""

    object: Literal["list"]
    model: str
    data: list[Vector]
    usage: EmbeddingUsage


class ModelInfo(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    chat: bool
    completion: bool


class Models(TypedDict):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelInfo]


class Tokens(TypedDict):
    """The token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(TypedDict):
    """The text of token ids."""

    prompt: str


class Health(TypedDict):
    """Whether requests are taken."""

    status: Literal["ok", "draining"]


def model_info(served: Served) -> ModelInfo:
    """What is told of a model."""
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "lmjax",
            "max_model_len": served.max_length, "chat": served.chats,
            "completion": served.engine is not None}


def usage(answers: Sequence[Answer], per_prompt: int) -> Usage:
    """The tokens of a request's answers, of which `per_prompt` belong to each prompt."""
    read = sum(len(answer.request.prompt) for answer in answers[::per_prompt])
    written = sum(len(answer.pieces) for answer in answers)
    cached = sum(a.finished.reused_tokens for a in answers[::per_prompt] if a.finished)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached}}


def completion_scores(served: Served, pieces: Sequence[Piece], starts: Sequence[int],
                      top: int) -> CompletionScores:
    """The form of /v1/completions; `top` is how many alternatives were asked for."""
    return {"tokens": [served.token(piece.token)[0] for piece in pieces],
            "token_logprobs": [_finite(piece.logprob) for piece in pieces],
            "top_logprobs": [{served.token(i)[0]: p for i, p in piece.alternatives} or None
                             for piece in pieces] if top else None,
            "text_offset": list(starts)}


def chat_scores(served: Served, delta: Delta) -> ChatScores:
    """The form of /v1/chat/completions."""
    return {"content": [{**_scored(served, piece.token, piece.logprob),
                         "top_logprobs": [_scored(served, *one) for one in piece.alternatives]}
                        for piece in delta.pieces], "refusal": None}


def chunk(head: dict[str, Any], choices: list[Any], counted: Usage | None,
          with_usage: bool) -> dict[str, Any]:
    """One event of a stream; `with_usage`: the client asked for the usage, which comes last."""
    return {**head, "choices": choices, **({"usage": counted} if with_usage else {})}


def _scored(served: Served, token: int, logprob: float) -> Scored:
    text, raw = served.token(token)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(raw)}


def _finite(logprob: float) -> float | None:
    """JSON has no NaN, which stands for the first token of a prompt, and no infinity."""
    return None if math.isnan(logprob) else max(logprob, LOWEST)
