"""The last stage of `lmjax prepare`: the token store, in a random order of documents."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmjax.data import store
from lmjax.data.config import DataConfig
from lmjax.data.hashing import key_of, permute
from lmjax.data.preparation import shards
from lmjax.data.preparation.engine import Stage
from lmjax.data.preparation.shards import Shard
from lmjax.data.preparation.stages import Prepared
from lmjax.data.text import ngram, sources
from lmjax.data.tokenizers import Tokenizer

BASELINE_TOKENS = 16_000_000  # of the training split that the n-grams count: some 10 s and 2 GB


def write_store(config: DataConfig, made: Prepared, out: str) -> dict[str, Any]:
    """Shuffles the documents of each split of each source and writes its arrays; returns the manifest's entries."""
    finished = made.texts[-1]
    entries: dict[str, dict[str, Any]] = {}
    for source in config.sources:
        counts = [text.stage.facts["sources"][source.name] for text in made.texts]
        removed: Counter[str] = Counter()
        for count in counts:
            removed.update({rule: n for rule, (n, _) in count["removed"].items()})
        entries[source.name] = entry = {
            "identity": sources.identity(source),
            "read": {key: counts[0][key] for key in ("documents", "bytes")},
            "changed": counts[1]["changed"] | counts[2]["changed"], "removed": dict(removed)}
        for split in ("train", "heldout"):
            facts = zip(finished.parts, made.tokens.facts["splits"], strict=True)
            size = sum(shard[split][1] for part, shard in facts if part.source == source.name)
            entry[split] = _write_split(made, out, source.name, split, size)
    return entries


def _write_split(made: Prepared, out: str, source: str, split: str, size: int) -> dict[str, Any]:
    parts = [part for part in made.texts[-1].parts if part.source == source]
    lengths, starts, which, places = [], [], [], []
    for p, part in enumerate(parts):
        load = functools.partial(_load, made.tokens, part)
        mine = np.flatnonzero(load("heldout") == (split == "heldout"))
        all_lengths = load("lengths")
        lengths.append(all_lengths[mine])
        starts.append((np.cumsum(all_lengths) - all_lengths)[mine])
        which.append(np.full(len(mine), p))
        places.append(mine)
    length, start, shard, place = map(np.concatenate, (lengths, starts, which, places))
    n = len(length)
    order = np.argsort(permute(np.arange(n), n, key_of("documents", source, split)))

    def documents() -> Iterator[np.ndarray]:
        opened = [_load(made.tokens, part, "tokens") for part in parts]
        for d in order.tolist():
            yield opened[shard[d]][start[d] : start[d] + length[d]]

    def ids() -> Iterator[str]:
        columns = [shards.read(part.path, ["id"]).column(0) for part in parts]
        for d in order.tolist():
            yield columns[shard[d]][int(place[d])].as_py()

    return store.write_split(out, source, split, documents(), ids(), lengths=length[order],
                             vocab_size=made.tokenizer.vocab_size, text_bytes=size)


def _load(tokens: Stage, part: Shard, name: str) -> np.ndarray:
    return np.load(tokens.path(f"{part.name}.{name}.npy"), mmap_mode="r")


def contamination(made: Prepared) -> list[dict[str, Any]]:
    """For each evaluation example: how many of its runs of words and letters the corpus had, and in which documents."""
    if not made.evals:
        return []
    examples = shards.read(made.evals.path("examples.arrow")).to_pylist()
    runs: list[dict[str, set[int]]] = [{"words": set(), "letters": set()} for _ in examples]
    documents: list[set[str]] = [set() for _ in examples]
    for part in made.texts[-1].parts:
        for hit in shards.read(f"{part.path}.hits").to_pylist():
            runs[hit["example"]][hit["kind"]].add(hit["run"])
            documents[hit["example"]].add(hit["id"])
    return [{"set": example["set"], "id": example["id"], "text": shards.excerpt(example["text"]),
             "documents": sorted(found), **{kind: [len(mine[kind]), example[kind]] for kind in mine}}
            for example, mine, found in zip(examples, runs, documents, strict=True)]


def baselines(entries: dict[str, Any], tokenizer: Tokenizer, out: str) -> dict[str, Any]:
    """What n-grams achieve on the held-out text, learnt from a share of every source's training text."""
    total = sum(entry["train"]["tokens"] for entry in entries.values())
    share = min(1.0, BASELINE_TOKENS / total)

    def tokens(split: str, share: float) -> np.ndarray:
        parts = [store.open_array(f"{out}/{name}/{split}/tokens")[: int(entry[split]["tokens"] * share)].read().result()
                 for name, entry in entries.items()]
        return np.concatenate(parts)

    return ngram.baselines(tokens("train", share), tokens("heldout", 1.0), vocab_size=tokenizer.vocab_size,
                           heldout_bytes=sum(entry["heldout"]["bytes"] for entry in entries.values()),
                           bos_id=tokenizer.bos_id)
