"""The picture of a plan: where a chip's memory and a step's time go."""

import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lmjax.monitoring.units import human_bytes, size_unit, time_unit
from lmjax.planning.estimate import LEAST, Estimate
from lmjax.reporting.fonts import for_viewers
from lmjax.reporting.plots import COLORS, STYLE

PARTS = {  # of a bar, by kind: (label, colour)
    "frozen": ("frozen parameters", "#999999"),
    "parameters": ("parameters", COLORS["train"]),
    "teacher": ("teacher", COLORS["second"]),
    "optimizer": ("optimizer state", "#56b4e9"),
    "average": ("average of weights", COLORS["ema"]),
    "temporaries": ("activations, gradients", "#e69f00"),
    "rest": ("batch, padding, code", COLORS["muted"]),
    "matmul": ("matmuls", COLORS["train"]),
    "attention": ("attention kernels", COLORS["second"]),
    "grouped": ("grouped matmuls", COLORS["ema"]),
    "other": ("other compute", "#e69f00"),
    "exposed": ("synchronous collectives", COLORS["heldout"]),
}


def draw(estimate: Estimate) -> str:
    """The picture as SVG text: a bar of the memory at its peak and a bar of the step's time."""
    peak, limit = estimate.memory["peak"], estimate.limit
    (size, of_size), (time, of_time) = size_unit(peak), time_unit(estimate.exposed)
    memory = {kind: estimate.memory[kind] / of_size
              for kind in ("frozen", "teacher", "parameters", "optimizer", "average",
                           "temporaries")}
    memory["rest"] = peak / of_size - sum(memory.values())
    seconds = {kind: s / of_time for kind, s in estimate.seconds.items()}
    hidden, exposed = (f"{s / of_time:.3f} {time}" for s in (estimate.hidden, estimate.exposed))
    of = f"of {human_bytes(limit)} " if limit else ""
    duration = (f"{hidden} with all else hidden behind matmuls and kernels, "
                f"{exposed} with nothing hidden" if limit else f"at least {hidden} ({LEAST})")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "lmjax"}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasSVG(figure)
        top, bottom = figure.subplots(2, 1)
        _bar(top, memory, f"{size} per device", limit / of_size if peak > limit / 20 else 0.0)
        top.set_title(f"{estimate.topology}: memory, {human_bytes(peak)} {of}at its peak",
                      loc="left")
        _bar(bottom, seconds, f"{time} per step", 0.0)
        bottom.axvline(estimate.hidden / of_time, color=COLORS["ink"], linestyle=":",
                       label="hidden")
        bottom.set_title(f"time of a step: {duration}", loc="left")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
    return for_viewers(svg.getvalue())


def _bar(axes: Axes, parts: dict[str, float], unit: str, limit: float) -> None:
    """One horizontal bar of `parts` (kind -> size), and a line at `limit` unless it is 0."""
    end = 0.0
    for kind, size in parts.items():
        if size > 0:
            label, color = PARTS[kind]
            axes.barh([0], [size], left=end, color=color, label=f"{label} {size:.3g}")
            end += size
    if limit:
        axes.axvline(limit, color=COLORS["ink"], linestyle="--", label=f"limit {limit:.4g}")
    axes.set_yticks([])
    axes.set_xlim(0, max(end, limit) * 1.02 or 1)
    axes.set_xlabel(unit)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
