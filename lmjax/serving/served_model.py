"""A model that is served: from what a client asks to what the engine is asked."""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from lmjax.data.chat import Ends, end_of_turn, find_template, need_template
from lmjax.data.tokenizers import NamedIds
from lmjax.decoding.inputs import check_row
from lmjax.decoding.sampling import Sampling
from lmjax.lm import LM
from lmjax.serving.engine import Engine
from lmjax.serving.errors import ApiError
from lmjax.serving.schema import Asked, Message

LEAST = 1e-4  # a lower temperature always takes the likeliest token, and so does a lower top_p
THREAD_CHARACTERS = 4000  # a longer text is tokenised beside the event loop
EMBEDDINGS_WAITING = 64  # requests for vectors that wait for their turn


class Served:
    """A model with its name and its engine.

    Attributes:
      name: what clients call it.
      lm: the model.
      engine: answers prompts; None for a model that only makes vectors.
      created: when it was loaded, in seconds since 1970.
    """

    def __init__(self, name: str, lm: LM, engine: Engine | None):
        """
        Raises:
          UserError: the model has no tokenizer.
        """
        self.name, self.lm, self.engine, self.created = name, lm, engine, int(time.time())
        self.tokenizer = lm.need_tokenizer()
        self.chats = engine is not None and find_template(self.tokenizer) is not None
        self.ends = end_of_turn(self.tokenizer) if self.chats else Ends()
        self._embedding, self._waiting = asyncio.Lock(), 0

    @property
    def names(self) -> NamedIds:
        """The tokenizer with the names of the objective's ids."""
        return self.lm.reader.names

    @property
    def max_length(self) -> int:
        """The tokens that a prompt and its answer may have together."""
        return self.engine.max_length if self.engine else self.lm.recipe.data.seq_len

    def generating(self) -> Engine:
        """The engine.

        Raises:
          ApiError: the model makes no text.
        """
        if self.engine is None:
            raise ApiError(400, f"The model {self.name} makes vectors, not text: use "
                           "/v1/embeddings.", param="model", code="unsupported_model")
        return self.engine

    async def prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids that the model reads for a prompt, which may be ids already."""
        if not isinstance(prompt, str):
            return check_row(prompt, self.lm.model.config, "prompt").tolist()
        text = prompt
        return await self._beside(text, lambda: self.lm.reader.ids(text, end=False))

    async def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model reads for a conversation.

        Raises:
          ApiError: the model has no chat template.
          UserError: the template refuses the messages.
        """
        if not self.chats:
            raise ApiError(400, f"The model {self.name} has no chat template: use /v1/completions.",
                           param="model", code="unsupported_model")
        text = need_template(self.tokenizer).render([m.plain() for m in messages], prompt=True)
        ids = await self._beside(text, lambda: self.tokenizer.spans_with_specials(text)[0])
        return ids or [self.tokenizer.bos_id]

    def room(self, ids: Sequence[int], max_tokens: int | None, param: str, *,
             least: int = 1) -> int:
        """How many tokens the answer may have: what is asked for, or what the context leaves.

        Raises:
          ApiError: the context leaves fewer than `least`.
        """
        left = self.max_length - len(ids)
        if left < least:
            raise ApiError(400, f"This model's context has {self.max_length} tokens, and the "
                           f"{param} has {len(ids)}. Shorten it.", param=param,
                           code="context_length_exceeded")
        return left if max_tokens is None else min(max_tokens, left)

    def sampling(self, asked: Asked) -> Sampling:
        """How tokens are drawn; the defaults are those of the OpenAI API."""
        temperature = 1.0 if asked.temperature is None else asked.temperature
        top_p = 1.0 if asked.top_p is None else max(asked.top_p, LEAST)
        return Sampling(temperature if temperature >= LEAST else 0.0, asked.top_k or 0, top_p,
                        asked.min_p or 0.0, asked.repetition_penalty or 1.0)

    def bias(self, asked: Asked) -> tuple[tuple[int, float], ...]:
        """What is added to logits.

        Raises:
          ApiError: a key is no id of the model's.
        """
        found = tuple((int(token), value) for token, value in (asked.logit_bias or {}).items())
        wrong = [token for token, _ in found if token >= self.lm.model.config.vocab_size]
        if wrong:
            raise ApiError(400, f"logit_bias: the model has no token {wrong[0]}, only 0 to "
                           f"{self.lm.model.config.vocab_size - 1}.", param="logit_bias",
                           code="invalid_value")
        return found

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text whose vector is asked for.

        Raises:
          ApiError: it is longer than a row of the model's training.
        """
        ids, length = self.lm.reader.ids(text), self.lm.recipe.data.seq_len
        if len(ids) > length:
            raise ApiError(400, f"This model reads {length} tokens, and the input has {len(ids)}. "
                           "Shorten it.", param="input", code="context_length_exceeded")
        return ids

    async def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """One vector per text, float32 [texts, D], and the number of tokens; one call at a time.

        Raises:
          ApiError: too many requests wait, or see `ids_of`.
        """
        if self._waiting >= EMBEDDINGS_WAITING:
            raise ApiError(429, "Too many requests for embeddings wait.", code="queue_full",
                           headers={"Retry-After": "2"})
        self._waiting += 1
        try:
            async with self._embedding:
                tokens = await asyncio.to_thread(lambda: sum(len(self.ids_of(t)) for t in texts))
                return await asyncio.to_thread(self.lm.embed, texts), tokens
        finally:
            self._waiting -= 1

    @cached_property
    def _special(self) -> dict[int, str]:
        """The names of tokens without text."""
        named = {self.tokenizer.id_of(name): name for name in self.tokenizer.special_names.values()}
        own = {i: name for name, i in self.names.ids.items()}
        return {i: name for i, name in (named | own).items() if i is not None}

    def token(self, token: int) -> tuple[str, bytes]:
        """A token as a text and as bytes. A part of a character is written as its bytes."""
        if token >= self.tokenizer.vocab_size or token in self._special:
            name = self._special.get(token, f"<{token}>")
            return name, name.encode()
        raw = self.tokenizer.surface(np.array([token]))[0]
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    async def _beside(self, text: str, encode: Callable[[], list[int]]) -> list[int]:
        """The ids of a text; those of a long one are made in another thread."""
        return await asyncio.to_thread(encode) if len(text) > THREAD_CHARACTERS else encode()
