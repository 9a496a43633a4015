"""The part of a report that a task adds: its metric, its errors, and answers beside the truth."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lmjax.reporting import page as html
from lmjax.reporting.run_files import RunRecord, last

MOST_CLASSES = 20  # of a confusion matrix
NARROW = 6  # so many classes fit into half of the page's width
SHOWN = 12  # errors, and right answers, that are listed
MOST_TEXT = 600  # characters of an example that are shown
# What every evaluation has besides the metrics of a task.
COMMON = ("step", "loss", "perplexity", "bits_per_byte", "of_decoded_text", "tokens", "examples",
          "best_step")
SAID = ("text", "tags")  # what an answer says, where it has more than that
Line = dict[str, Any]  # of answers/eval.jsonl


def is_task(run: RunRecord) -> bool:
    """Whether the run fine-tunes a model for a task."""
    return bool(run.config.get("task", {}).get("name"))


def measures(run: RunRecord) -> list[str]:
    """The names of the task's metrics, in the order in which the run wrote them."""
    return [name for name in run.heldout if name not in COMMON]


def tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """(figure, label, colour) of each metric, on held-out and on test examples."""
    found = []
    for group, label, color in (("eval", "held-out", "heldout"), ("test", "test", "second")):
        columns = run.evals.get(group, {})
        for name in measures(run)[:2]:
            if math.isfinite(value := last(columns, name)):
                found.append((f"{value:.3f}", f"{label} {title(name)}", color))
    return found


def metric_curves(run: RunRecord) -> str:
    """The task's metrics as training went on."""
    from lmjax.reporting.plots import Curve, Panel, draw

    names, columns = measures(run), run.heldout
    if not names:
        return ""

    def curve(name: str, color: str) -> Curve:
        return Curve(title(name), run.tokens(columns["step"]), columns[name], color, "points")

    panels = [Panel(title(names[0]), [curve(names[0], "heldout")], last_values=True)]
    if others := names[1:]:
        panels.append(Panel("others", [curve(name, color) for name, color in zip(
            others, ("second", "train", "ema"), strict=False)], last_values=True))
    note = "On held-out examples." + f" The best step is {run.best_step:,}." * bool(run.best_step)
    return html.card("Metrics", draw("Metrics", panels, along=f"{run.unit}s trained on"), note)


def answer_sections(run: RunRecord) -> str:
    """The confusion matrix, the surest errors, and answers beside the truth."""
    file = run.workdir / "answers" / "eval.jsonl"
    text = file.read_text("utf-8") if file.exists() else ""
    lines: list[Line] = [json.loads(line) for line in text.split("\n") if line]
    if not lines:
        return ""
    body = ""
    if "label" in lines[0]["answer"]:
        body += _confusion([(line["truth"], line["answer"]["label"]) for line in lines])
        wrong = [line for line in lines if line["truth"] != line["answer"]["label"]]
        right = [line for line in lines if line["truth"] == line["answer"]["label"]]
        wrong.sort(key=lambda line: -line["answer"].get("confidence", 0))
        right.sort(key=lambda line: line["answer"].get("confidence", 0))
        note = f"{len(wrong):,} of {len(lines):,} held-out examples, the surest first."
        body += _examples("The surest errors", wrong, note)
        body += _examples("The least sure right answers", right, "")
    else:
        body += _examples("Answers beside the truth", lines,
                          f"The first of {len(lines):,} held-out examples.")
    return body


def title(name: str) -> str:
    """A metric's name for people."""
    known = {"f1": "F1", "f1_micro": "micro F1", "mse": "squared error", "bleu": "BLEU",
             "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
             "matthews": "Matthews"}
    return known.get(name, name.replace("_", " "))


def _confusion(pairs: Sequence[tuple[str, str]]) -> str:
    """A table of (right class, class that the model said); the colour is the share of the row."""
    counts = Counter(pairs)
    sizes = Counter(truth for truth, _ in pairs)
    missed = Counter(truth for truth, said in pairs if truth != said)
    names = sorted({name for pair in pairs for name in pair})
    note = "Rows: the right class. Columns: what the model said."
    if len(names) > MOST_CLASSES:
        names = sorted(sorted(names, key=lambda name: (-missed[name], name))[:MOST_CLASSES])
        note += f" The {MOST_CLASSES} classes with the most errors."

    def cell(truth: str, said: str) -> str:
        count = counts[truth, said]
        share = round(100 * count / max(sizes[truth], 1))
        color = "second" if truth == said else "heldout"
        style = f' style="background: color-mix(in srgb, var(--{color}) {share}%, transparent)"'
        return f'<td class="number"{style if count else ""}>{count or ""}</td>'

    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in names)
    rows = "".join(f"<tr><th>{html.escape(truth)}</th>"
                   + "".join(cell(truth, said) for said in names)
                   + f'<td class="number muted">{1 - missed[truth] / sizes[truth]:.0%}</td></tr>\n'
                   for truth in names if sizes[truth])
    wide = len(names) > NARROW
    table = (f'<div class="scroll"><table class="confusion{" many" * wide}"><thead><tr><th></th>'
             f'{head}<th class="number">right</th></tr></thead><tbody>\n{rows}</tbody></table>'
             "</div>")
    return html.card("Confusion matrix", table, note, wide=wide)


def _examples(name: str, lines: Sequence[Line], note: str) -> str:
    if not lines:
        return ""
    rows = [(_shown(line), _short(line["truth"]), *_answer(line["answer"]))
            for line in lines[:SHOWN]]
    head = ("example", "truth", "answer", "confidence")
    return html.card(name, html.table(head, rows, numbers_from=3), note, wide=True)


def _shown(line: Line) -> str:
    """The texts of an example, without the truth."""
    truth = _short(line["truth"])
    parts = [_short(value) for value in line["record"].values()]
    text = "\n".join(part for part in parts if part and part != truth)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} \u2026"


def _answer(answer: Line) -> tuple[str, str]:
    """(what the model said, how sure it was)."""
    sure = answer.get("confidence")
    rest = {key: value for key, value in answer.items() if key != "confidence"}
    said = next((rest[key] for key in SAID if key in rest), rest)
    text = _short(next(iter(rest.values())) if len(rest) == 1 else said)
    return text, f"{sure:.1%}" if isinstance(sure, float) else ""


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
