"""Statistics by module and layer as heat maps over steps: one band per module, a row per layer."""

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lmjax.monitoring.units import human_count
from lmjax.reporting.fonts import quiet
from lmjax.reporting.plots import COLORS, STYLE, as_svg

MOST_COLUMNS = 300  # of a picture; neighbouring steps beyond it are joined by their largest value


class HeatMap(NamedTuple):
    """A heat map."""

    title: str
    unit: str  # of the values, as the colour bar says
    bands: Mapping[str, np.ndarray]  # label -> [steps, layers]
    log: bool = True  # colours by the logarithm; values that are not above 0 are blank


def draw_heat_map(heat: HeatMap, steps: np.ndarray) -> str:
    """Draws a heat map as one `<svg>` element; layer 0 is at the top of its band."""
    columns = _columns(len(steps))
    bands = {label: np.stack([_largest(values[part], heat.log) for part in columns], axis=1)
             for label, values in heat.bands.items()}  # [layers, columns]
    finite = np.concatenate([band[np.isfinite(band)] for band in bands.values()])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.1, 1.0)
    heights = [max(min(len(b), 24), 2.2) for b in bands.values()]
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": heat.title}):
        quiet()
        figure = Figure(figsize=(6.2, max(0.75 + 0.075 * sum(heights) + 0.04 * len(bands), 2.6)))
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(bands), 1, sharex=True, squeeze=False,
                               gridspec_kw={"height_ratios": heights, "hspace": 0.12})[:, 0]
        figure.subplots_adjust(left=0.25, right=0.86, top=0.985,
                               bottom=0.42 / figure.get_size_inches()[1])
        norm = (matplotlib.colors.LogNorm(low, high) if heat.log and high > low > 0 else
                matplotlib.colors.Normalize(low, high if high > low else low + 1))
        half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
        for ax, (label, values) in zip(axes, bands.items(), strict=True):
            image = ax.imshow(values, aspect="auto", norm=norm, cmap="viridis",
                              interpolation="nearest",
                              extent=(steps[0] - half, steps[-1] + half, len(values) - 0.5, -0.5))
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8,
                          color=COLORS["ink"])
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes[-1].set_xlabel("step")
        bar = figure.colorbar(image, cax=figure.add_axes((0.88, 0.25, 0.018, 0.62)),
                              format=FuncFormatter(lambda value, _: f"{value:.3g}"))
        bar.outline.set_visible(False)
        bar.ax.set_title(heat.unit, fontsize=7.5, color=COLORS["muted"], loc="left", pad=6)
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7.5)
        return as_svg(figure, heat.title)


def _columns(count: int) -> list[slice]:
    """The steps of each column."""
    columns = min(count, MOST_COLUMNS)
    ends = [round(i * count / columns) for i in range(columns + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _largest(values: np.ndarray, positive: bool) -> np.ndarray:
    """The largest finite value of each layer, [layers], above 0 if `positive`; NaN: none."""
    good = np.isfinite(values) & ((values > 0) | (not positive))
    kept = np.where(good, values, -math.inf).max(axis=0)
    return np.where(np.isfinite(kept), kept, np.nan)


def heat_maps_of(arrays: Mapping[str, np.ndarray]) -> list[HeatMap]:
    """The heat maps of what `monitoring.statistics.read_statistics` gave."""
    def of(kind: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(f"{kind}/"): x for name, x in arrays.items()
                if name.startswith(f"{kind}/")}

    weights, updates = of("weight"), of("update")
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = {name: x / weights[name] for name, x in updates.items() if name in weights}
    activations = of("activation")
    made = [
        HeatMap("Activations", "RMS", {
            _said(name): x for name, x in sorted(activations.items(), reverse=True)
            if not name.endswith("logit")}),
        HeatMap("Largest attention scores", "score", {
            _said(name): x for name, x in activations.items() if name.endswith("logit")},
            log=False),
        HeatMap("Gradients", "RMS", _by_module(of("gradient"))),
        HeatMap("Updates relative to weights", "RMS / RMS", _by_module(relative)),
        HeatMap("Weights", "RMS", _by_module(weights)),
        HeatMap("Experts", "load", {_said(name): x for name, x in of("experts").items()},
                log=False),
    ]
    return [heat for heat in made if heat.bands]


def _by_module(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bands by the short names of parameters."""
    return {name.replace("layers/block/", "").removesuffix("/kernel").removesuffix("/table"): x
            for name, x in arrays.items()}


def _said(name: str) -> str:
    names = {"state": "residual stream", "attention": "attention branch", "mlp": "MLP branch",
             "logit": "largest score", "most": "largest load", "dead": "share unused"}
    *side, last = name.split("/")
    return " ".join([*side, names.get(last, last)])
