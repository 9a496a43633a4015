"""`lmjax report WORKDIR`: one HTML page without external parts that shows what a run did.

It reads only files that the run wrote (see `monitoring/metrics.py`) and the manifest of the
prepared data. So it works while the run goes on, after the run was killed, and on another machine.
A section whose files are missing is left out.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.monitoring.goodput import ACTIVITIES, SLOW_FACTOR
from lmjax.monitoring.statistics import read_statistics
from lmjax.monitoring.units import human_count, human_seconds
from lmjax.reporting import page as html
from lmjax.reporting import task_report
from lmjax.reporting.forecast import forecast_card
from lmjax.reporting.model_card import write_card
from lmjax.reporting.run_files import Columns, RunRecord, last, median, read_run
from lmjax.reporting.summary import device_name, summarise

SAMPLED_STEPS = 6  # steps whose samples are shown
SAMPLES_PER_STEP = 4
SLOWEST_STEPS = 5  # slow steps that are listed
MAX_FACTS = 30  # facts of the data manifest that are listed


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes WORKDIR/report.html, and the model card README.md, from the other files there.

    The card is of the best step if its checkpoint is kept, and else of the newest.

    Returns:
      The path of the report.

    Raises:
      UserError: there is no such directory, it has no metrics, or one of its files is not readable.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError("the directory of a run", f"{workdir}, which is none",
                        "give the --workdir of lmjax train")
    run = read_run(workdir)
    sections = (_header, _tiles, forecast_card, _task, _curves, _statistics, _time, _samples, _data,
                _model, _config)
    body = "".join(section(run) for section in sections)
    path = workdir / "report.html"
    temporary = path.with_name("report.html.tmp")
    title = f"{workdir.resolve().name} \u00b7 lmjax"
    temporary.write_text(html.page(title, body), encoding="utf-8")
    temporary.replace(path)
    keeps = run.config.get("checkpoint", {}).get("keep_best")
    write_card(workdir, run, step=(run.best_step if keeps else 0) or None)
    return path


def _header(run: RunRecord) -> str:
    status, style = (f"at step {run.step:,}", " unfinished") if run.unfinished else ("finished", "")
    alert = ""
    if run.diverged_at is not None:
        status, style = "diverged", " bad"
        alert = (f'<p class="alert">The training loss is not finite at step {run.diverged_at:,}. '
                 "A lower peak learning rate, a longer warm-up or a tighter clip of the gradient "
                 "norm is the usual remedy.</p>")
    title, summary = html.escape(run.workdir.resolve().name), html.escape(summarise(run))
    return (f'<header><h1>{title}</h1><span class="status{style}">{status}</span>'
            f'<p class="summary">{summary}</p></header>\n{alert}')


def _tiles(run: RunRecord) -> str:
    heldout, timing = run.heldout, run.timing
    flops = human_count(median(timing, "model_flops_per_second")).replace("B", "G")
    figures = task_report.tiles(run) if task_report.is_task(run) else []
    figures += [
        (f"{last(heldout, 'bits_per_byte'):.3f}", f"held-out bits/byte{run.of}", "heldout"),
        (f"{last(heldout, 'loss'):.3f}", f"held-out nats/{run.unit}", "heldout"),
        (f"{last(run.train, 'loss'):.3f}", f"training nats/{run.unit}", "train"),
        (f"{run.best_step:,}" if run.best_step else "nan", "best step", "heldout"),
        (human_count(float(run.tokens(run.step))), f"{run.unit}s seen", ""),
        (human_count(run.facts.get("parameters", math.nan)), "parameters", ""),
        (human_count(median(timing, "tokens_per_second")), "tokens/s (median)", ""),
        (flops, "model FLOP/s", ""),
        (f"{median(timing, 'mfu'):.1%}".replace("nan%", "nan"), "MFU (median)", ""),
        (human_seconds(run.seconds) if run.seconds > 0 else "nan", "wall time", ""),
    ]
    tiles = "".join(html.tile(*figure) for figure in figures if figure[0] != "nan")
    return f'<div class="tiles">{tiles}</div>\n'


def _task(run: RunRecord) -> str:
    if not task_report.is_task(run):
        return ""
    return task_report.metric_curves(run) + task_report.answer_sections(run)


def _curves(run: RunRecord) -> str:
    # Imported late: matplotlib takes half a second, which a training run should not wait for.
    from lmjax.reporting.plots import Curve, Panel, draw

    def curve(name: str, columns: Columns, column: str, color: str,
              kind: str = "trend") -> list[Curve]:
        if column not in columns:
            return []
        return [Curve(name, run.tokens(columns["step"]), columns[column], color, kind)]

    along = f"{run.unit}s trained" + " on" * (run.unit != "token")
    restarts = [float(run.tokens(event["step"])) for event in run.events
                if event["event"] == "resume"]
    marks = [(float(run.tokens(step)), label)
             for step, label in ((run.diverged_at, "not finite"), (run.best_step, "best")) if step]
    cards = ""
    for title, column, unit in (("Loss", "loss", f"nats per {run.unit}"),
                                ("Bits per byte", "bits_per_byte", f"bits per byte{run.of}")):
        curves = curve("training", run.train, column, "train")
        for (group, columns), color in zip(run.evals.items(), ("heldout", "ema", "second"),
                                           strict=False):
            name = {"eval": "held-out", "eval_ema": "EMA"}.get(group, group)
            curves += curve(name, columns, column, color, "points")
        lines = [(str(b["name"]), float(b[column])) for b in run.baselines
                 if math.isfinite(float(b.get(column, math.nan)))]
        if curves:
            note = "Dashed: n-gram models of the same data. " if lines else ""
            note += "Dotted: the run was resumed." if restarts else ""
            panel = Panel(unit, curves, lines, last_values=True)
            picture = draw(f"{title} against {run.unit}s", [panel], restarts, marks, along)
            cards += html.card(title, picture, note)
    rate = curve("", run.train, "learning_rate", "train", "line")
    gradients = curve("", run.train, "grad_norm", "train")
    weights = curve("", run.train, "param_norm", "second", "line")
    speed = curve("", run.timing, "tokens_per_second", "train")
    wait = curve("", run.timing, "data_wait_share", "heldout")
    others = {
        "Learning rate": [Panel("", rate, from_zero=True)],
        "Gradients and weights": [Panel("gradient norm, before clipping", gradients, log=True),
                                  Panel("parameter norm", weights)],
        "Throughput": [Panel("tokens per second", speed, tick=human_count, from_zero=True),
                       Panel("share of step time spent waiting for data", wait,
                             tick=lambda share: f"{share:.0%}", from_zero=True, least_top=0.05)],
    }
    for title, panels in others.items():
        if panels := [panel for panel in panels if panel.curves]:
            picture = draw(f"{title} against {run.unit}s", panels, restarts, along=along)
            cards += html.card(title, picture)
    return cards


def _statistics(run: RunRecord) -> str:
    """Heat maps of the statistics by module and layer."""
    steps, arrays = read_statistics(run.workdir)
    if not len(steps):
        return ""
    from lmjax.reporting.heat_maps import draw_heat_map, heat_maps_of

    note = f"A row per layer, the first at the top; every {_every(steps):,} steps."
    return "".join(html.card(heat.title, draw_heat_map(heat, steps), note)
                   for heat in heat_maps_of(arrays))


def _every(steps: np.ndarray) -> int:
    return int(np.median(np.diff(steps, prepend=0)))


def _time(run: RunRecord) -> str:
    """The wall time over all starts, by activity, and the slowest of the slow steps."""
    total = sum(run.spent.values())
    if not total > 0:
        return ""
    body = html.bars([(ACTIVITIES[activity], seconds / total, human_seconds(seconds))
                      for activity, seconds in run.spent.items()])
    note = f"Of {human_seconds(total)} in all."
    slow = [event for event in run.events if event["event"] == "slow_step"]
    if slow:
        note += (f" {len(slow)} step{'s' if len(slow) > 1 else ''} took over {SLOW_FACTOR} times "
                 "the median of those before.")
        slowest = sorted(slow, key=_seconds, reverse=True)[:SLOWEST_STEPS]
        rows = [(_cause(event), f"{event['step']:,}", f"{_seconds(event):.2f}")
                for event in slowest]
        body += "<h3>The slowest steps, without their wait for data</h3>"
        body += html.table(("cause", "step", "seconds"), rows)
        note += " timing.jsonl has them all." if len(slow) > SLOWEST_STEPS else ""
    return html.card("Where the time went", body, note)


def _seconds(event: dict[str, Any]) -> float:
    """The seconds of an event; 0 if another version of lmjax wrote none."""
    return float(event.get("seconds") or 0)


def _cause(event: dict[str, Any]) -> str:
    """Which process made a step slow and what it was doing, as far as the event says so."""
    if event.get("process") is None:
        return ""
    host, doing = event.get("host"), event.get("doing")
    return (f"process {event['process']}" + (f" ({host})" if host else "")
            + (f" was {doing}" if doing else ""))


def _samples(run: RunRecord) -> str:
    """Samples of a few steps, evenly spaced, the first and the last among them."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    if not by_step:
        return ""
    steps = sorted(by_step)
    picked = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, SAMPLED_STEPS)})
    body = ""
    for step in reversed(picked):
        boxes = "".join(html.sample(str(sample.get("prompt", "")), str(sample.get("text", "")))
                        for sample in by_step[step][:SAMPLES_PER_STEP])
        tokens = human_count(float(run.tokens(step)))
        body += f"<h3><b>step {step:,}</b> \u00b7 {tokens} {run.unit}s</h3>"
        body += f'<div class="samples">{boxes}</div>'
    note = "Newest first; the prompt is marked."
    if len(steps) > len(picked):
        note += f" {len(picked)} of {len(steps)} steps; samples.jsonl has them all."
    return html.card("Samples as training went on", body, note, wide=True)


