"""The pictures of a report: matplotlib figures as SVG text inside an HTML page.

No pyplot and no global state. Text stays text, and colours become CSS variables (`--train`,
`--grid`, ...), so that the page decides the font and can be light or dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lmjax.monitoring.units import human_count
from lmjax.reporting.fonts import for_viewers, quiet

# From the palette of Okabe and Ito (2008), which every common kind of colour blindness tells apart.
COLORS = {
    "ink": "#26323f",
    "muted": "#67737f",
    "grid": "#e4e9ee",
    "train": "#0072b2",
    "heldout": "#d55e00",
    "second": "#009e73",
    "ema": "#aa4499",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": COLORS["ink"],
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": COLORS["grid"],
    "axes.labelcolor": COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "path.simplify": True,
}
MAX_POINTS = 400  # per curve: about one per pixel


@dataclass(frozen=True)
class Curve:
    """A curve of y [N] over x [N]."""

    name: str
    x: np.ndarray  # increasing
    y: np.ndarray  # may hold values that are not finite
    color: str  # a key of COLORS
    kind: str = "trend"  # a running mean over the scatter; "line": the values; "points": dots too


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    label: str
    curves: Sequence[Curve]
    baselines: Sequence[tuple[str, float]] = ()  # horizontal lines: (name, y)
    tick: Callable[[float], str] = field(default=lambda y: f"{y:.6g}")  # labels of the y axis
    log: bool = False  # a logarithmic y axis
    from_zero: bool = False  # the y axis begins at 0
    least_top: float = 0.0  # the y axis ends no lower
    last_values: bool = False  # write the curves' last values in the margin


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, ...]:
    """Summarises a curve by at most `most` groups of neighbouring points.

    Args:
      x, y: [N].

    Returns:
      Four arrays [min(N, most)]: the mean of x, and the mean, the least and the greatest of the
      finite y; nan where a group has no finite y.
    """
    chunks = min(len(x), most)
    if chunks == len(x):
        finite = np.where(np.isfinite(y), y, np.nan)
        return x, finite, finite, finite
    starts = np.arange(chunks) * len(x) // chunks
    counts = np.diff([*starts, len(x)])
    good = np.isfinite(y)
    kept = np.add.reduceat(good, starts, dtype=np.int64)

    def of(ufunc: np.ufunc, fill: float) -> np.ndarray:
        return np.where(kept > 0, ufunc.reduceat(np.where(good, y, fill), starts), np.nan)

    mean = of(np.add, 0.0) / np.maximum(kept, 1)
    low, high = of(np.minimum, np.inf), of(np.maximum, -np.inf)
    return np.add.reduceat(x, starts) / counts, mean, low, high


def smooth(y: np.ndarray, width: int) -> np.ndarray:
    """A centred running mean over `width` (odd) values, fewer at the ends; nan stays nan."""
    good, half = np.isfinite(y), width // 2
    positions = np.arange(len(y))
    reach = np.minimum(half, np.minimum(positions, len(y) - 1 - positions))
    low, high = positions - reach, positions + reach + 1
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(good, mean, np.nan)


def draw(title: str, panels: Sequence[Panel], restarts: Sequence[float] = (),
         marks: Sequence[tuple[float, str]] = (), along: str = "tokens trained") -> str:
    """Draws one panel, or two below one another, as one `<svg>` element.

    Args:
      title: what screen readers say; it also makes the ids in each picture unique.
      restarts: the x of each resumption of the run.
      marks: other events, as (x, label).
      along: what the x axis counts.
    """
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        quiet()
        heights = [2.35, 1.0][: len(panels)]
        figure = Figure(figsize=(6.2, 3.35))
        FigureCanvasSVG(figure)
        grid = {"height_ratios": heights, "hspace": 0.16}
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw=grid)[:, 0]
        margin = any(panel.baselines or panel.last_values for panel in panels)
        figure.subplots_adjust(left=0.1, right=0.845 if margin else 0.985, top=0.905, bottom=0.125)
        for ax, panel, ticks in zip(axes, panels, (6, 3), strict=False):
            _draw_panel(ax, panel, ticks)
            for x in restarts:
                ax.axvline(x, color=COLORS["muted"], linewidth=0.9, linestyle=(0, (1, 2)))
            for x, label in marks:
                ax.axvline(x, color=COLORS["heldout"], linewidth=1.2)
                _text(ax, x, 0.04, f" {label}", COLORS["heldout"],
                      transform=ax.get_xaxis_transform())
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes[-1].set_xlabel(along)
        axes[-1].set_xlim(*_x_limits(panels))
        return as_svg(figure, title)


def _x_limits(panels: Sequence[Panel]) -> tuple[float, float]:
    ends = [curve.x[-1] for panel in panels for curve in panel.curves if len(curve.x)]
    end = max([*ends, 1.0])
    return -0.012 * end, 1.012 * end


def _text(ax: Axes, x: float, y: float, text: str, color: str, **how: Any) -> None:
    ax.text(x, y, text, color=color, fontsize=7.8, va="center", **how)


def _draw_panel(ax: Axes, panel: Panel, ticks: int) -> None:
    seen = [value for _, value in panel.baselines]
    for curve in panel.curves:
        seen += _draw_curve(ax, curve)
    if not any(value > 0 for value in seen):  # as gradients are where no answer earns a reward
        panel = replace(panel, log=False)
    if panel.log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    low, high = _y_limits(panel, np.array(seen))
    ax.set_ylim(low, high)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.tick(value)))
    for _, value in panel.baselines:
        ax.axhline(value, color=COLORS["muted"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
    _draw_margin(ax, panel, low, high)
    ax.set_title(panel.label, loc="left", fontsize=8.5, color=COLORS["muted"], pad=5)
    shown = [curve for curve in panel.curves if curve.name and np.isfinite(curve.y).any()]
    if len(shown) > 1:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.985), ncols=len(shown),
                  borderaxespad=0, borderpad=0.2, columnspacing=1.2, fontsize=8)
    if not seen:
        ax.text(0.5, 0.5, "no finite values", color=COLORS["muted"], ha="center",
                transform=ax.transAxes)


def _draw_curve(ax: Axes, curve: Curve) -> list[float]:
    """Draws a curve; returns finite values that the y axis should include."""
    color = COLORS[curve.color]
    x, y, low, high = thin(curve.x, curve.y)
    # A lone point makes no line.
    few = np.isfinite(y).sum() <= (60 if curve.kind == "points" else 1)
    line = y
    if len(y) >= 60 and curve.kind == "trend":  # the trend, drawn over the pale scatter
        line = smooth(y, len(y) // 40 | 1)
        if len(x) < len(curve.x):
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        else:
            ax.plot(x, y, color=color, alpha=0.35, linewidth=0.8)
    order = 3 if curve.kind == "points" else 2.5
    ax.plot(x, line, color=color, label=curve.name, marker="o" if few else "", markersize=3.4,
            zorder=order)
    if not np.isfinite(y).any():
        return []
    # A lone spike may leave the picture.
    return [*line[np.isfinite(line)], *np.nanquantile(y, [0.002, 0.998])]


def _y_limits(panel: Panel, seen: np.ndarray) -> tuple[float, float]:
    seen = seen[seen > 0] if panel.log else seen
    if not len(seen):
        return 0.1, 1.0
    if panel.log:
        return float(seen.min()) / 1.25, float(seen.max()) * 1.25
    low, high = float(seen.min()), float(seen.max())
    if panel.baselines:
        # The steep start may leave the picture: readers compare the newest values to the baselines.
        newest = [curve.y[np.isfinite(curve.y)][-1:] for curve in panel.curves]
        values = [*(value for _, value in panel.baselines), *np.concatenate([*newest, [0.0]])]
        high = min(high, 1.12 * max(values))
    low = 0.0 if panel.from_zero else low
    high = max(high, panel.least_top)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low if panel.from_zero else low - pad, high + pad


def _draw_margin(ax: Axes, panel: Panel, low: float, high: float) -> None:
    """Writes the baselines and the curves' last values right of the axes, without overlaps."""
    labels = [(value, name, COLORS["muted"], "normal") for name, value in panel.baselines]
    for curve in panel.curves if panel.last_values else ():
        if curve.kind == "points" and np.isfinite(curve.y).any():
            value = float(curve.y[np.isfinite(curve.y)][-1])
            labels.append((value, curve.name, COLORS[curve.color], "bold"))
    labels.sort(key=lambda label: label[0])
    heights = [(value - low) / (high - low) for value, *_ in labels]
    gap = 0.068
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):  # move labels back down from above the top
        heights[i] = min(heights[i], 1.0 - gap * (len(heights) - 1 - i))
    for (value, name, color, weight), height in zip(labels, heights, strict=True):
        _text(ax, 1.015, height, f"{name[:12]} {value:.2f}", color, weight=weight,
              transform=ax.transAxes)


def as_svg(figure: Figure, title: str) -> str:
    """The figure's `<svg>` element, scaled by the page, with its fonts and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True,
                   metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)  # nothing refers to groups, whose ids repeat
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    # Outlines are rounded to hundredths of a point; tick labels, which are numbers too, are not.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = for_viewers(svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name}, {color})")
    escaped = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = f'<svg role="img" aria-label="{escaped}"'
    return re.sub(r"^<svg width=\"[^\"]*\" height=\"[^\"]*\"|^<svg", lambda _: head, svg, count=1)
