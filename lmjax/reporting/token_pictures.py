"""Pictures of texts by token: attention weights as squares, and tokens coloured by their values."""

import math
import os
from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lmjax.reporting.fonts import any_script, save
from lmjax.reporting.plots import COLORS

WIDTH = 8.0  # inches
SIZE = 12.0  # of the tokens, in points
LINE = 0.36  # inches from one line of tokens to the next
MARGIN = 0.18  # inches
BREAK = "\u21b5"  # the label of a token that ends a line ends with it


def draw_attention(maps: np.ndarray, tokens: Sequence[str], out: str | os.PathLike, *,
                   layer: int = -1) -> None:
    """Draws one layer of a text's attention maps, [layers, H, T, S], with one square per head."""
    heads = maps[layer]
    columns = math.ceil(math.sqrt(len(heads)))
    rows = math.ceil(len(heads) / columns)
    size = max(2.2, 0.16 * len(tokens))
    with any_script(tokens, out) as label:
        names = [label(token) for token in tokens]
        figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
        for head, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).ravel()):
            axes.set_axis_off()
            if head < len(heads):
                axes.set_axis_on()
                axes.imshow(heads[head], cmap="Blues", vmin=0, vmax=1)
                axes.set_title(f"head {head}", fontsize=8)
                axes.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
                axes.set_yticks(range(len(names)), names, fontsize=5)
        save(figure, out)


def draw_tokens(tokens: Sequence[str], values: Sequence[float], out: str | os.PathLike, *,
                title: str, legend: tuple[str, str], marked: Sequence[int] = ()) -> None:
    """Draws a text with a coloured box for each token.

    Args:
      tokens: labels, in the order of the text.
      values: of each token: orange where it is above 0, blue below; nan: no colour.
      out: the picture's file (.png, .svg).
      title: what the values are.
      legend: what the lowest and the highest value mean.
      marked: the tokens that are underlined.
    """
    with any_script([*tokens, title, *legend], out) as label:
        figure = Figure(figsize=(WIDTH, 1.0))
        renderer = FigureCanvasAgg(figure).get_renderer()

        def width(text: str) -> float:
            """Inches that a text takes; at least one em for each wide character."""
            probe = figure.text(0, 0, text, fontsize=SIZE)
            inches = probe.get_window_extent(renderer).width / figure.dpi
            probe.remove()
            return max(inches, sum(_em(c) for c in text) * SIZE / 72)

        names = [label(token) for token in tokens]
        places, lines = _flow(tokens, [width(_visible(name)) for name in names])
        height = (lines + 2.2) * LINE + 2 * MARGIN
        figure.set_size_inches(WIDTH, height)
        axes = figure.add_axes((0, 0, 1, 1), frameon=False)
        axes.set(xlim=(0, WIDTH), ylim=(height, 0), xticks=[], yticks=[])
        most = float(np.nanmax(np.abs([*values, 0.0]))) or 1.0
        colors = colormaps["PuOr_r"], Normalize(-most, most)
        axes.text(MARGIN, MARGIN + LINE / 2, label(title), fontsize=SIZE - 1.5, va="center",
                  color=COLORS["ink"])
        for i, (name, value, (x, line, wide)) in enumerate(zip(names, values, places, strict=True)):
            y = MARGIN + (line + 1) * LINE
            _box(axes, (x, y, wide), _visible(name), value, colors, underlined=i in marked)
        ends = (-most if np.nanmin([*values, 0.0]) < 0 else 0.0), most
        _bar(axes, height - MARGIN - LINE / 2, (label(legend[0]), label(legend[1])), ends, colors)
        save(figure, out)


def _flow(tokens: Sequence[str],
          widths: Sequence[float]) -> tuple[list[tuple[float, int, float]], int]:
    """Lays tokens out in lines: (left, line, width) of each in inches, and the number of lines."""
    gap = SIZE / 72 / 8
    places, x, line = [], MARGIN, 0
    for token, wide in zip(tokens, widths, strict=True):
        wide = min(wide + 2 * gap, WIDTH - 2 * MARGIN)
        if x > MARGIN and x + wide > WIDTH - MARGIN:
            x, line = MARGIN, line + 1
        places.append((x, line, wide))
        x += wide + gap
        if token.endswith(BREAK):
            x, line = MARGIN, line + 1
    return places, (places[-1][1] + 1 if places else 0)


def _box(axes: Axes, place: tuple[float, float, float], name: str, value: float, colors: Any, *,
         underlined: bool) -> None:
    x, y, wide = place
    cmap, scale = colors
    color = (1.0, 1.0, 1.0, 1.0) if math.isnan(value) else cmap(scale(value))
    axes.fill_between([x, x + wide], y + 0.03, y + LINE - 0.03, color=color, linewidth=0)
    if underlined:
        axes.plot([x, x + wide], [y + LINE - 0.03] * 2, color=COLORS["ink"], linewidth=1.6,
                  solid_capstyle="butt")
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.55
    axes.text(x + wide / 2, y + LINE / 2, name, fontsize=SIZE, ha="center", va="center",
              color="white" if dark else COLORS["ink"])


def _bar(axes: Axes, y: float, legend: tuple[str, str], ends: tuple[float, float],
         colors: Any) -> None:
    """The scale of colours, with what its ends mean."""
    (cmap, scale), (least, most) = colors, ends
    left, right = WIDTH / 2 - 0.9, WIDTH / 2 + 0.9
    steps = np.linspace(least, most, 65)
    axes.imshow(cmap(scale(steps))[None], extent=(left, right, y + 0.06, y - 0.06), aspect="auto",
                interpolation="bilinear")
    axes.set(xlim=(0, WIDTH), ylim=axes.get_ylim())
    for x, side, text in ((left - 0.08, "right", f"{legend[0]}  {least:.2g}"),
                          (right + 0.08, "left", f"{most:.2g}  {legend[1]}")):
        axes.text(x, y, text, fontsize=SIZE - 3, ha=side, va="center", color=COLORS["muted"])


def _visible(name: str) -> str:
    """A label whose spaces show: a token of spaces alone has a box as wide as a letter."""
    return name if name.strip() else name.replace(" ", "\u2423")


def _em(character: str) -> float:
    """The least width of a character, in ems: 1 for Chinese, Japanese and Korean."""
    return 1.0 if east_asian_width(character) in "WF" else 0.0