def _data(run: RunRecord) -> str:
    documents: list[list[str]] = []
    removed: list[list[str]] = []
    facts: list[list[str]] = []
    _walk(run.manifest, (), documents, removed, facts)
    body = ""
    if documents:
        head = ("source", "documents", "tokens", "bytes", "bytes/token")
        body += html.table(head, documents)
    if run.baselines:
        rows = [[b["name"], *(f"{b[key]:.3f}" if key in b else "" for key in ("loss",
                                                                              "bits_per_byte"))]
                for b in run.baselines]
        body += "<h3>Baselines on the held-out text</h3>"
        body += html.table(("model", "nats/token", f"bits/byte{run.of}"), rows)
    if removed:
        body += "<h3>Removed before training</h3>" + html.table((), removed)
    if facts:
        body += "<h3>How the data is stored</h3>" + html.table((), facts[:MAX_FACTS])
    return html.card("Data", body) if body else ""


def _walk(value: Any, path: tuple[str, ...], documents: list[list[str]],
          removed: list[list[str]], facts: list[list[str]]) -> None:
    """Sorts a manifest into counts of documents, counts of what was removed, and other facts."""
    name = " / ".join(part for part in path if part not in ("sources", "splits"))
    if isinstance(value, dict):
        if "documents" in value and "tokens" in value:
            tokens, size = value["tokens"], value.get("bytes", 0)
            documents.append([name, f"{value['documents']:,}", human_count(tokens),
                              human_count(size), f"{size / tokens:.2f}" if tokens else ""])
            value = {key: inner for key, inner in value.items()
                     if "removed" in key or key == "splits"}
        for key, inner in value.items():
            if key != "config":  # the page shows the whole config further down
                _walk(inner, (*path, str(key)), documents, removed, facts)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            label = str(inner.get("name", number)) if isinstance(inner, dict) else str(number)
            _walk(inner, (*path, label), documents, removed, facts)
    elif any("removed" in part for part in path):
        words = [part for part in path if part not in ("sources", "splits", "removed")]
        removed.append([" / ".join(words).replace("_", " "), _grouped(value)])
    elif "sha256" not in path and not isinstance(value, bool) and len(path) <= 2:
        facts.append([name.replace("_", " "), _grouped(value)[:60]])


