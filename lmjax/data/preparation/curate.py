"""What is done to the text of a corpus before it is tokenised: its config, and a function of one shard for each stage.

Every one of these runs in any process, reads one shard, writes one shard, and returns what it counted as JSON values:
    documents, bytes           of what it wrote
    removed  {rule: [documents, bytes]}       changed  {rule: documents}
    samples  examples of each rule (`shards.Samples`)
A document that goes leaves a line in the shard's ledger: id, rule, by (the id of the one that stays), value.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmjax.data.config import CurateConfig, DecontaminateConfig, DedupConfig
from lmjax.data.preparation import dedup, shards
from lmjax.data.preparation.decontaminate import Index
from lmjax.data.preparation.engine import between
from lmjax.data.preparation.shards import SHARD_BYTES, Samples, Shard, excerpt
from lmjax.data.text import clean, filters, sources
from lmjax.data.text.filters import Batch
from lmjax.data.text.sources import Broken, SourceConfig
from lmjax.data.text.words import batches, split


class Tally:
    """Counts and examples of what a shard's documents went through, and the ledger of those that went."""

    def __init__(self) -> None:
        self.removed: dict[str, list[int]] = {}
        self.changed: Counter[str] = Counter()
        self.samples = Samples()
        self.ledger: dict[str, list] = {"id": [], "rule": [], "by": [], "value": []}

    def remove(self, rule: str, name: str, text: str, *, by: str = "", value: float = 0.0, note: str = "") -> None:
        count = self.removed.setdefault(rule, [0, 0])
        count[0] += 1
        count[1] += len(text.encode())
        for key, item in zip(self.ledger, (name, rule, by, value), strict=True):
            self.ledger[key].append(item)
        self.samples.add(rule, name, lambda: {"text": excerpt(text), "note": note or by or (f"{value:.3g}")})

    def write(self, path: str, columns: Mapping[str, Sequence[Any]], **more: Any) -> dict[str, Any]:
        """Writes the shard and its ledger; returns the facts."""
        shards.write(path, columns)
        shards.write(f"{path}.ledger", self.ledger)
        return {"documents": len(columns["id"]), "bytes": sum(len(text.encode()) for text in columns["text"]),
                "removed": self.removed, "changed": dict(self.changed), "samples": self.samples.kept} | more


def ingest(task: tuple[int, list[tuple[str, str]]], source: SourceConfig, folder: str) -> list[dict[str, Any]]:
    """Reads some files of a source into shards; broken records are counted and set aside."""
    number, files = task
    facts: list[dict[str, Any]] = []
    tally, columns, size = Tally(), {"id": [], "text": []}, 0

    def flush() -> None:
        name = f"{source.name}-{number:06}-{len(facts):04}.arrow"
        facts.append(tally.write(os.path.join(folder, name), columns, file=name))

    for item in sources.read(source, files):
        if isinstance(item, Broken):
            tally.remove("broken", item.id, item.raw, by="", note=item.reason)
            continue
        length = len(item.data)
        if columns["id"] and size + length > SHARD_BYTES:
            flush()
            tally, columns, size = Tally(), {"id": [], "text": []}, 0
        columns["id"].append(item.id)
        columns["text"].append(item.data)
        size += length
    flush()
    return facts


def clean_shard(part: Shard, config: CurateConfig, rules: Sequence[str], min_chars: int,
                folder: str) -> dict[str, Any]:
    """Cleans, finds the language, filters."""
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
    families = config.families()
    for base, group in batches(texts):
        looked = Batch(group)
        verdicts = filters.reject(looked, families)
        words = np.diff(looked.words.bounds_D1).tolist()
        for i, (text, code, verdict) in enumerate(zip(group, looked.languages, verdicts, strict=True)):
            if config.languages and code not in config.languages:
                tally.remove("language", names[base + i], text, note=code)
            elif verdict:
                tally.remove(verdict[0], names[base + i], text, value=verdict[1])
            else:
                for key, value in zip(columns, (names[base + i], text, code, words[i]), strict=True):
                    columns[key].append(value)
    return tally.write(os.path.join(folder, part.name), columns, file=part.name)


def _change(before: str, after: str) -> dict[str, str]:
    return dict(zip(("before", "text"), clean.first_change(before, after), strict=True))


