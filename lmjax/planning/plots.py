"""The picture of a plan: where a chip's memory and a step's time go."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lmjax.planning.estimate import LEAST, Estimate, readable, size_unit, time_unit
from lmjax.reporting.plots import COLORS, STYLE

FILLS = {"parameters": COLORS["train"], "optimizer": "#56b4e9", "average": COLORS["ema"], "temporaries": "#e69f00",
         "rest": COLORS["muted"], "matmul": COLORS["train"], "attention": COLORS["second"], "grouped": COLORS["ema"],
         "other": "#e69f00", "exposed": COLORS["heldout"]}
LABELS = {"parameters": "parameters", "optimizer": "optimizer state", "average": "average of weights",
          "temporaries": "activations, gradients", "rest": "batch, padding, code", "matmul": "matmuls",
          "attention": "attention kernels", "grouped": "grouped matmuls", "other": "other compute",
          "exposed": "synchronous collectives"}


def draw(made: Estimate) -> str:
    """The picture as SVG text."""
    peak = made.memory["peak"]
    (size, of_size), (time, of_time) = size_unit(peak), time_unit(made.exposed)
    memory = {kind: made.memory[kind] / of_size for kind in ("parameters", "optimizer", "average", "temporaries")}
    memory["rest"] = peak / of_size - sum(memory.values())
    of = f"of {readable(made.limit)} " if made.limit else ""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lmjax"}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasSVG(figure)
        top, bottom = figure.subplots(2, 1)
        _bar(top, memory, f"{size} a chip", made.limit / of_size if peak > made.limit / 20 else 0.0)
        top.set_title(f"{made.topology}: memory, {readable(peak)} {of}at its peak", loc="left")
        _bar(bottom, {kind: s / of_time for kind, s in made.seconds.items()}, f"{time} a step", 0.0)
        bottom.axvline(made.hidden / of_time, color=COLORS["ink"], linestyle=":", label="hidden")
        hidden, exposed = (f"{seconds / of_time:.3f} {time}" for seconds in (made.hidden, made.exposed))
        what = (f"{hidden} with all else hidden behind matmuls and kernels, {exposed} with nothing hidden"
                if made.limit else f"at least {hidden} ({LEAST})")
        bottom.set_title(f"time of a step: {what}", loc="left")
        page = io.StringIO()
        figure.savefig(page, format="svg", facecolor="white", metadata={"Date": None})
    return page.getvalue()


def _bar(axes: matplotlib.axes.Axes, parts: dict[str, float], unit: str, limit: float) -> None:
    at = 0.0
    for kind, size in parts.items():
        if size > 0:
            axes.barh([0], [size], left=at, color=FILLS[kind], label=f"{LABELS[kind]} {size:.3g}")
            at += size
    if limit:
        axes.axvline(limit, color=COLORS["ink"], linestyle="--", label=f"limit {limit:.4g}")
    axes.set_yticks([])
    axes.set_xlim(0, max(at, limit) * 1.02 or 1)
    axes.set_xlabel(unit)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
