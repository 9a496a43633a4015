"""Reads the files of a run back, as arrays and dictionaries."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lmjax.errors import UserError
from lmjax.monitoring.goodput import LEDGER_FILE, account
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.runtime.sealed import FILES, read_listed, read_sealed

MAX_PARSED_BYTES = 4 << 20  # of a file of metrics; of longer files only a part is read
STRETCHES = 400  # parts of a long file whose greatest values are read: about one per drawn point
# Of a long file: words that mark the lines which are always read, and the names of values whose
# greatest ones are always read.
ALWAYS_READ = {
    "metrics.jsonl": ((b'"eval', b'nan"', b'inf"'), ("loss", "grad_norm")),
    "timing.jsonl": ((b'"event',), ("step_seconds",)),
}
# By task, what its loss is a mean over; tokens for all others.
UNITS = {"classification": "example", "tagging": "word", "questions": "question",
         "preferences": "pair"}
Columns = dict[str, np.ndarray]  # name -> float64 [lines], in the order of "step"


@dataclass
class RunRecord:
    """What the files of a run hold; fields are empty where there is no file."""

    workdir: Path
    config: dict[str, Any]  # config.json
    facts: dict[str, Any]  # run.json
    train: Columns = field(default_factory=dict)
    evals: dict[str, Columns] = field(default_factory=dict)  # by group: "eval", "eval_ema"
    timing: Columns = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # "event", "step", "seconds", ...
    seconds: float = math.nan  # wall time over all starts; nan if unknown
    # Wall time by activity, including the time between starts.
    spent: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)  # of the prepared data
    baselines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The newest step with a metric."""
        return int(max(columns["step"][-1] for columns in (self.train, *self.evals.values())
                       if columns))

    @property
    def heldout(self) -> Columns:
        """The evaluations of the weights themselves, or else of their average."""
        return self.evals.get("eval") or next(iter(self.evals.values()), {})

    @property
    def of(self) -> str:
        """What follows "bits per byte": nothing, or whose bytes, if the tokenizer loses text."""
        decoded = any("of_decoded_text" in columns for columns in (self.train, self.heldout))
        return " of decoded text" if decoded else ""

    @property
    def unit(self) -> str:
        """What a loss is a mean over, and what the run counts: tokens, or a task's examples."""
        return UNITS.get(self.config.get("task", {}).get("name", ""), "token")

    @property
    def best_step(self) -> int:
        """The best evaluated step by the run's metric; 0 if it has none."""
        return max((int(columns["best_step"][-1]) for columns in self.evals.values()
                    if "best_step" in columns), default=0)

    @property
    def ended_early(self) -> dict[str, Any]:
        """The event with which the run ended before its last step; {} if it did not."""
        ends = [event for event in self.events if event["event"] == "ended_early"]
        return ends[-1] if ends and ends[-1]["step"] == self.step else {}

    @property
    def unfinished(self) -> bool:
        """Whether steps are still to come."""
        return self.step < self.facts.get("steps", self.step) and not self.ended_early

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss was not finite and that was not skipped."""
        bad = ~np.isfinite(self.train.get("loss", np.zeros(0)))
        if "skipped" in self.train:
            bad &= ~np.isfinite(self.train["skipped"])
        return int(self.train["step"][bad.argmax()]) if bad.any() else None

    def tokens(self, step: Any) -> np.ndarray:
        """The number of tokens trained on up to `step` (a scalar or [N])."""
        known = np.isfinite(self.train.get("tokens", np.zeros(0)))
        if known.any():
            steps, tokens = self.train["step"][known], self.train["tokens"][known]
            return np.interp(step, np.append(0, steps), np.append(0, tokens))
        return np.asarray(step, float) * self.facts.get("tokens_per_step", 1)


def read_run(workdir: Path) -> RunRecord:
    """Everything that the directory of a run holds.

    Raises:
      UserError: there are no metrics, or a file is not readable.
    """
    run = RunRecord(workdir, _json(workdir / "config.json"), _json(workdir / "run.json"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in _records(workdir / "metrics.jsonl"):
        group = next((name.partition("/")[0] for name in record if "/" in name), "train")
        groups.setdefault(group, []).append(record)
    if not groups:
        raise UserError(f"metrics in {workdir / 'metrics.jsonl'}", "none",
                        "train into this directory first, or wait for the first step")
    run.train = _columns(groups.pop("train", []))
    run.evals = {group: _columns(records, f"{group}/")
                 for group, records in sorted(groups.items())}
    timing = list(_records(workdir / "timing.jsonl"))
    run.timing = _columns([record for record in timing if "event" not in record])
    run.events = [{"seconds": 0.0} | record for record in timing if "event" in record]
    run.seconds = _wall_seconds(timing)
    run.spent = account(read_jsonl(workdir / LEDGER_FILE))
    run.samples = list(read_jsonl(workdir / "samples.jsonl"))
    named = Path(str(run.facts.get("data", {}).get("directory") or "data"))
    for directory in (named, workdir / named, workdir / "data"):
        if (directory / "manifest.json").exists():
            run.manifest = read_sealed(epath.Path(directory) / "manifest.json")
            name = "baselines.json"
            if name in run.manifest.get(FILES, {}):
                read_listed(directory, name, run.manifest)
            run.baselines = _json(directory / name).get("baselines", [])
            break
    return run


def last(columns: Columns, name: str) -> float:
    """The newest finite value of a column, or nan."""
    values = _finite(columns, name)
    return float(values[-1]) if len(values) else math.nan


def median(columns: Columns, name: str) -> float:
    """The median of a column's finite values, or nan."""
    values = _finite(columns, name)
    return float(np.median(values)) if len(values) else math.nan


