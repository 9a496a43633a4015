"""What a repeated step has to tell: what happened, where first, and in which text."""

import math
from collections.abc import Sequence

import numpy as np

from lmjax.reporting.replay_page import ReplayPage, RowShown
from lmjax.training.forensics import Modules, Row, Rows, modules_of, rows_of
from lmjax.training.replay import Repeated
from lmjax.training.row_texts import make_reader, row_texts

NAMED = 8  # items in a sentence


def look(found: Repeated, most: int, also: Sequence[int] = (), *, watch: bool) -> ReplayPage:
    """Looks into a repeated step.

    Args:
      most, also: as for `rows_of`.
      watch: whether modules are watched in a step that is finite, too.
    """
    finite = all(math.isfinite(found.metrics[name]) for name in ("loss", "grad_norm"))
    rows = rows_of(found, most, also)
    modules = modules_of(found) if watch or not finite else None
    step = found.metrics
    return ReplayPage(
        f"Step {found.step:,} of {found.run.workdir.resolve().name}", _status(found),
        bool(found.differences) or not finite, _story(found, rows, modules),
        [(f"{step['loss']:.6g}", "loss"), (f"{step['grad_norm']:.6g}", "gradient norm"),
         (f"{rows.step['update_norm']:.6g}", "norm of the update"),
         (f"{len(found.rows):,}", "rows"), (f"{found.start:,}", "repeated from step")],
        [(name, repr(found.recorded[name]) if name in found.recorded else "", repr(value))
         for name, value in step.items()],
        [(row.row, row.loss) for row in rows.rows], _shown(found, rows),
        modules.outputs if modules else {}, modules.output_gradients if modules else {})


def _shown(found: Repeated, rows: Rows) -> list[RowShown]:
    """The rows with figures of their own gradients, with their documents and texts."""
    shown, run = [], found.run
    listed = [row for row in rows.rows if row.without is not None]
    directory = run.recipe.data.directory or str(run.workdir.absolute() / "data")
    texts = row_texts(run.recipe, run.train_split, make_reader(run.recipe.data, directory),
                      np.array([row.row for row in listed], np.int64)) if listed else []
    for row, text in zip(listed, texts, strict=True):
        without = row.without or {}
        names = " ".join(f"{d.name}[{d.first}:{d.first + d.length}]" for d in text.documents)
        cells = [f"{row.row:,}", f"{text.source}: {names}", f"{row.tokens:g}",
                 *(f"{value:.6g}" for value in (
                     row.loss, row.grad_norm, without.get("loss", math.nan),
                     without.get("grad_norm", math.nan), without.get("update_norm", math.nan)))]
        documents = [(f"{field} of {d.name}, tokens {d.first} to {d.first + d.length - 1}", body)
                     for d in text.documents for field, body in d.texts]
        shown.append(RowShown(cells, f"row {row.row:,}: {text.source}, epoch {text.epoch}, "
                              f"packed row {text.place:,}", documents))
    return shown


def _status(found: Repeated) -> str:
    if found.differences:
        return "differs from the recorded step" if not found.is_equal else "an earlier step differs"
    return "equal to the bit" if found.recorded else "not recorded"


def _story(found: Repeated, rows: Rows, modules: Modules | None) -> list[str]:
    """Says in sentences what happened, where first, and in which rows."""
    step, recorded = found.metrics, found.recorded
    origin = f"the checkpoint of step {found.start:,}" if found.start else "the seed"
    said = f"loss {step['loss']!r}, gradient norm {step['grad_norm']!r}"
    if recorded:
        said += (", as recorded, to the bit" if found.is_equal else
                 f"; recorded were loss {recorded['loss']!r}, gradient norm "
                 f"{recorded.get('grad_norm')!r}")
    else:
        said += "; metrics.jsonl has no line of this step"
    lines = [f"Step {found.step:,}, repeated from {origin}: {said}."]
    if found.differences:
        first = found.differences[0]
        lines.append(f"The first figure that differs is {first.name} of step {first.step:,}: "
                     f"recorded {first.recorded!r}, repeated {first.repeated!r}.")
    elif found.compared > 1:
        lines.append(f"All {found.compared} recorded steps up to this one repeat to the bit.")
    if found.why:
        lines.append(f"The run said of it: {found.why}.")
    lines += [f"Not as it was: {note}." for note in found.notes]
    if modules is not None:
        lines += _where(modules)
    return [*lines, *blame(rows.rows), *([rows.note] if rows.note else [])]


def blame(rows: Sequence[Row]) -> list[str]:
    """Names the rows whose loss or gradient is not finite."""
    bad = [row.row for row in rows if not row.is_finite]
    if not bad:
        return []
    if len(rows) == 1:
        return ["The only row of the batch is not finite."]
    if len(bad) == len(rows):
        return ["Every row is not finite, so that no row is to blame."]
    return [f"Of the {len(rows)} rows, alone in the batch, {_listed(bad)} "
            f"{'is' if len(bad) == 1 else 'are'} not finite."]


def _where(modules: Modules) -> list[str]:
    lines = []
    if modules.parameters:
        lines.append(f"Not finite before the step: {_listed(modules.parameters)}.")
    if modules.forward:
        lines.append("The first module whose output is not finite is "
                     f"{modules.forward}{_in_rows(modules.rows)}.")
    elif not math.isfinite(modules.loss):
        lines.append("The outputs of all modules are finite: the loss itself is not, from its "
                     f"logits, targets or mask{_in_rows(modules.rows)}.")
    elif modules.backward:
        lines.append("All outputs are finite. Going backwards, the first module whose output has a "
                     f"gradient that is not is {modules.backward}{_in_rows(modules.rows)}.")
    elif modules.gradients:
        lines.append(f"Only gradients of parameters are not finite: {_listed(modules.gradients)}.")
    else:
        lines.append("The outputs of all modules and their gradients are finite.")
    return lines


def _in_rows(rows: Sequence[int]) -> str:
    return f", in {'row' if len(rows) == 1 else 'rows'} {_listed(rows)}" if rows else ""


def _listed(items: Sequence[object]) -> str:
    more = len(items) - NAMED
    named = ", ".join(f"{x:,}" if isinstance(x, int) else str(x) for x in items[:NAMED])
    return named + (f" and {more} more" if more > 0 else "")


def row_line(row: RowShown) -> str:
    """The figures of a row in a line, for the terminal."""
    number, documents, tokens, loss, gradient, *without = row.cells
    return (f"row {number}: loss {loss}, gradient {gradient}; without it loss {without[0]}, "
            f"gradient {without[1]}, update {without[2]} ({documents:.60})")
