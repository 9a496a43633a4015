"""Writes the token store; counts contamination and measures n-gram baselines."""

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
from lmjax.data.preparation.decontaminate import RUN_KINDS
from lmjax.data.preparation.engine import Stage
from lmjax.data.preparation.shards import Shard
from lmjax.data.preparation.stages import Prepared
from lmjax.data.text import ngram, sources
from lmjax.data.tokenizers import Tokenizer

BASELINE_TOKENS = 16_000_000  # training tokens that the n-grams count: about 10 s and 2 GB


def write_store(config: DataConfig, made: Prepared, out: str) -> dict[str, Any]:
    """Shuffles the documents of each split of each source and writes their arrays.

    Returns:
      the manifest's entries, by source.
    """
    entries: dict[str, dict[str, Any]] = {}
    for source in config.sources:
        counts = [corpus.counts(source.name) for corpus in made.corpora]
        removed: Counter[str] = Counter()
        for count in counts:
            removed.update({rule: n for rule, (n, _) in count["removed"].items()})
        entries[source.name] = entry = {
            "identity": sources.identity(source),
            "read": {key: counts[0][key] for key in ("documents", "bytes")},
            "changed": counts[1]["changed"] | counts[2]["changed"], "removed": dict(removed)}
        for split in ("train", "heldout"):
            facts = zip(made.finished.parts, made.tokens.facts["splits"], strict=True)
            mine = [shard[split] for part, shard in facts if part.source == source.name]
            size, changed, lost = (sum(counts[n] for counts in mine) for n in (1, 2, 3))
            entry[split] = _write_split(made, out, source.name, split, size)
            if changed:
                entry[split]["lost"] = {"documents": changed, "characters": lost}
    return entries


def _write_split(made: Prepared, out: str, source: str, split: str, size: int) -> dict[str, Any]:
    """Writes one split of a source, whose decoded texts have `size` bytes."""
    parts = [part for part in made.finished.parts if part.source == source]
    # Of every document: its number of tokens, where they begin, its shard, and its place in that.
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
    """Counts, for each evaluation example, the runs of words and letters that the corpus had.

    Returns:
      per example its `set`, `id`, beginning of the `text`, the `documents` that share a run with
      it, and for `words` and `letters` [runs found, runs it has].
    """
    if not made.evals:
        return []
    examples = shards.read(made.evals.path("examples.arrow")).to_pylist()
    runs: list[dict[str, set[int]]] = [{kind: set() for kind in RUN_KINDS} for _ in examples]
    documents: list[set[str]] = [set() for _ in examples]
    for part in made.finished.parts:
        for hit in shards.read(f"{part.path}.hits").to_pylist():
            runs[hit["example"]][hit["kind"]].add(hit["run"])
            documents[hit["example"]].add(hit["id"])
    return [{"set": example["set"], "id": example["id"], "text": shards.excerpt(example["text"]),
             "documents": sorted(found),
             **{kind: [len(mine[kind]), example[kind]] for kind in mine}}
            for example, mine, found in zip(examples, runs, documents, strict=True)]


def baselines(entries: dict[str, Any], tokenizer: Tokenizer, out: str) -> dict[str, Any]:
    """Measures n-gram models on the held-out text, counted on an equal share of every source.

    Args:
      entries: the manifest's entries, by source.
      tokenizer: of the data.
      out: the directory with the token store.
    Returns:
      the losses that `ngram.baselines` computes.
    """
    total = sum(entry["train"]["tokens"] for entry in entries.values())
    share = min(1.0, BASELINE_TOKENS / total)

    def tokens(split: str, share: float) -> np.ndarray:
        parts = []
        for name, entry in entries.items():
            array = store.open_array(f"{out}/{name}/{split}/tokens")
            parts.append(array[: int(entry[split]["tokens"] * share)].read().result())
        return np.concatenate(parts)

    heldout_bytes = sum(entry["heldout"]["bytes"] for entry in entries.values())
    return ngram.baselines(tokens("train", share), tokens("heldout", 1.0), bos_id=tokenizer.bos_id,
                           vocab_size=tokenizer.vocab_size, heldout_bytes=max(heldout_bytes, 1))
