"""Chat and instructions: a decoder learns what the assistant says in conversations.

A chat template turns messages into a text. It belongs to the tokenizer's files from then on: a
checkpoint has it, and an exported directory as well.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.config import choice
from lmjax.config.paths import expand
from lmjax.data.chat import (
    ASSISTANT,
    BUILT_IN,
    FILE,
    Ends,
    check_messages,
    end_of_turn,
    find_template,
    marks_without_token,
    need_template,
)
from lmjax.data.reading import Reader
from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import UserError
from lmjax.models.model import ModelConfig
from lmjax.tasks.task import Encoded, Facts, Record, Sizes
from lmjax.tasks.templates import value
from lmjax.tasks.writing import WritingTask, given_and_written

ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT}  # of ShareGPT
COLUMNS = ("messages", "conversations")


@dataclass(frozen=True)
class Chat(WritingTask):
    """What the assistant says next."""

    name: str = "chat"
    # The column of the messages: a list of {role, content}, or of ShareGPT's {from, value}.
    # "": messages, conversations, or the two columns prompt and completion.
    messages: str = ""
    template: str = ""  # chatml, plain, or a Jinja file; "": that of the model's tokenizer
    turns: str = "all"  # of the assistant that are learned: all, or the last

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("turns", self.turns, ("all", "last"))

    @property
    def templates(self) -> dict[str, str]:
        return {"messages": self.messages} if self.messages else {}

    def decides(self) -> dict[str, Any]:
        text = self._given_template()
        return super().decides() | {"template": hashlib.sha256(text.encode()).hexdigest()[:16]
                                    if text else ""}

    def check(self, model: ModelConfig) -> None:
        if model.family != "decoder":
            raise UserError("a decoder, which continues conversations", f"an {model.family}",
                            "use another model, or task.name=pairs", where="task.name")

    def tokenizer(self, tokenizer: Tokenizer, log: Callable[[str], None]) -> Tokenizer:
        """The tokenizer with the chat template among its files.

        Raises:
          UserError: there is no template, or it cannot be used.
        """
        text = self._given_template()
        made = tokenizer.with_file(FILE, text.encode()) if text else tokenizer
        template = find_template(made)
        if template is None:
            raise UserError("a chat template", "a tokenizer without one", "choose one of "
                            f"{', '.join(BUILT_IN)} or a file", where="config.task.template")
        try:
            ends = end_of_turn(made)
        except UserError as error:
            raise UserError(error.expected, error.got, error.fix,
                            where="config.task.template") from None
        if plain := marks_without_token(template, made):
            log(f"chat template: {', '.join(plain)} are no tokens of the tokenizer and stay plain "
                f"text, of {len(made.encode(plain[0]))} tokens the first")
        if not any(ends):
            log("chat template: warning: nothing ends a turn of the assistant, so that answers "
                "only end at task.max_tokens")
        return made

    def texts(self, record: Record) -> list[str]:
        return [message["content"] for message in self._messages(record)]

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        if not labelled:
            ids = self.prompt(record, reader, sizes)
            return given_and_written(ids, [reader.names.tokenizer.eos_id], np.zeros(1), sizes)
        messages, tokenizer = self._messages(record), reader.names.tokenizer
        self.truth(record)
        text, spans = need_template(tokenizer).spans(messages, last=self.turns == "last")
        if sizes.prefix and len(spans) > 1:
            raise UserError("one turn of the assistant for a prefix-LM, which reads all before it "
                            "in both directions", f"{len(spans)}", "set task.turns=last")
        whole, places = tokenizer.spans_with_specials(text)
        counts = np.zeros(len(whole), np.int32)
        for start, stop in spans:
            counts[(places[:, 0] < stop) & (places[:, 1] > start)] = 1
        room = sizes.tokens + 1  # the last id is only a target
        ids, lost = whole[:room], int(counts[room:].sum())
        first = min(max(int(np.argmax(counts)), 1), len(ids) - 1)  # where the answers begin
        return given_and_written(ids[:first], ids[first:], counts[first:room], sizes,
                                 (len(counts) - len(ids) - lost, lost))

    def room(self, sizes: Sizes) -> int:
        """The most ids of a prompt: what a row holds, and an answer to it has positions."""
        if not sizes.positions:
            return sizes.tokens
        return max(min(sizes.tokens, sizes.positions - self.max_tokens), sizes.tokens // 2)

    def prompt(self, record: Record, reader: Reader, sizes: Sizes) -> list[int]:
        messages, tokenizer = self._messages(record), reader.names.tokenizer
        turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        before = messages[: turns[-1]] if turns else messages
        text = need_template(tokenizer).render(before, prompt=True)
        return tokenizer.spans_with_specials(text)[0][-self.room(sizes):]  # the newest turns

    def ends(self, reader: Reader) -> Ends:
        return end_of_turn(reader.names.tokenizer)

    def truth(self, record: Record) -> Any:
        """What the assistant says last."""
        said = [message["content"].strip() for message in self._messages(record)
                if message["role"] == ASSISTANT]
        if not said or not all(said):
            raise UserError("a conversation in which the assistant speaks",
                            "an empty turn" if said else "none of its turns", "correct the record")
        return said[-1]

    def _messages(self, record: Record) -> list[dict[str, Any]]:
        column = self.messages or next((name for name in COLUMNS if record.get(name)), "")
        if column:
            found = value(record, column)
            if isinstance(found, list):
                found = [_role_and_content(message) for message in found]
            return check_messages(found, column)
        pair = ("prompt", "completion")
        if not any(name in record for name in (*COLUMNS, *pair)):
            raise UserError(f"a column {', '.join(COLUMNS)}, or prompt and completion",
                            f"a record with {', '.join(record)[:200]}",
                            "name the column of the conversations in task.messages")
        asked, said = (value(record, name) for name in pair)
        return check_messages([*_as_messages(asked, "user"), *_as_messages(said, ASSISTANT)],
                              "prompt, completion")

    def _given_template(self) -> str:
        """The template that the config names; "" if it names none."""
        return _read(self.template) if self.template else ""


@functools.lru_cache(maxsize=4)
def _read(name: str) -> str:
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return Path(expand(name, "config.task.template", bucket=False)).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{', '.join(BUILT_IN)} or a Jinja file", error, "correct it",
                        where="config.task.template") from None


def _role_and_content(message: Any) -> Any:
    """A message with the keys role and content, which ShareGPT calls from and value."""
    if isinstance(message, dict) and "from" in message and "role" not in message:
        role = message["from"]
        return {"role": ROLES.get(role, role), "content": message.get("value")}
    return message


def _as_messages(found: Any, role: str) -> list[Any]:
    return found if isinstance(found, list) else [{"role": role, "content": found}]
