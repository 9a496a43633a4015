"""A corpus between two stages: the shards that a stage wrote, and the sums of their facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.data.preparation.engine import Stage
from lmjax.data.preparation.shards import Samples, Shard

Facts = dict[str, Any]


class Corpus(NamedTuple):
    """The result of a stage that writes shards of documents."""

    stage: Stage
    parts: list[Shard]

    def counts(self, source: str) -> Facts:
        """The facts of one source: documents, bytes, removed and changed."""
        return self.stage.facts["sources"][source]


def corpus_of(stage: Stage) -> Corpus:
    """Returns the corpus that a stage wrote."""
    parts, first = [], 0
    for file, source, documents in stage.facts["shards"]:
        parts.append(Shard(stage.path(file), source, first, documents))
        first += documents
    return Corpus(stage, parts)


def merge_facts(facts: Sequence[Facts], names: Iterable[str]) -> Facts:
    """Merges the facts of shards (see `curate`) into those of a stage.

    Args:
      facts: of each shard.
      names: of each shard's source.
    Returns:
      `shards`, [file, source, documents] of each; `sources`, by name the sums of `documents`,
      `bytes`, `removed` and `changed`; `samples`, examples per rule.
    """
    shards, by_source, samples = [], dict[str, Facts](), Samples()
    for fact, name in zip(facts, names, strict=True):
        shards.append([fact["file"], name, fact["documents"]])
        total = by_source.setdefault(
            name, {"documents": 0, "bytes": 0, "removed": {}, "changed": Counter()})
        total["documents"] += fact["documents"]
        total["bytes"] += fact["bytes"]
        _add_removed(total["removed"], fact["removed"])
        total["changed"].update(fact["changed"])
        samples.merge(Samples(fact["samples"]))
    return {"shards": shards, "sources": by_source, "samples": samples.plain()}


def totals(facts: Facts) -> tuple[int, int]:
    """Returns the number of documents of a stage, and their bytes."""
    sources = facts["sources"].values()
    documents = sum(source["documents"] for source in sources)
    return documents, sum(source["bytes"] for source in sources)


def removed(facts: Facts) -> dict[str, list[int]]:
    """Returns [documents, bytes] that each rule removed, of all sources together."""
    total: dict[str, list[int]] = {}
    for source in facts["sources"].values():
        _add_removed(total, source["removed"])
    return total


def changed(facts: Facts) -> Counter[str]:
    """Returns how many documents each rule changed, of all sources together."""
    total: Counter[str] = Counter()
    for source in facts["sources"].values():
        total.update(source["changed"])
    return total


def describe(facts: Facts) -> str:
    """Says in one line what a stage wrote, changed and removed."""
    documents, size = totals(facts)
    parts = [f"{documents:,} documents, {size / 1e6:.1f} MB"]
    gone = Counter({rule: count for rule, (count, _) in removed(facts).items()})
    for what, counts in (("changed", changed(facts)), ("removed", gone)):
        if counts:
            common = ", ".join(f"{n:,} {rule}" for rule, n in counts.most_common(8))
            parts.append(f"{what}: {common}")
    return "; ".join(parts)


def _add_removed(total: dict[str, list[int]], more: Mapping[str, Sequence[int]]) -> None:
    for rule, (documents, size) in more.items():
        before = total.get(rule, [0, 0])
        total[rule] = [before[0] + documents, before[1] + size]
