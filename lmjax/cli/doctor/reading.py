"""What a model takes and gives, as the doctor tells it: ids, texts, answers, chats, memory."""

import contextlib
import io
from collections.abc import Sequence

import jax.numpy as jnp

from lmjax.cli.doctor.diagnosis import GOOD, NOTE, Diagnosis
from lmjax.data.chat import find_template
from lmjax.data.reading import Reader, check_told, make_reader
from lmjax.decoding.token_texts import labels
from lmjax.errors import UserError, first_line
from lmjax.models.model import ModelConfig, build_model
from lmjax.monitoring.units import human_bytes
from lmjax.training.pretrained import Pretrained, find
from lmjax.training.recipe import Recipe
from lmjax.tree import num_elements

FLOAT32 = 4  # bytes


def describe_reading(found: Diagnosis, path: str) -> Recipe | None:
    """Adds how the model at `path` reads and answers. Its weights are not read.

    Returns:
      Its recipe; None if there is no model.
    """
    models: list[Pretrained] = []

    def look() -> str:
        # What a load tells is among the findings already.
        with contextlib.redirect_stderr(io.StringIO()):
            models.append(find(path))
        return _input(models[0].recipe.model)

    if not found.check("input", look):
        return None
    model, config = models[0], models[0].recipe.model
    if model.tokenizer is not None:
        reader = make_reader(model.tokenizer, config.family, model.recipe.data, model.about,
                             rows=config.vocab_size)
        found.check("text", lambda: _text(reader, config))
        _note_rows(found, model.tokenizer.vocab_size, config.vocab_size)
        _note_answers(found, model)
    found.add(GOOD, "memory", _memory(config))
    return model.recipe


def _input(config: ModelConfig) -> str:
    rows = "rows of any length"
    if config.positions == "learned":
        rows = f"rows of at most {config.max_positions:,} tokens, its learned positions"
    return f"ids below {config.vocab_size:,}, {rows}; anything else is refused"


def _text(reader: Reader, config: ModelConfig) -> str:
    """How a text becomes ids, and what begins and ends an answer."""
    parts = [*_names(reader, reader.prefix), "the text", *_names(reader, reader.suffix)]
    told = f"read as {', '.join(parts)}"
    if config.head.outputs or config.family == "encoder":
        return told
    start = f"begins with {_names(reader, [reader.start_id])[0]} and "
    ends = " or ".join(_names(reader, reader.end_ids)) or "its length alone"
    told += f"; an answer {start * (config.family == 'encdec')}ends with {ends}"
    banned = f"; {len(reader.banned_ids)} ids are never drawn"
    return told + banned * bool(reader.banned_ids)


def _names(reader: Reader, ids: Sequence[int]) -> list[str]:
    tokenizer = reader.names.tokenizer
    special = {tokenizer.id_of(name): name for name in tokenizer.special_names.values()}
    return [special.get(i) or labels(reader.names, [i])[0] for i in ids]


def _note_rows(found: Diagnosis, tokens: int, rows: int) -> None:
    if tokens < rows:
        found.add(NOTE, "vocabulary", f"{rows - tokens:,} of the model's rows have no token; they "
                  "are never drawn")


def _note_answers(found: Diagnosis, model: Pretrained) -> None:
    """Says what the files ask of answers and lmjax does not follow, and whether it chats."""
    config, tokenizer = model.recipe.model, model.tokenizer
    assert tokenizer is not None
    if config.family == "encoder" or config.head.outputs:
        return
    try:
        check_told(model.about.get("huggingface", {"generation": {}, "settings": {}}))
    except UserError as error:
        found.add(NOTE, "answers", f"none are written: {first_line(error)}")
    if config.family == "decoder" and (template := find_template(tokenizer)):
        try:
            template.render([{"role": "user", "content": "Hello"}], prompt=True)
        except UserError as error:
            found.add(NOTE, "chat", f"the template does not take 'Hello': {first_line(error)}")
        else:
            found.add(GOOD, "chat", "its files have a chat template, for `lmjax chat`")


def _memory(config: ModelConfig) -> str:
    """What the model holds: of logits, only those of the positions that are asked for."""
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    told = f"{human_bytes(FLOAT32 * num_elements(model.shapes))} of parameters in float32"
    if config.head.outputs:
        return told
    return f"{told}; {FLOAT32 * config.vocab_size / 1024:,.1f} KiB per position with logits"
