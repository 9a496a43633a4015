"""The files of a run, read back as arrays and dictionaries."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.monitoring.goodput import LEDGER_FILE, account
from lmjax.monitoring.jsonl import read_jsonl

PARSED_BYTES = 4 << 20  # of a file of metrics; longer ones are thinned
STRETCHES = 400  # of a file that is thinned: as many as points are drawn
# file -> words that mark a line which is read whatever is left out, and names whose greatest values are not missed
TELLING = {
    "metrics.jsonl": ((b'"eval', b'nan"', b'inf"'), ("loss", "grad_norm")),
    "timing.jsonl": ((b'"event',), ("step_seconds",)),
}
Columns = dict[str, np.ndarray]  # name -> [lines] float64, in the order of "step"


@dataclass
class Run:
    """What the files of a run hold; empty where there is no file.

    evals: name of the group ("eval", "eval_ema") -> columns without the group's prefix.
    events: (name, step, seconds). seconds: wall time over all starts, nan if unknown. spent: the same by kind, with the
    time between the starts.
    """

    workdir: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    train: Columns = field(default_factory=dict)
    evals: dict[str, Columns] = field(default_factory=dict)
    timing: Columns = field(default_factory=dict)
    events: list[tuple[str, int, float]] = field(default_factory=list)
    seconds: float = math.nan
    spent: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    baselines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(max(columns["step"][-1] for columns in (self.train, *self.evals.values()) if columns))

    @property
    def heldout(self) -> Columns:
        return self.evals.get("eval") or next(iter(self.evals.values()), {})

    @property
    def unfinished(self) -> bool:
        return self.step < self.facts.get("steps", self.step)

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss was not finite."""
        bad = ~np.isfinite(self.train.get("loss", np.zeros(0)))
        return int(self.train["step"][bad.argmax()]) if bad.any() else None

    def tokens(self, step: Any) -> np.ndarray:
        """Tokens trained on when `step` (scalar or [N]) was done."""
        known = np.isfinite(self.train.get("tokens", np.zeros(0)))
        if known.any():
            steps, tokens = self.train["step"][known], self.train["tokens"][known]
            return np.interp(step, np.append(0, steps), np.append(0, tokens))
        return np.asarray(step, float) * self.facts.get("tokens_per_step", 1)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; move the file away and try again") from error
    return value if isinstance(value, dict) else {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, in order; of a long one a share, evenly spaced, and those that are TELLING: the marked
    ones, and in each of STRETCHES parts of the file those with the greatest values and the last with and without."""
    size = path.stat().st_size if path.exists() else 0
    if size <= PARSED_BYTES:
        yield from read_jsonl(path)
        return
    words, names = TELLING[path.name]
    spikes = [re.compile(f'"{name}": ([^",}}]+)'.encode()) for name in names]
    with path.open("rb") as file:
        while block := file.read(size // STRETCHES + 1) + file.readline():
            block = block[: block.rfind(b"\n") + 1]  # without a torn last line
            for begin in sorted(_chosen(block, size / PARSED_BYTES, words, spikes)):
                yield json.loads(block[begin : block.index(b"\n", begin)])


def _chosen(block: bytes, thin: float, words: Sequence[bytes], spikes: Sequence[re.Pattern[bytes]]) -> set[int]:
    """Where the lines begin that are read from whole ones: about one in `thin`, and those that are telling."""
    if not block:
        return set()
    places = [*range(0, len(block), int(thin * (block.index(b"\n") + 1))), len(block) - 1]
    for word in words:
        at = block.find(word)
        while at >= 0:
            places.append(at)
            at = block.find(word, block.index(b"\n", at))
    for spike in spikes:
        if values := spike.findall(block):
            name, _, _ = spike.pattern.partition(b"(")
            places += [block.index(name + max(values, key=float)), block.rfind(name)]
    return {block.rfind(b"\n", 0, at) + 1 for at in places}


def _columns(records: list[dict[str, Any]], prefix: str = "") -> Columns:
    """Numbers by name. Of two lines of one step the later one counts: the step was done again."""
    by_step = {record["step"]: record for record in records}
    if not by_step:
        return {}
    rows = [by_step[step] for step in sorted(by_step)]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    columns = {name.removeprefix(prefix): _numbers(row.get(name) for row in rows) for name in names}
    return {"step": np.array(sorted(by_step), float), **columns}


def _numbers(values: Iterator[Any]) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def read_run(workdir: Path) -> Run:
    """Everything that the directory of a run holds.

    Raises:
      ValueError: there are no metrics, or a file cannot be read.
    """
    run = Run(workdir, _json(workdir / "config.json"), _json(workdir / "run.json"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in _records(workdir / "metrics.jsonl"):
        group = next((name.partition("/")[0] for name in record if "/" in name), "train")
        groups.setdefault(group, []).append(record)
    if not groups:
        raise ValueError(
            f"expected metrics in {workdir / 'metrics.jsonl'}, got none; "
            "train into this directory first, or wait for the first step"
        )
    run.train = _columns(groups.pop("train", []))
    run.evals = {group: _columns(records, f"{group}/") for group, records in sorted(groups.items())}
    timing = list(_records(workdir / "timing.jsonl"))
    run.timing = _columns([record for record in timing if "event" not in record])
    run.events = [(r["event"], r["step"], float(r.get("seconds", 0.0))) for r in timing if "event" in r]
    run.seconds = _wall_seconds(timing)
    run.spent = account(read_jsonl(workdir / LEDGER_FILE))
    run.samples = list(read_jsonl(workdir / "samples.jsonl"))
    named = Path(str(run.facts.get("data", {}).get("directory") or "data"))
    for directory in (named, workdir / named, workdir / "data"):
        if (directory / "manifest.json").exists():
            run.manifest = _json(directory / "manifest.json")
            run.baselines = _json(directory / "baselines.json").get("baselines", [])
            break
    return run


def _wall_seconds(timing: list[dict[str, Any]]) -> float:
    """What the last line of figures says, and what happened after it: the last evaluation, the last save."""
    figures = [number for number, record in enumerate(timing) if "event" not in record]
    if not figures:
        return math.nan
    after = timing[figures[-1] + 1 :]
    return float(timing[figures[-1]].get("seconds", math.nan)) + sum(
        float(r.get("seconds", 0)) for r in after if r["event"] != "slow_step"
    )


def last(columns: Columns, name: str) -> float:
    """The newest finite value, or nan."""
    values = columns.get(name, np.zeros(0))
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan


def median(columns: Columns, name: str) -> float:
    values = columns.get(name, np.zeros(0))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan
