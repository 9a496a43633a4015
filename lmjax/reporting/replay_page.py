"""The page of `lmjax replay`: what happened in a step, where first, and in which text."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.reporting import page as html
from lmjax.runtime.files import write_whole

HEAD = ("row", "documents", "tokens", "loss", "gradient", "loss without", "gradient without",
        "update without")


@dataclasses.dataclass(frozen=True)
class RowShown:
    """A row of the step: its figures as text, and its documents."""

    cells: Sequence[str]  # of HEAD
    title: str
    documents: Sequence[tuple[str, str]]  # (what it is, its text)


@dataclasses.dataclass(frozen=True)
class ReplayPage:
    """What the page shows."""

    title: str
    status: str
    is_bad: bool  # whether the status is bad news
    story: Sequence[str]  # sentences, the most important first
    tiles: Sequence[tuple[str, str]]  # (value, label)
    figures: Sequence[Sequence[str]]  # (name, recorded, repeated) of the step
    losses: Sequence[tuple[int, float]]  # (row, loss) of all rows
    rows: Sequence[RowShown]  # the worst
    outputs: dict[str, float]  # root mean square of each module's output, in order
    output_gradients: dict[str, float]


def write_replay_page(out: str | os.PathLike, page: ReplayPage) -> None:
    """Writes the page into the file `out`."""
    status = f"status{' bad' if page.is_bad else ''}"
    body = (f'<header><h1>{html.escape(page.title)}</h1><span class="{status}">'
            f"{html.escape(page.status)}</span>")
    body += "".join(f'<p class="summary">{html.escape(line)}</p>' for line in page.story)
    body += "</header>\n"
    body += f'<div class="tiles">{"".join(html.tile(*tile) for tile in page.tiles)}</div>\n'
    body += _rows(page) + _losses(page) + _figures(page) + _modules(page)
    write_whole(Path(out), html.page(page.title, body))


def _rows(page: ReplayPage) -> str:
    if not page.rows:
        return ""
    note = ("The worst rows first. The gradient is the norm of the row's part of the step's "
            "gradient; the last three are what the step would have had without the row.")
    texts = ""
    for row in page.rows:
        boxes = "".join(f'<p class="note">{html.escape(what)}</p>{html.sample("", text)}'
                        for what, text in row.documents)
        texts += (f"<details><summary>{html.escape(row.title)}</summary>"
                  f'<div class="samples">{boxes}</div></details>')
    return (html.card("Rows", html.table(HEAD, [row.cells for row in page.rows], 2), note, True)
            + html.card("Their text", texts, wide=True))


def _losses(page: ReplayPage) -> str:
    from lmjax.reporting.plots import Curve, Panel, draw  # matplotlib takes half a second

    if not page.losses:
        return ""
    place, loss = np.arange(len(page.losses)), np.array([loss for _, loss in sorted(page.losses)])
    panel = Panel("nats per token", [Curve("", place, loss, "train", "points")])
    return html.card("The loss of every row", draw(
        "Loss against row", [panel], along="place of the row in the batch"))


def _figures(page: ReplayPage) -> str:
    table = html.table(("", "recorded", "repeated"), page.figures)
    return html.card("The figures of the step", table)


def _modules(page: ReplayPage) -> str:
    if not page.outputs:
        return ""
    rows = [(name, _number(value), _number(page.output_gradients.get(name, math.nan)))
            for name, value in page.outputs.items()]
    note = ("Root mean squares, in the order of the computation; the gradients are computed in "
            "the opposite order.")
    return html.card("The output of every module", html.table(
        ("module", "output", "its gradient"), rows), note, True)


def _number(value: Any) -> str:
    return f"{value:.4g}"
