"""The pictures of `lmjax scale`, as PNG or SVG files."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmjax.monitoring.units import human_count

if TYPE_CHECKING:
    from lmjax.scaling.coordinates import Line
    from lmjax.scaling.law import Fit, Observation
    from lmjax.scaling.transfer import Transfer

PANEL = (3.1, 2.7)  # inches


@contextlib.contextmanager
def panels(out: Path, rows: int, columns: int) -> Iterator[Any]:
    """Yields axes [rows, columns] in the style of reports, and writes them to `out`."""
    import matplotlib  # it takes half a second
    from matplotlib.figure import Figure

    from lmjax.reporting.fonts import save
    from lmjax.reporting.plots import STYLE

    with matplotlib.rc_context({**STYLE, "axes.titlelocation": "left", "axes.titlesize": 8.5}):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        save(figure, out)


def shades(count: int) -> list[Any]:
    """Colours from small to large."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.0, 0.88, count)]


def draw_coordinates(lines: Sequence["Line"], out: Path) -> None:
    """Draws the RMS of each judged quantity against size, one line per step of training."""
    from lmjax.scaling.coordinates import FLAT, judged

    columns = max(len(judged(line)) for line in lines)
    with panels(out, len(lines), columns) as axes:
        for row, line in zip(axes, lines, strict=True):
            for ax in row[len(judged(line)):]:
                ax.set_axis_off()
            for ax, name in zip(row, judged(line), strict=False):
                found = np.array(line.rms[name])
                for k, color in enumerate(shades(found.shape[1])):
                    if found[:, k].any():
                        ax.plot(line.sizes, found[:, k], color=color, marker="o", markersize=3,
                                label=f"step {k}")
                worst = line.deviation(name)
                ax.set_title(f"{name}\n{line.parametrization}: off by {worst:.0%}"
                             f"{'' if worst <= FLAT else ', not flat'}")
                ax.set_xlabel(line.along)
                ax.set(xscale="log", yscale="log")
                ax.set_xticks(line.sizes, [str(size) for size in line.sizes])
                ax.minorticks_off()
                every = np.ravel([np.ravel(one.rms[name]).tolist() for one in lines
                                  if one.along == line.along])  # one scale for all rows
                ax.set_ylim(every[every > 0].min() / 1.3, every.max() * 1.3)
                ax.set_yticks([y for k in range(-6, 7) for y in (10.0**k, 3 * 10.0**k)
                               if every[every > 0].min() / 1.3 < y < every.max() * 1.3])
                ax.yaxis.set_major_formatter(lambda y, _: f"{y:.2g}")
        axes[0][0].set_ylabel("RMS")
        axes[0][0].legend(fontsize=7)


def draw_transfers(transfers: Sequence["Transfer"], out: Path) -> None:
    """Draws loss against rate, a curve per size."""
    with panels(out, 1, len(transfers)) as [row]:
        for ax, transfer in zip(row, transfers, strict=True):
            for valley, color in zip(transfer.valleys, shades(len(transfer.valleys)), strict=True):
                size = (valley.size.embed_dim if transfer.along == "width"
                        else valley.size.num_layers)
                ax.plot(valley.rates, valley.losses, color=color, marker="o", markersize=3,
                        label=f"{transfer.along} {size}")
                if np.isfinite(valley.best):
                    ax.axvline(valley.best, color=color, linewidth=0.9, linestyle=(0, (2, 2)))
            ax.set_xscale("log")
            ax.minorticks_off()
            rates = transfer.valleys[0].rates
            shown = rates[:: max(1, len(rates) // 4)]
            ax.set_xticks(shown, [f"{rate:.1e}".replace("e-0", "e-") for rate in shown])
            ax.set_title(f"{transfer.parametrization}, along {transfer.along}")
            ax.set_xlabel("learning rate")
            ax.legend(fontsize=7)
        row[0].set_ylabel("held-out loss, nats per token")


def draw_law(runs: Sequence["Observation"], found: "Fit", out: Path) -> None:
    """Draws the law at equal FLOPs, loss against FLOPs, and the residuals of the fit."""
    law, flops = found.law, np.array([run.flops for run in runs])
    sizes = np.array([run.parameters for run in runs])
    with panels(out, 1, 3) as [[equal, along, rest]]:
        budgets = np.geomspace(flops.min(), flops.max(), 5)
        wide = np.geomspace(sizes.min() / 2, sizes.max() * 2, 60)
        for budget, color in zip(budgets, shades(len(budgets)), strict=True):
            equal.plot(wide, [law.loss(n, budget / 6 / n) for n in wide], color=color,
                       label=f"{budget:.1e} FLOPs")
        best = [law.best(budget) for budget in budgets]
        equal.plot([n for n, _ in best], [law.loss(*point) for point in best], color="black",
                   linewidth=0.9, linestyle=(0, (3, 2)), label="best size")
        losses = np.array([run.loss for run in runs])
        pad = 0.15 * (losses.max() - losses.min())
        equal.set_ylim(law.loss(*best[-1]) - pad, losses.max() + pad)
        equal.set(title="The fit: loss against size, at equal FLOPs", xlabel="N", xscale="log")
        for size, color in zip(unique := np.unique(sizes), shades(len(unique)), strict=True):
            own = sizes == size
            line = np.geomspace(flops[own].min(), flops[own].max(), 30)
            along.plot(line, [law.loss(size, c / 6 / size) for c in line], color=color)
            along.plot(flops[own], losses[own], "o", markersize=3, color=color,
                       label=f"N = {human_count(size)}")
            rest.plot(flops[own], 100 * np.array(found.residuals)[own], "o", markersize=3,
                      color=color)
        along.set(title="Loss against FLOPs: runs and fit", xlabel="FLOPs", xscale="log")
        rest.axhline(0, color="black", linewidth=0.9)
        rest.set(title="Residuals, % of the loss", xlabel="FLOPs", xscale="log")
        for ax in (equal, along):
            ax.legend(fontsize=6.5)
        for ax in (equal, along, rest):
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e+", "e"))
            ax.minorticks_off()
