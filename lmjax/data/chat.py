"""Chat templates: from messages to the text that a model reads, and where the assistant speaks.

A template is a Jinja text of another's making, as Hugging Face directories have them. It runs in
Jinja's sandbox, and what it writes is what `apply_chat_template` of transformers writes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmjax.data.tokenizers import HF_FILES, Tokenizer
from lmjax.errors import UserError, first_line

FILE = "chat_template.jinja"  # beside the files of a tokenizer
BUILT_IN = {
    "chatml": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"),
    "plain": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- message['role'] | capitalize + ':\\n' + message['content'] }}"
        "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{{- '\\n\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}"),
}
ASSISTANT = "assistant"
Message = Mapping[str, Any]  # role and content, and what else a template reads
# Around what a template writes in {% generation %}; no text has these "noncharacters" of Unicode.
BEGIN, END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(r"<\|[^\s<>|]+\|>|</?\w+_of_turn>|\[/?[A-Z_]{3,}\]")  # that look like tokens


class Rendered(NamedTuple):
    """A conversation as a text."""

    text: str
    spans: list[tuple[int, int]]  # the characters that the assistant writes, turn by turn


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the names of the special tokens that it may write."""

    text: str
    names: tuple[tuple[str, str], ...]  # such as ("eos_token", "</s>")

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant's answer begins.

        Raises:
          UserError: the sandbox refuses the template, or it refuses the messages.
        """
        return self._render(messages, prompt).replace(BEGIN, "").replace(END, "")

    def spans(self, messages: Sequence[Message], *, last: bool = False) -> Rendered:
        """The text of a conversation, and where the assistant speaks in it.

        That is what the template marks by {% generation %}, or else what a turn adds to the text
        of the turns before it.

        Args:
          messages: the conversation.
          last: only the assistant's last turn is asked for.
        Raises:
          UserError: as `render`; or the template leaves out a turn of the assistant, or writes
            earlier turns in another way once later ones follow.
        """
        marked = self._render(messages, False)
        turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        text = marked.replace(BEGIN, "").replace(END, "")
        found = _marked(marked)
        if not found:
            found = [self._turn(text, messages, i) for i in (turns[-1:] if last else turns)]
        for (start, stop), i in zip(found[::-1], turns[::-1], strict=False):
            content = str(messages[i].get("content") or "").strip()
            if content not in text[start:stop]:
                raise UserError("a chat template that writes the assistant's turn",
                                "one that leaves it out, or some of it", "use another "
                                "(task.template)", where="chat template")
        return Rendered(text, found[-1:] if last else found)

    def _turn(self, text: str, messages: Sequence[Message], i: int) -> tuple[int, int]:
        """Where turn i is in the text of all messages."""
        before = self.render(messages[:i], prompt=True)
        after = self.render(messages[: i + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError("a chat template whose text of the first turns begins the whole text",
                            f"another text of turn {i + 1}", "mark the assistant's part by "
                            "{% generation %} in it, or set task.turns=last", where="chat template")
        return len(before), len(after)

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        plain = json.loads(json.dumps(list(messages)))  # no object whose methods a template calls
        if any(mark in json.dumps(plain, ensure_ascii=False) for mark in (BEGIN, END)):
            raise UserError("messages without U+FDD0 and U+FDD1", "one of them", "take it out",
                            where="messages")
        try:
            made: str = _compiled(self.text).render(
                messages=plain, add_generation_prompt=prompt, tools=None, documents=None,
                **dict(self.names))
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise UserError("a chat template that takes these messages in Jinja's sandbox",
                            f"{type(error).__name__}: {first_line(error)}", "correct the "
                            "messages, or use another template", where="chat template") from None
        return made


def find_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template among the files of a tokenizer; None if there is none.

    chat_template.jinja decides, then tokenizer_config.json, as in transformers.
    """
    found: Any = tokenizer.files.get(FILE, b"").decode()
    if not found:
        found = json.loads(tokenizer.files.get(HF_FILES[1], b"{}")).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
    return ChatTemplate(found, tuple(tokenizer.special_names.items())) if found else None


@functools.lru_cache(maxsize=4)
def need_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the template of a tokenizer.

    Raises:
      UserError: there is none.
    """
    found = find_template(tokenizer)
    if found is None:
        raise UserError("a model with a chat template", "none", "fine-tune it with task.name=chat "
                        f"and task.template={' or '.join(BUILT_IN)}, or add {FILE}",
                        where="chat template")
    return found


class Ends(NamedTuple):
    """What ends an answer, besides the ids of the model's reader."""

    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


@functools.lru_cache(maxsize=4)
def end_of_turn(tokenizer: Tokenizer) -> Ends:
    """What a template writes after the assistant's words: a special token, or some text."""
    probe = "probe"
    messages = [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": probe}]
    text, [(start, stop)] = need_template(tokenizer).spans(messages, last=True)
    after = text[start:].rpartition(probe)[2]
    if not after.strip():
        return Ends((), (after,) if after else ())
    after = after.strip()
    first = tokenizer.spans_with_specials(after)[0][0]
    if not tokenizer.decode([first]) or tokenizer.id_of(after) == first:
        return Ends((first,))
    return Ends((), (after.split("\n")[0],))


def marks_without_token(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What looks like a special token in a template, such as <|im_end|>, and is plain text."""
    return [mark for mark in dict.fromkeys(_MARKS.findall(template.text))
            if tokenizer.id_of(mark) is None]


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Returns messages, each a dict with a role and a content.

    Raises:
      UserError: they are no such list.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("a list of messages", repr(messages)[:60],
                        'write [{"role": "user", "content": "..."}]', where=where)
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError("a role and a content, both texts", repr(message)[:60],
                            "correct the message", where=f"{where}[{i}]")
    return [dict(message) for message in messages]


def _marked(text: str) -> list[tuple[int, int]]:
    """The spans between the marks in a text, as they are once the marks are taken out."""
    spans, start, at = [], 0, 0
    for part in re.split(f"([{BEGIN}{END}])", text):
        if part == BEGIN:
            start = at
        elif part == END:
            spans.append((start, at))
        else:
            at += len(part)
    return spans


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """The compiled template.

    Raises:
      UserError: Jinja is not installed, or the text is no template.
    """
    try:
        from lmjax.data.sandbox import environment
    except ImportError:
        raise UserError("the package jinja2 from 3.1.6 on, which runs chat templates", "none",
                        "pip install 'lmjax[tasks]'", where="chat template") from None
    import jinja2

    try:
        return environment(BEGIN, END).from_string(text)
    except jinja2.TemplateError as error:
        raise UserError("a Jinja template", first_line(error), "correct it",
                        where="chat template") from None
