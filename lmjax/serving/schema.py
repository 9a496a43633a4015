"""The bodies of requests: what is checked here is what /openapi.json publishes.

Names and meanings are those of the OpenAI API; `top_k`, `min_p` and `repetition_penalty` are
extensions that other servers have, too. A field that is not here is refused, as there.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64  # prompts or texts in one request
MAX_STOPS = 4  # strings that end an answer
INT64 = 2**63
UNUSED = "accepted for its neutral value only"


def _needs(field: str, other: str) -> dict[str, Any]:
    """JSON Schema: `field` may only be there if `other` is true."""
    return {"if": {"required": [field], "properties": {field: {"not": {"type": "null"}}}},
            "then": {"required": [other], "properties": {other: {"const": True}}}}


class Body(BaseModel):
    """Strict: no unknown field, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """JSON has one kind of numbers: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # after the limits, which pydantic then knows to be an int's
# Marks what /openapi.json narrows to the ids of the models that are served.
TOKEN = "token-id"
TokenId = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"format": TOKEN}), WHOLE]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
# The first fault of a list ends its check: a body may hold a million of them.
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Rows = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1)]
BiasKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = False


class Asked(Body):
    """What a request for text may say, whether it continues a prompt or a conversation."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**24), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=300)] | None = None
    presence_penalty: Zero | None = Field(None, description=UNUSED)
    frequency_penalty: Zero | None = Field(None, description=UNUSED)
    user: str | None = Field(None, description="accepted and not used")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        """What `_needs` publishes."""
        for field, other in (("stream_options", "stream"), ("top_logprobs", "logprobs")):
            if getattr(self, field, None) is not None and not getattr(self, other, None):
                raise PydanticCustomError("needs", f"{field} is only allowed with {other}: true")
        return self


class CompletionRequest(Asked):
    """Asks for the continuation of prompts."""

    model_config = ConfigDict(json_schema_extra=_needs("stream_options", "stream"))

    prompt: str | Texts | TokenIds | Rows
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = Field(
        None, description="16 by default; 0 only scores the prompt (echo)")
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = Field(None, description=UNUSED)
    suffix: Literal[""] | None = Field(None, description=UNUSED)


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """What somebody said. A developer is the system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = None
    refusal: None = Field(None, description=UNUSED)

    def plain(self) -> dict[str, str]:
        """The message as chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(
            part.text for part in self.content)
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class TextFormat(Body):
    """The only format of answers."""

    type: Literal["text"]


class ChatRequest(Asked):
    """Asks for what the assistant says next."""

    model_config = ConfigDict(json_schema_extra={"allOf": [
        _needs("stream_options", "stream"), _needs("top_logprobs", "logprobs")]})

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="by default up to the context's end")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="the newer name of max_tokens, and goes before it")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: TextFormat | None = None


class EmbeddingRequest(Body):
    """Asks for one vector per text."""

    model: str
    input: str | Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(None, description=UNUSED)
    user: str | None = Field(None, description="accepted and not used")


class TokenizeRequest(Body):
    """Asks for the token ids of a text."""

    model: str
    prompt: str
    add_special_tokens: bool = Field(True, description="whether to begin as a prompt does")


class DetokenizeRequest(Body):
    """Asks for the text of token ids."""

    model: str
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
