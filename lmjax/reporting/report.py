"""`lmjax report WORKDIR`: one self-contained HTML page that shows what a run did.

It reads only the files that the run wrote (see `lmjax/metrics.py` and the prepared data's manifest), so it
works while the run goes on, after it was killed, and on another machine. What is missing is left out.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.monitoring.goodput import ACTIVITIES, SLOW_FACTOR
from lmjax.monitoring.units import human_count, human_seconds
from lmjax.reporting import page as html
from lmjax.reporting.run_files import Columns, Run, last, median, read_run
from lmjax.runtime.files import write_whole


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes WORKDIR/report.html, in one rename, from the other files there; returns its path.

    Raises:
      ValueError: there is no such directory, no metrics in it, or one of its files cannot be read.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(
            f"expected the directory of a run, got {workdir}, which is none; "
            "give the --workdir of lmjax train"
        )
    run = read_run(workdir)
    path = workdir / "report.html"
    write_whole(path, html.page(f"{workdir.resolve().name} \u00b7 lmjax", _body(run)))
    return path


# Words ---------------------------------------------------------------------------------------------------


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _sources(run: Run) -> list[str]:
    sources = run.config.get("data", {}).get("sources", [])
    names = [source.get("uri") or source.get("name") for source in sources if isinstance(source, dict)]
    return [str(name) for name in names if name]


def _device(run: Run) -> str:
    device = run.facts.get("device", {})
    if not device:
        return ""
    platform, kind, count = device.get("platform", "?"), device.get("kind", ""), device.get("count", 1)
    name = kind if kind and kind.lower() != platform.lower() else platform.upper()
    return f"{count} {platform.upper()} device{'s' if count != 1 else ''}" + (
        f" ({name})" if name.lower() != platform.lower() else ""
    )


def _summary(run: Run) -> str:
    model, facts = run.config.get("model", {}), run.facts
    size = f"{human_count(facts['parameters'])}-parameter " if "parameters" in facts else ""
    shape = [
        f"{model[key]} {word}"
        for key, word in (("num_layers", "layers"), ("embed_dim", "wide"))
        if key in model
    ]
    what = f"A {size}language model" + (f" ({', '.join(shape)})" if shape else "")
    tokens = float(run.tokens(run.step))
    epochs = last(run.train, "epoch")
    seen = f"{human_count(tokens)} tokens" + (f" ({epochs:.2f} epochs)" if epochs > 0 else "")
    sources = _sources(run)
    on = f" of {_join(sources)}" if sources else ""
    done = f"{run.step:,} of {facts['steps']:,} steps so far" if run.unfinished else f"{run.step:,} steps"
    text = f"{what} trained for {done} on {seen}{on}. {_reached(run)}{_compared(run)}"
    seconds, device = run.seconds, _device(run)
    if seconds > 0:
        resumed = sum(name == "resume" for name, _, _ in run.events)
        text += f"It took {human_seconds(seconds)}" + (f" on {device}" if device else "")
        text += f", resumed {'once' if resumed == 1 else f'{resumed} times'}." if resumed else "."
    elif device:
        text += f"It ran on {device}."
    return text


def _reached(run: Run) -> str:
    loss, bits = last(run.heldout, "loss"), last(run.heldout, "bits_per_byte")
    if math.isnan(loss):
        loss = last(run.train, "loss")
        return "" if math.isnan(loss) else f"Its training loss is {loss:.3f} nats per token. "
    each = f"{bits:.3f} bits per byte, " if math.isfinite(bits) else ""
    return f"On held-out text it reaches {each}a loss of {loss:.3f} nats per token. "


def _compared(run: Run) -> str:
    """How the newest held-out loss stands to the n-gram baselines, which predict the same tokens."""
    loss = last(run.heldout, "loss")
    if run.config.get("data", {}).get("objective", {}).get("name", "causal_lm") != "causal_lm":
        return ""  # other tokens are predicted, or from both sides
    known = [(b["name"], b["loss"]) for b in run.baselines if math.isfinite(b.get("loss", math.nan))]
    if math.isnan(loss) or not known:
        return ""
    beaten = [(name, value) for name, value in known if loss < value]
    ahead = [f"{name} ({value:.2f})" for name, value in known if loss >= value]
    if not beaten:
        return f"That is not yet below a baseline of the same data: {_join(ahead)}. "
    name, best = min(beaten, key=lambda item: item[1])
    text = f"That is {1 - loss / best:.0%} less than the {name} baseline's {best:.2f}"
    rest = [f"{name} ({value:.2f})" for name, value in beaten if value != best]
    text += f", and below {_join(rest)} as well" if rest else ""
    return text + (f", but not yet below {_join(ahead)}. " if ahead else ". ")


# The page ------------------------------------------------------------------------------------------------


def _body(run: Run) -> str:
    return "".join(
        [
            _header(run),
            _tiles(run),
            _pictures(run),
            _time(run),
            _samples(run),
            _data(run),
            _model(run),
            _config(run),
        ]
    )


def _header(run: Run) -> str:
    name, state = ("finished", "") if not run.unfinished else (f"at step {run.step:,}", " unfinished")
    alert = ""
    if run.diverged_at is not None:
        name, state = "diverged", " bad"
        alert = (
            f'<p class="alert">The training loss is not finite at step {run.diverged_at:,}. A lower peak '
            "learning rate, a longer warm-up or a tighter clip of the gradient norm is the usual remedy.</p>"
        )
    title = html.escape(run.workdir.resolve().name)
    return (
        f'<header><h1>{title}</h1><span class="status{state}">{name}</span>'
        f'<p class="summary">{html.escape(_summary(run))}</p></header>\n{alert}'
    )


def _tiles(run: Run) -> str:
    heldout, seconds = run.heldout, run.seconds
    flops = median(run.timing, "model_flops_per_second")
    figures = [
        (f"{last(heldout, 'bits_per_byte'):.3f}", "held-out bits/byte", "heldout"),
        (f"{last(heldout, 'loss'):.3f}", "held-out nats/token", "heldout"),
        (f"{last(run.train, 'loss'):.3f}", "training nats/token", "train"),
        (human_count(float(run.tokens(run.step))), "tokens seen", ""),
        (human_count(run.facts.get("parameters", math.nan)), "parameters", ""),
        (human_count(median(run.timing, "tokens_per_second")), "tokens/s (median)", ""),
        (human_count(flops).replace("B", "G"), "model FLOP/s", ""),
        (f"{median(run.timing, 'mfu'):.1%}".replace("nan%", "nan"), "MFU (median)", ""),
        (human_seconds(seconds) if seconds > 0 else "nan", "wall time", ""),
    ]
    tiles = "".join(html.tile(*figure) for figure in figures if figure[0] != "nan")
    return f'<div class="tiles">{tiles}</div>\n'


def _pictures(run: Run) -> str:
    # Imported here because matplotlib takes half a second, which a training run need not wait for.
    from lmjax.reporting.plots import Curve, Panel, draw

    def curve(name: str, columns: Columns, column: str, color: str, kind: str = "trend") -> list[Curve]:
        if column not in columns:
            return []
        return [Curve(name, run.tokens(columns["step"]), columns[column], color, kind)]

    restarts = [float(run.tokens(step)) for name, step, _ in run.events if name == "resume"]
    marks = [] if run.diverged_at is None else [(float(run.tokens(run.diverged_at)), "not finite")]
    cards = ""
    for title, column, unit in (
        ("Loss", "loss", "nats per token"),
        ("Bits per byte", "bits_per_byte", "bits per byte"),
    ):
        curves = curve("training", run.train, column, "train")
        for (group, columns), color in zip(run.evals.items(), ("heldout", "ema", "second"), strict=False):
            name = "held-out" if group == "eval" else group.removeprefix("eval_").upper()
            curves += curve(name, columns, column, color, "points")
        lines = [(str(b["name"]), float(b[column])) for b in run.baselines if column in b]
        lines = [(name, value) for name, value in lines if math.isfinite(value)]
        if curves:
            note = "Dashed: n-gram models of the same data. " if lines else ""
            note += "Dotted: the run was resumed." if restarts else ""
            panel = Panel(unit, curves, lines, last_values=True)
            cards += html.card(title, draw(f"{title} against tokens", [panel], restarts, marks), note)
    rate = curve("", run.train, "learning_rate", "train", "line")
    gradients = curve("", run.train, "grad_norm", "train")
    weights = curve("", run.train, "param_norm", "second", "line")
    speed = curve("", run.timing, "tokens_per_second", "train")
    wait = curve("", run.timing, "data_wait_share", "heldout")
    share = "share of step time spent waiting for data"
    plain = {
        "Learning rate": [Panel("", rate, from_zero=True)],
        "Gradients and weights": [
            Panel("gradient norm, before clipping", gradients, log=True),
            Panel("parameter norm", weights),
        ],
        "Throughput": [
            Panel("tokens per second", speed, tick=human_count, from_zero=True),
            Panel(share, wait, tick=lambda value: f"{value:.0%}", from_zero=True, least_top=0.05),
        ],
    }
    for title, panels in plain.items():
        if panels := [panel for panel in panels if panel.curves]:
            cards += html.card(title, draw(f"{title} against tokens", panels, restarts))
    return cards


def _samples(run: Run, steps_shown: int = 6, each: int = 4) -> str:
    """Samples of a few steps, evenly spaced, the first and the last among them."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    if not by_step:
        return ""
    steps = sorted(by_step)
    picked = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, steps_shown)})
    body = ""
    for step in reversed(picked):
        boxes = "".join(
            html.sample(str(s.get("prompt", "")), str(s.get("text", ""))) for s in by_step[step][:each]
        )
        body += f"<h3><b>step {step:,}</b> \u00b7 {human_count(float(run.tokens(step)))} tokens</h3>"
        body += f'<div class="samples">{boxes}</div>'
    note = "Newest first; the prompt is marked."
    if len(steps) > len(picked):
        note += f" {len(picked)} of {len(steps)} steps; samples.jsonl has them all."
    return html.card("Samples as training went on", body, note, wide=True)


