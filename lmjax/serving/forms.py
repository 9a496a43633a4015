"""The two forms of answers: continuations of prompts, and turns of a conversation."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from lmjax.serving import replies
from lmjax.serving.answering import Answer, Delta
from lmjax.serving.growing_text import GrowingText
from lmjax.serving.schema import ChatRequest, CompletionRequest
from lmjax.serving.served_model import Served


class Form(Protocol):
    """How answers are written.

    Attributes:
      prefix: begins the id of a response.
      object: the kind of a whole response.
      chunk_object: the kind of an event of a stream.
      waits: whether a stream has each answer as one event.
    """

    prefix: str
    object: str
    chunk_object: str
    waits: bool

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """What a stream of `count` answers begins with."""

    def part(self, answer: Answer, delta: Delta) -> Any:
        """A part of an answer in a stream."""

    def whole(self, answer: Answer, delta: Delta) -> Any:
        """A whole answer."""


class CompletionForm:
    """Answers of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: Served, asked: CompletionRequest,
                 prompts: Sequence[str | Sequence[int]], rows: Sequence[Sequence[int]]):
        """
        Args:
          served: the model.
          asked: by the client.
          prompts: as they were given.
          rows: their ids.
        """
        self._served, self._n, self._rows = served, asked.n or 1, rows
        self.scored, self._top = asked.logprobs is not None, asked.logprobs or 0
        self._echoed = [prompt if isinstance(prompt, str) else served.names.decode(prompt)
                        for prompt in prompts] if asked.echo else None
        # The prompt's scores come with the end of the answer.
        self.waits = self._echoed is not None and self.scored

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """The prompts, if they are echoed."""
        if self._echoed is not None and not self.waits:
            for index in range(count):
                yield {"index": index, "text": self._echoed[index // self._n], "logprobs": None,
                       "finish_reason": None}

    def part(self, answer: Answer, delta: Delta) -> Any:
        """A part of a continuation."""
        if self.waits:
            return self.whole(answer, delta)
        return self._choice(delta, "")

    def whole(self, answer: Answer, delta: Delta) -> Any:
        """A continuation, after its prompt if that is echoed."""
        if self._echoed is None:
            return self._choice(delta, "")
        number = delta.number // self._n
        text, pieces, starts = self._echoed[number], list[Any](), list[int]()
        if self.scored and answer.finished is not None:
            pieces = list(answer.finished.prompt_pieces)
            read = GrowingText(self._served.names, ())
            for token in self._rows[number]:
                read.add([token])
            starts = [0, *read.ends][: len(pieces)]
        return self._choice(delta._replace(
            pieces=pieces + delta.pieces,
            starts=starts + [len(text) + at for at in delta.starts]), text)

    def _choice(self, delta: Delta, before: str) -> replies.CompletionChoice:
        scores = replies.completion_scores(
            self._served, delta.pieces, delta.starts, self._top) if self.scored else None
        return {"index": delta.number, "text": before + delta.text, "logprobs": scores,
                "finish_reason": delta.finish_reason}


class ChatForm:
    """Answers of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    waits = False

    def __init__(self, served: Served, asked: ChatRequest):
        self._served, self._scored = served, bool(asked.logprobs)

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        for index in range(count):
            yield {"index": index, "delta": {"role": "assistant", "content": "", "refusal": None},
                   "logprobs": None, "finish_reason": None}

    def part(self, answer: Answer, delta: Delta) -> Any:
        """A part of an answer."""
        return {"index": delta.number, "delta": {"content": delta.text} if delta.text else {},
                "logprobs": self._scores(delta), "finish_reason": delta.finish_reason}

    def whole(self, answer: Answer, delta: Delta) -> Any:
        """A whole answer."""
        choice: replies.ChatChoice = {
            "index": delta.number, "logprobs": self._scores(delta),
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "finish_reason": delta.finish_reason}
        return choice

    def _scores(self, delta: Delta) -> replies.ChatScores | None:
        return replies.chat_scores(self._served, delta) if self._scored else None
