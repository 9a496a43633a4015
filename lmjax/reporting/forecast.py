"""The card of a report that compares a run with the forecast that was written before it."""

import json
import math

from lmjax.reporting import page as html
from lmjax.reporting.run_files import RunRecord, last

FILE = "forecast.json"  # in the directory of a run; `lmjax scale forecast` writes it


def forecast_card(run: RunRecord) -> str:
    """What was forecast, what was reached, and by how much they differ; "" without a forecast."""
    file = run.workdir / FILE
    if not file.exists():
        return ""
    said = json.loads(file.read_text(encoding="utf-8"))
    reached = last(run.heldout, "loss")
    rows = [["forecast", f"{said['loss']:.4f}", f"{said['low']:.4f} to {said['high']:.4f}"]]
    note = (f"Written on {said['date']} from {len(said['runs'])} runs, the largest of which had "
            f"1/{said['times_the_largest']:.3g} of this run's FLOPs. The interval is meant to hold "
            f"{said['confidence']:.0%} of the time.")
    if run.unfinished or not math.isfinite(reached):
        note += " The run is not finished: nothing is compared yet."
    else:
        inside = said["low"] <= reached <= said["high"]
        rows.append(["reached", f"{reached:.4f}", f"{reached / said['loss'] - 1:+.2%}, "
                     f"{'inside' if inside else 'outside'} the interval"])
    tokens = float(run.step * run.facts["tokens_per_step"])
    if not run.unfinished and abs(tokens / said["tokens"] - 1) > 0.01:
        note += (f" The forecast was for {said['tokens']:,} tokens, and the run had {tokens:,.0f}: "
                 "they do not compare.")
    return html.card("Forecast", html.table(["", "held-out loss", ""], rows, numbers_from=1), note)
