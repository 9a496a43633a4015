"""The rows of a run as text, with their documents: for `lmjax data show` and `lmjax replay`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.objectives import Objective
from lmjax.data.pipeline import Mixture
from lmjax.data.tokenizers import NamedIds, prepared_tokenizer
from lmjax.tasks.task import Task
from lmjax.training.recipe import Recipe

# The fields of a row to show, by architecture. A decoder's targets hold the whole text.
SHOWN = {
    "decoder": ("targets",),
    "encoder": ("tokens", "targets"),
    "encdec": ("encoder_tokens", "targets"),
}


class Document(NamedTuple):
    """A piece of a document in a row."""

    name: str
    first: int  # its first token in the document
    length: int  # its tokens
    texts: list[tuple[str, str]]  # (field of the batch, its text)


class RowText(NamedTuple):
    """A row of a run."""

    row: int  # its number in the run
    source: str
    epoch: int
    place: int  # the number of the packed row in its source
    documents: list[Document]


def row_texts(recipe: Recipe, split: Mixture, text: Callable[[np.ndarray], str],
              g: np.ndarray) -> list[RowText]:
    """Says what the rows numbered `g`, int64 [n], of a run are.

    Args:
      recipe, split: of the run.
      text: turns token ids into text, as `make_reader` does.
    """
    rows, task = split.rows(g), recipe.task
    shown = SHOWN[recipe.data.objective.architecture]
    shown = ("tokens", *shown) if recipe.data.objective.augment.share else shown
    if isinstance(task, Task):  # targets are ids of text only where the model writes
        shown = tuple(name for name in rows if name.endswith("tokens")
                      or task.writes and name == "targets")

    def texts_of(i: int, segment: int) -> list[tuple[str, str]]:
        sides = (field.removesuffix("tokens") if field.endswith("tokens") else ""
                 for field in shown)
        return [(field, text(rows[field][i][rows[f"{side}segment_ids"][i] == segment]))
                for field, side in zip(shown, sides, strict=True)]

    found = []
    for i, (row, source, epoch, place) in enumerate(zip(g, *split.locate(g), strict=True)):
        part = split.sources[source]
        documents = [Document(name, first, length, texts_of(i, segment))
                     for segment, (name, first, length) in enumerate(part.documents_at(place), 1)]
        found.append(RowText(int(row), part.name, int(epoch), int(place), documents))
    return found


def make_reader(config: DataConfig, directory: str) -> Callable[[np.ndarray], str]:
    """Makes the function that turns token ids [n] into text.

    Synthetic tokens become their numbers; the objective's ids become their names.
    """
    if config.synthetic:
        return lambda ids: " ".join(map(str, ids))
    tokenizer = prepared_tokenizer(directory)
    objective = Objective(config.objective, seq_len=config.seq_len,
                          vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)
    return NamedIds(tokenizer, objective.ids).decode