def _time(run: Run) -> str:
    """Where the wall time went over all starts, as the ledger has it."""
    total = sum(run.spent.values())
    if not total > 0:
        return ""
    parts = [(ACTIVITIES[activity], seconds / total, human_seconds(seconds))
             for activity, seconds in run.spent.items()]
    slow = sum(name == "slow_step" for name, _, _ in run.events)
    note = f"Of {human_seconds(total)} in all."
    if slow:
        steps = "step" if slow == 1 else "steps"
        note += f" {slow} {steps} took over {SLOW_FACTOR} times the median of those before."
    return html.card("Where the time went", html.bars(parts), note)


def _data(run: Run) -> str:
    rows: list[list[str]] = []
    removed: list[list[str]] = []
    facts: list[list[str]] = []
    _walk(run.manifest, (), rows, removed, facts)
    body = ""
    if rows:
        body += html.table(("source", "documents", "tokens", "bytes", "bytes/token"), rows)
    if run.baselines:
        lines = [
            [b["name"], *(f"{b[key]:.3f}" if key in b else "" for key in ("loss", "bits_per_byte"))]
            for b in run.baselines
        ]
        body += "<h3>Baselines on the held-out text</h3>"
        body += html.table(("model", "nats/token", "bits/byte"), lines)
    if removed:
        body += "<h3>Removed before training</h3>" + html.table((), removed)
    if facts:
        body += "<h3>Facts</h3>" + html.table((), facts[:30])
    return html.card("Data", body) if body else ""


