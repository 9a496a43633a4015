"""The picture of a plan: where a chip's memory and a step's time go."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lmjax.chips import GIB
from lmjax.plan_estimate import Estimate
from lmjax.report_plots import COLORS, STYLE

FILLS = {"parameters": COLORS["train"], "optimizer": "#56b4e9", "average": COLORS["ema"], "temporaries": "#e69f00",
         "rest": COLORS["muted"], "matmul": COLORS["train"], "attention": COLORS["second"], "grouped": COLORS["ema"],
         "other": "#e69f00", "exposed": COLORS["heldout"]}
LABELS = {"parameters": "parameters", "optimizer": "optimizer state", "average": "average of weights",
          "temporaries": "activations, gradients", "rest": "batch, padding, code", "matmul": "matmuls",
          "attention": "attention kernels", "grouped": "grouped matmuls", "other": "other compute",
          "exposed": "synchronous collectives"}


def draw(made: Estimate) -> str:
    """The picture as SVG text."""
    memory = {kind: made.memory[kind] / GIB for kind in ("parameters", "optimizer", "average", "temporaries")}
    memory["rest"] = made.memory["peak"] / GIB - sum(memory.values())
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lmjax"}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasSVG(figure)
        top, bottom = figure.subplots(2, 1)
        _bar(top, memory, "GiB a chip", made.limit / GIB)
        top.set_title(f"{made.topology}: memory, {made.memory['peak'] / GIB:.1f} GiB at its peak", loc="left")
        _bar(bottom, made.seconds, "seconds a step", 0.0)
        bottom.axvline(made.hidden, color=COLORS["ink"], linestyle=":", label="hidden")
        bottom.set_title(f"time of a step: {made.hidden:.3f} s with all else hidden behind matmuls and kernels, "
                         f"{made.exposed:.3f} s with nothing hidden", loc="left")
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
