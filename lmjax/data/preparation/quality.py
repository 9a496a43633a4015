"""The stage that removes what is unlike a few good examples; see `lmjax.data.text.quality`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.config import QualityConfig
from lmjax.data.hashing import key_of, uniform
from lmjax.data.preparation import shards
from lmjax.data.preparation.engine import Engine
from lmjax.data.preparation.shards import Shard
from lmjax.data.text import clean, quality, sources

SAMPLE_BYTES = 16 << 20  # of the corpus, from which the filter learns


def remove(engine: Engine, parts: Sequence[Shard], config: QualityConfig, rules: Sequence[str],
           broken_budget: float, folder: str) -> dict[str, Any]:
    """Learns the filter and finds what it removes.

    Args:
      engine: scores the shards.
      parts: the shards of the corpus.
      config: the examples, and the share of good text that may be lost.
      rules: the cleaning rules of the corpus, which the examples get as well.
      broken_budget: the share of a source of examples that may be broken.
      folder: for the filter and for `removed.npy`, uint64 [3, N]: the document, the document, and
        the bits of its float64 score.
    Returns:
      `examples` and `sample`, the texts that the filter learnt from; `threshold`; `removed`;
      `scores`, a histogram of all scores: [counts, edges].
    """
    judged = [part for part in parts if not config.only or part.source in config.only]
    good = _good_texts(config, rules, broken_budget)
    size = sum(engine.map(_bytes, judged))
    take = functools.partial(_sample, share=min(1.0, SAMPLE_BYTES / max(size, 1)))
    corpus = [text for texts in engine.map(take, judged) for text in texts]
    engine.log(f"prepare: quality: learning from {len(good):,} examples and {len(corpus):,} "
               "documents of the corpus")
    learnt = quality.fit(good, corpus, config.lost)
    quality.save(learnt, folder)
    engine.log(f"prepare: quality: scoring {sum(part.documents for part in judged):,} documents")
    score = functools.partial(_score, folder=folder, threshold=learnt.threshold)
    scores = engine.map(score, judged)
    _load.cache_clear()
    rows = [np.stack([number, number, score.view(np.uint64)])[:, score < learnt.threshold]
            for part, score in zip(judged, scores, strict=True)
            for number in [np.arange(part.first, part.end, dtype=np.uint64)]]
    removed = np.concatenate([np.zeros((3, 0), np.uint64), *rows], axis=1)
    np.save(os.path.join(folder, "removed.npy"), removed)
    counts, edges = np.histogram(np.concatenate([np.zeros(0), *scores]), 40)
    return {"examples": len(good), "sample": len(corpus), "threshold": learnt.threshold,
            "removed": removed.shape[1], "scores": [counts.tolist(), edges.tolist()]}


def _good_texts(config: QualityConfig, rules: Sequence[str], broken_budget: float) -> list[str]:
    """The different examples, cleaned."""
    found: dict[str, None] = {}
    for source in config.good:
        files = [file for unit in sources.units(source, 1 << 60) for file in unit]
        for item in sources.read(source, files, broken_budget):
            if isinstance(item, sources.Document):
                text, _ = clean.clean(item.data, rules)
                found[text[:quality.BEGINNING]] = None
    return [text for text in found if text.strip()]


def _bytes(part: Shard) -> int:
    return sum(map(len, shards.raw_texts(part)))


def _sample(part: Shard, share: float) -> list[str]:
    """The beginnings of a share of a shard's documents, drawn by a hash of each text."""
    texts = [text[:quality.BEGINNING] for text in shards.texts(part)]
    if share == 1:
        return texts
    return [text for text in texts if uniform(key_of("quality", text))[()] < share]


def _score(part: Shard, folder: str, threshold: float) -> np.ndarray:
    texts = [text[:quality.BEGINNING] for text in shards.texts(part)]
    return _load(folder, threshold).scores(texts)


@functools.lru_cache(maxsize=1)
def _load(folder: str, threshold: float) -> quality.Quality:
    """The filter in `folder`; its threshold tells it from an earlier one at the same place."""
    return quality.load(folder)
