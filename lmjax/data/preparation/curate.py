"""Ingests, cleans and finishes a corpus: a function of one shard for each of these stages.

Each function runs in any process, reads one shard, writes one shard and returns its facts (JSON):
    file       name of the shard that it wrote
    documents  number of documents in it
    bytes      of their texts
    removed    {rule: [documents, bytes]}
    changed    {rule: documents}
    samples    examples per rule, see `shards.Samples`
Each removed document has a row in the ledger of the shard: id, rule, by (the id of the document
that stays instead, if any) and value (what the rule measured).
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.data.config import CurateConfig, DecontaminateConfig, DedupConfig
from lmjax.data.preparation import repeats, shards
from lmjax.data.preparation.decontaminate import Index
from lmjax.data.preparation.engine import between
from lmjax.data.preparation.shards import Samples, Shard, excerpt, shard_of
from lmjax.data.text import clean, filters, sources
from lmjax.data.text.features import TextBatch
from lmjax.data.text.sources import Broken, SourceConfig
from lmjax.data.text.words import batches, split

Facts = dict[str, Any]


class Tally:
    """Counts what happens to a shard's documents; keeps examples, and a ledger of those removed."""

    def __init__(self) -> None:
        self.removed: dict[str, list[int]] = {}
        self.changed: Counter[str] = Counter()
        self.samples = Samples()
        self.ledger: dict[str, list] = {"id": [], "rule": [], "by": [], "value": []}

    def remove(self, rule: str, name: str, text: str, *, by: str = "", value: float = 0.0,
               note: str = "", size: int = 0) -> None:
        """Counts a removed document.

        Args:
          rule: that removed it.
          name: its id.
          text: its text.
          by: the id of the document that stays instead, if any.
          value: what the rule measured.
          note: shown with the example; by default `by` or `value`.
          size: its bytes, if `text` is only its beginning.
        """
        count = self.removed.setdefault(rule, [0, 0])
        count[0] += 1
        count[1] += max(size, len(text.encode()))
        for key, item in zip(self.ledger, (name, rule, by, value), strict=True):
            self.ledger[key].append(item)
        note = note or by or f"{value:.3g}"
        self.samples.add(rule, name, lambda: {"text": excerpt(text), "note": note})

    def write(self, folder: str, file: str, columns: Mapping[str, Any]) -> Facts:
        """Writes the shard and its ledger; returns the facts."""
        path = os.path.join(folder, file)
        shards.write(path, columns)
        shards.write(f"{path}.ledger", self.ledger)
        return {"documents": len(columns["id"]),
                "bytes": sum(len(text.encode()) for text in columns["text"]),
                "removed": self.removed, "changed": dict(self.changed),
                "samples": self.samples.kept, "file": file}


def ingest(task: tuple[int, list[tuple[str, str]]], source: SourceConfig,
           folder: str, budget: float = 1.0) -> list[Facts]:
    """Reads some files of a source into shards; broken records are counted and left out.

    Args:
      task: a number for the names of the shards, and the (id, path) of every file.
      source: that the files belong to.
      folder: for the shards.
      budget: the share of a file's records that may be broken.
    Returns:
      the facts of each shard, and `lost`: bytes of broken records, as far as they are counted.
    """
    number, files = task
    facts: list[Facts] = []
    tally, size, lost = Tally(), 0, 0
    columns: dict[str, list[str]] = {"id": [], "text": []}

    def flush() -> None:
        file = f"{source.name}-{number:06}-{len(facts):04}.arrow"
        facts.append(tally.write(folder, file, columns) | {"lost": lost})

    for item in sources.read(source, files, budget):
        if isinstance(item, Broken):
            tally.remove("broken", item.id, item.raw, note=item.reason,
                         size=item.size)
            lost += item.size
            continue
        length = len(item.data)
        if columns["id"] and size + length > shards.SHARD_BYTES:
            flush()
            tally, columns, size, lost = Tally(), {"id": [], "text": []}, 0, 0
        columns["id"].append(item.id)
        columns["text"].append(item.data)
        size += length
    flush()
    return facts


def clean_shard(part: Shard, config: CurateConfig, rules: Sequence[str], min_chars: int,
                folder: str) -> Facts:
    """Cleans texts, finds their languages; removes documents by language, length and filters."""
    batch = shards.read(part.path)
    tally = Tally()
    names, texts = [], []
    for name, text in zip(batch.column("id").to_pylist(), shards.texts(part), strict=True):
        if len(text) > config.max_chars:
            tally.remove("too_long", name, text, value=len(text))
            continue
        text, changes = clean.clean(text, rules)
        for rule, (before, after) in changes.items():
            tally.changed[rule] += 1
            tally.samples.add(rule, name, functools.partial(_change, before, after))
        if len(text) < max(min_chars, 1):
            tally.remove("too_short", name, text, value=len(text))
            continue
        names.append(name)
        texts.append(text)
    columns: dict[str, list] = {"id": [], "text": [], "language": [], "words": []}
    thresholds = config.filters()
    for base, group in batches(texts):
        measured = TextBatch(group)
        verdicts = filters.reject(measured, thresholds)
        words = np.diff(measured.words.bounds_D1).tolist()
        rows = zip(names[base : base + len(group)], group, measured.languages, words, verdicts,
                   strict=True)
        for name, text, code, count, verdict in rows:
            if config.languages and code not in config.languages:
                tally.remove("language", name, text, note=code)
            elif verdict:
                tally.remove(verdict[0], name, text, value=verdict[1])
            else:
                for key, value in zip(columns, (name, text, code, count), strict=True):
                    columns[key].append(value)
    return tally.write(folder, part.name, columns)


def _change(before: str, after: str) -> dict[str, str]:
    return dict(zip(("before", "text"), clean.first_change(before, after), strict=True))


