"""Pairs of texts: translation, summarisation, labels as text, questions with free answers.

An encoder-decoder reads the input with its encoder and writes the target. A decoder reads the
input, a separator and the target in one row; only the target counts in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.tasks.reading import read_text
from lmjax.tasks.task import Encoded, Facts, Record, Sizes
from lmjax.tasks.templates import check_template, fill
from lmjax.tasks.writing import WritingTask, prompt_and_target, prompt_ids, target_end


@dataclass(frozen=True)
class Pairs(WritingTask):
    """Which text belongs to which."""

    name: str = "pairs"
    input: str = ""  # what is read, with columns in braces: "question: {q} context: {c}"
    target: str = ""  # what is written: "{answer}"
    separator: str = "\n"  # between the two, in a decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.input, "input")
        check_template(self.target, "target")

    @property
    def templates(self) -> dict[str, str]:
        return {"input": self.input, "target": self.target}

    def decides(self) -> dict[str, Any]:
        return super().decides() | {"max_tokens": self.max_tokens}  # a decoder's prompts leave room

    def texts(self, record: Record) -> list[str]:
        return [fill(self.input, record), fill(self.target, record)]

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        given = fill(self.input, record)
        target = reader.names.encode(self.truth(record)) if labelled else []
        if reader.causal:
            before = prompt_ids(reader, given, self.separator, self.room(sizes))
            return prompt_and_target(reader, before, target, sizes, self.target_len)
        read = read_text(reader, given, sizes.encoder)
        kept = target[: (self.target_len or sizes.tokens) - 1]
        columns = {"tokens": np.array([reader.start_id, *kept], np.int32),
                   "targets": np.array([*kept, target_end(reader)], np.int32),
                   "loss_mask": np.ones(len(kept) + 1, np.int32),
                   "encoder_tokens": read.ids}
        return Encoded(columns, read.cut, cut_target=len(target) - len(kept))

    def prompt(self, record: Record, reader: Reader, sizes: Sizes) -> list[int]:
        given, room = fill(self.input, record), self.room(sizes)
        if not reader.causal:
            return read_text(reader, given, room).ids.tolist()
        return prompt_ids(reader, given, self.separator, room)[0]

    def truth(self, record: Record) -> Any:
        target = fill(self.target, record).strip()
        if not target:
            raise UserError(f"a target in {self.target!r}", "an empty one",
                            "correct the record or the template")
        return target