def _walk(value: Any, path: tuple[str, ...], rows: list, removed: list, facts: list) -> None:
    """Sorts what a manifest holds into rows of documents, counts of what was removed, and other facts."""
    name = " / ".join(part for part in path if part not in ("sources", "splits"))
    if isinstance(value, dict):
        if "documents" in value and "tokens" in value:
            tokens, size = value["tokens"], value.get("bytes", 0)
            ratio = f"{size / tokens:.2f}" if tokens else ""
            rows.append([name, f"{value['documents']:,}", human_count(tokens), human_count(size), ratio])
            value = {key: inner for key, inner in value.items() if "removed" in key or key == "splits"}
        for key, inner in value.items():
            if key == "config":
                continue  # shown whole further down
            _walk(inner, (*path, str(key)), rows, removed, facts)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            label = str(inner.get("name", number)) if isinstance(inner, dict) else str(number)
            _walk(inner, (*path, label), rows, removed, facts)
    elif any("removed" in part for part in path):
        words = [part for part in path if part not in ("sources", "splits", "removed")]
        removed.append(
            [" / ".join(words).replace("_", " "), f"{value:,}" if isinstance(value, int) else value]
        )
    elif "sha256" not in path and not isinstance(value, bool) and len(path) <= 2:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        facts.append([name.replace("_", " "), text[:60]])


def _model(run: Run) -> str:
    facts = run.facts
    attention, mesh = facts.get("attention", {}), facts.get("mesh", {})
    rows = [
        ["parameters", f"{facts['parameters']:,}" if "parameters" in facts else ""],
        [
            "of which embeddings",
            f"{facts['embedding_parameters']:,}" if "embedding_parameters" in facts else "",
        ],
        ["device", _device(run)],
        ["mesh", ", ".join(f"{axis}={size}" for axis, size in mesh.items())],
        [
            "attention",
            " \u2014 ".join(str(attention[key]) for key in ("kernel", "reason") if attention.get(key)),
        ],
        ["compute dtype", facts.get("compute_dtype", "")],
        *([name, value] for name, value in facts.get("flags", {}).items()),
        ["tokens per step", f"{facts['tokens_per_step']:,}" if "tokens_per_step" in facts else ""],
        ["FLOPs per token", human_count(facts["flops_per_token"]) if "flops_per_token" in facts else ""],
        ["epochs planned", f"{facts['epochs']:.2f}" if "epochs" in facts else ""],
        ["data fingerprint", facts.get("data", {}).get("fingerprint", "")],
        ["lmjax", facts.get("lmjax", "")],
        *([name, version] for name, version in facts.get("versions", {}).items() if name != "lmjax"),
    ]
    rows = [row for row in rows if row[1] not in ("", None)]
    return html.card("Model and machine", html.table((), rows)) if rows else ""


def _config(run: Run) -> str:
    if not run.config:
        return ""
    text = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    details = f"<details><summary>Resolved config</summary><pre>{text}</pre></details>"
    return f'<section class="card wide">{details}</section>'