def _finite(columns: Columns, name: str) -> np.ndarray:
    values = columns.get(name, np.zeros(0))
    return values[np.isfinite(values)]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError("JSON", error, "move the file away and try again",
                        where=str(path)) from error
    return value if isinstance(value, dict) else {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, in order; of a long file only a part of them.

    Of a long file, evenly spaced lines are read, and those that `ALWAYS_READ` tells: the marked
    lines, and in each of `STRETCHES` parts of the file those with the greatest values and the last
    line that has such a value.
    """
    size = path.stat().st_size if path.exists() else 0
    if size <= MAX_PARSED_BYTES:
        yield from read_jsonl(path)
        return
    words, names = ALWAYS_READ[path.name]
    values = [re.compile(f'"{name}": ([^",}}]+)'.encode()) for name in names]
    with path.open("rb") as file:
        while block := file.read(size // STRETCHES + 1) + file.readline():
            block = block[: block.rfind(b"\n") + 1]  # without a torn last line
            for begin in sorted(_chosen(block, size / MAX_PARSED_BYTES, words, values)):
                yield json.loads(block[begin : block.index(b"\n", begin)])


def _chosen(block: bytes, every: float, words: Sequence[bytes],
            values: Sequence[re.Pattern[bytes]]) -> set[int]:
    """Where the lines to be read begin in a block of whole lines.

    Args:
      every: about one line in so many is read, the first and the last one always.
      words: every line with one of these words is read.
      values: of each of these values, the lines with the greatest and with the last one are read.
    """
    if not block:
        return set()
    line_bytes = block.index(b"\n") + 1
    places = [*range(0, len(block), int(every * line_bytes)), len(block) - 1]
    for word in words:
        at = block.find(word)
        while at >= 0:
            places.append(at)
            at = block.find(word, block.index(b"\n", at))
    for value in values:
        if found := value.findall(block):
            name, _, _ = value.pattern.partition(b"(")
            places += [block.index(name + max(found, key=float)), block.rfind(name)]
    return {block.rfind(b"\n", 0, at) + 1 for at in places}


def _columns(records: list[dict[str, Any]], prefix: str = "") -> Columns:
    """Numbers by name. Of two lines of one step the later one counts: the step was repeated."""
    by_step = {record["step"]: record for record in records}
    if not by_step:
        return {}
    rows = [by_step[step] for step in sorted(by_step)]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    columns = {name.removeprefix(prefix): _numbers(row.get(name) for row in rows)
               for name in names}
    return {"step": np.array(sorted(by_step), float), **columns}


def _numbers(values: Iterable[Any]) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def _wall_seconds(timing: list[dict[str, Any]]) -> float:
    """The seconds of the last line of figures, and of later events such as the last save."""
    figures = [number for number, record in enumerate(timing) if "event" not in record]
    if not figures:
        return math.nan
    newest, later = timing[figures[-1]], timing[figures[-1] + 1:]
    return float(newest.get("seconds", math.nan)) + sum(
        float(event.get("seconds", 0)) for event in later if event["event"] != "slow_step")