def finish_shard(part: Shard, config: CurateConfig, min_chars: int, removed: Mapping[str, str], cuts: Mapping[str, str],
                 parts: Sequence[Shard], index: str, folder: str) -> dict[str, Any]:
    """Leaves out what is there twice or is in an evaluation set, and gives every document its split key.

    removed: rule -> .npy of (document, the one that stays[, similarity's bits]). cuts: kind -> .npy of places.
    index: folder of the evaluation sets' index, "" for none.
    """
    batch, tally = shards.read(part.path), Tally()
    data = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    gone = {rule: {int(row[0]): row[1:] for row in between(np.load(path, mmap_mode="r"), part.first, part.end).T}
            for rule, path in removed.items()}
    name_of = functools.lru_cache(maxsize=1 << 16)(functools.partial(_name_of, parts))
    places = {kind: between(np.load(path, mmap_mode="r"), part.first, part.end, dedup.POSITION)[0]
              for kind, path in cuts.items()}
    kept: list[tuple[str, str, str, int]] = []
    for i, (name, text) in enumerate(zip(data["id"], data["text"], strict=True)):
        number = part.first + i
        rule = next((rule for rule, rows in gone.items() if number in rows), None)
        if rule:
            by, *value = gone[rule][number]
            tally.remove(rule, name, text, by=name_of(int(by)),
                         value=float(np.array(value, np.uint64).view(np.float64)[0]) if value else 1.0)
            continue
        after = _cut(name, text, number, places, config.dedup, tally)
        if after is not text and len(after.strip()) < max(min_chars, 1):
            tally.remove("nothing_left", name, text, value=len(after))
            continue
        words = data["words"][i] if after is text else len(split([after]).hash_W)
        kept.append((name, after, data["language"][i], words))
    hits = _matches(kept, config.decontaminate, index, tally)
    found = {hit["text"] for hit in hits}
    kept = [item for i, item in enumerate(kept) if i not in found]
    columns: dict[str, Any] = {key: [item[at] for item in kept]
                               for at, key in enumerate(("id", "text", "language", "words"))}
    columns["key"] = np.array([split_key(name, text) for name, text, *_ in kept], np.uint64)
    shards.write(os.path.join(folder, f"{part.name}.hits"), {
        "id": [hit["id"] for hit in hits], "kind": [hit["kind"] for hit in hits],
        "example": np.array([hit["example"] for hit in hits], np.int64),
        "run": np.array([hit["run"] for hit in hits], np.uint64)})
    keys = [int(min(columns["key"], default=2**64 - 1)), int(max(columns["key"], default=0))]
    return tally.write(os.path.join(folder, part.name), columns, file=part.name, keys=keys)


def _cut(name: str, text: str, number: int, places: Mapping[str, np.ndarray], config: DedupConfig,
         tally: Tally) -> str:
    mine = {}
    for kind, rows in places.items():
        low, high = np.searchsorted(rows, np.array([number, number + 1], np.uint64) << np.uint64(dedup.POSITION))
        mine[kind] = (rows[low:high] & np.uint64((1 << dedup.POSITION) - 1)).astype(np.int64)
    if not any(map(len, mine.values())):
        return text
    after, pieces = dedup.cut(text, mine["windows"], mine["lines"], config)
    for kind in dict(pieces):
        tally.changed[kind] += 1
    for kind, piece in pieces:
        tally.samples.add(kind, f"{name} {hash_of(piece)}", lambda piece=piece: {"text": excerpt(piece), "note": name})
    return after


def _matches(kept: Sequence[tuple[str, str, str, int]], config: DecontaminateConfig, index: str,
             tally: Tally) -> list[dict[str, Any]]:
    if not index:
        return []
    texts = [text for _, text, *_ in kept]
    hits = _index(index, config).matches(texts)
    for i in sorted({hit["text"] for hit in hits}):
        examples = sorted({hit["example"] for hit in hits if hit["text"] == i})
        tally.remove("contaminated", kept[i][0], texts[i], by="", value=len(examples),
                     note="examples " + ", ".join(map(str, examples[:5])))
    return [hit | {"id": kept[hit["text"]][0]} for hit in hits]


@functools.lru_cache(maxsize=1)
def _index(folder: str, config: DecontaminateConfig) -> Index:
    return Index(folder, config)


def _name_of(parts: Sequence[Shard], number: int) -> str:
    part = parts[int(np.searchsorted([p.first for p in parts], number, side="right")) - 1]
    return _names(part.path)[number - part.first].as_py()


@functools.lru_cache(maxsize=64)
def _names(path: str) -> Any:
    return shards.read(path, ["id"]).column(0)


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_key(name: str, text: str) -> int:
    """A document is held out if this is low: it depends on nothing but the document. In [0, 2**64)."""
    return int.from_bytes(hashlib.sha256(f"{name}\0{text}".encode()).digest()[:8], "big")