@dataclass(frozen=True)
class Findings:
    """The files in which earlier stages say what `finish_shard` has to remove.

    removed: per rule, an .npy of the documents to remove: uint64 [2 or 3, n], (document, the one
      that stays or itself, the bits of their float64 similarity or of its float64 score).
    cuts: for `windows` and `lines`, if they are on, an .npy of places to cut (`repeats.repeats`).
    index: the folder of the index of the evaluation sets; "" if there are none.
    """

    removed: Mapping[str, str]
    cuts: Mapping[str, str]
    index: str


def finish_shard(part: Shard, config: CurateConfig, min_chars: int, findings: Findings,
                 parts: Sequence[Shard], folder: str) -> Facts:
    """Removes copies, repeated passages and evaluation examples; gives each document a split key.

    Args:
      part: the shard.
      config: of deduplication and decontamination.
      min_chars: what cutting must leave of a document.
      findings: what earlier stages found.
      parts: all shards of the corpus.
      folder: for the shard, its ledger, and its matches with evaluation examples (`.hits`).
    Returns:
      the facts; `keys` are the lowest and the highest split key.
    """
    batch, tally = shards.read(part.path), Tally()
    data = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    gone = {rule: {int(row[0]): row[1:]
                   for row in between(np.load(path, mmap_mode="r"), part.first, part.end).T}
            for rule, path in findings.removed.items()}
    name_of = functools.lru_cache(maxsize=1 << 16)(functools.partial(_name_of, parts))
    places = {kind: between(np.load(path, mmap_mode="r"), part.first, part.end,
                            repeats.POSITION_BITS)[0]
              for kind, path in findings.cuts.items()}
    kept: list[tuple[str, str, str, int]] = []  # id, text, language, words
    for i, (name, text) in enumerate(zip(data["id"], data["text"], strict=True)):
        number = part.first + i
        rule = next((rule for rule, rows in gone.items() if number in rows), None)
        if rule:
            by, *bits = gone[rule][number]
            value = float(np.array(bits, np.uint64).view(np.float64)[0]) if bits else 1.0
            stays = name_of(int(by)) if by != number else ""
            tally.remove(rule, name, text, by=stays, value=value)
            continue
        after = _cut(name, text, number, places, config.dedup, tally)
        if after is not text and len(after.strip()) < max(min_chars, 1):
            tally.remove("nothing_left", name, text, value=len(after))
            continue
        words = data["words"][i] if after is text else len(split([after]).hash_W)
        kept.append((name, after, data["language"][i], words))
    hits = _matches(kept, config.decontaminate, findings.index, tally)
    found = {hit["text"] for hit in hits}
    kept = [document for i, document in enumerate(kept) if i not in found]
    _write_hits(os.path.join(folder, f"{part.name}.hits"), hits)
    columns: dict[str, Any] = {key: [document[at] for document in kept]
                               for at, key in enumerate(("id", "text", "language", "words"))}
    columns["key"] = np.array([split_key(name, text) for name, text, *_ in kept], np.uint64)
    keys = [int(min(columns["key"], default=2**64 - 1)), int(max(columns["key"], default=0))]
    return tally.write(folder, part.name, columns) | {"keys": keys}


def _cut(name: str, text: str, number: int, places: Mapping[str, np.ndarray], config: DedupConfig,
         tally: Tally) -> str:
    """Returns the text without its repeated passages: `text` itself if it has none."""
    mine = {kind: repeats.positions(places.get(kind, np.zeros(0, np.uint64)), number)
            for kind in ("windows", "lines")}
    if not any(map(len, mine.values())):
        return text
    after, pieces = repeats.cut(text, mine["windows"], mine["lines"], config)
    for kind in dict(pieces):
        tally.changed[kind] += 1
    for kind, piece in pieces:
        sample = {"text": excerpt(piece), "note": name}
        tally.samples.add(kind, f"{name} {_short_hash(piece)}", sample.copy)
    return after


def _matches(kept: Sequence[tuple[str, str, str, int]], config: DecontaminateConfig, index: str,
             tally: Tally) -> list[dict[str, Any]]:
    """Finds runs shared with evaluation examples; counts the documents that have any as removed."""
    if not index:
        return []
    texts = [text for _, text, *_ in kept]
    hits = _index(index, config).matches(texts)
    for i in sorted({hit["text"] for hit in hits}):
        examples = sorted({hit["example"] for hit in hits if hit["text"] == i})
        tally.remove("contaminated", kept[i][0], texts[i], value=len(examples),
                     note="examples " + ", ".join(map(str, examples[:5])))
    return [hit | {"id": kept[hit["text"]][0]} for hit in hits]


def _write_hits(path: str, hits: Sequence[Mapping[str, Any]]) -> None:
    shards.write(path, {
        "id": [hit["id"] for hit in hits], "kind": [hit["kind"] for hit in hits],
        "example": np.array([hit["example"] for hit in hits], np.int64),
        "run": np.array([hit["run"] for hit in hits], np.uint64)})


@functools.lru_cache(maxsize=1)
def _index(folder: str, config: DecontaminateConfig) -> Index:
    return Index(folder, config)


def _name_of(parts: Sequence[Shard], number: int) -> str:
    part = parts[shard_of(parts, number)]
    return _names(part.path)[number - part.first].as_py()


@functools.lru_cache(maxsize=64)
def _names(path: str) -> Any:
    return shards.read(path, ["id"]).column(0)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_key(name: str, text: str) -> int:
    """Returns a number in [0, 2**64) that depends on the document alone; low ones are held out."""
    return int.from_bytes(hashlib.sha256(f"{name}\0{text}".encode()).digest()[:8], "big")