def _grouped(value: Any) -> str:
    """A value as text; integers with a comma between thousands."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _model(run: RunRecord) -> str:
    facts = run.facts
    attention, mesh = facts.get("attention", {}), facts.get("mesh", {})
    chosen = [str(attention[key]) for key in ("kernel", "reason") if attention.get(key)]
    flops, epochs = facts.get("flops_per_token"), facts.get("epochs")
    rows = [
        ("parameters", _grouped(facts.get("parameters", ""))),
        ("of which embeddings", _grouped(facts.get("embedding_parameters", ""))),
        ("device", device_name(run)),
        ("mesh", ", ".join(f"{axis}={size}" for axis, size in mesh.items())),
        ("attention", " \u2014 ".join(chosen)),
        ("compute dtype", facts.get("compute_dtype", "")),
        *facts.get("flags", {}).items(),
        ("tokens per step", _grouped(facts.get("tokens_per_step", ""))),
        ("FLOPs per token", "" if flops is None else human_count(flops)),
        ("epochs planned", "" if epochs is None else f"{epochs:.2f}"),
        ("data fingerprint", facts.get("data", {}).get("fingerprint", "")),
        ("lmjax", facts.get("lmjax", "")),
        *((name, version) for name, version in facts.get("versions", {}).items()
          if name != "lmjax"),
    ]
    rows = [row for row in rows if row[1] not in ("", None)]
    return html.card("Model and machine", html.table((), rows)) if rows else ""


def _config(run: RunRecord) -> str:
    if not run.config:
        return ""
    text = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    details = f"<details><summary>Resolved config</summary><pre>{text}</pre></details>"
    return f'<section class="card wide">{details}</section>'
