"""How fast rows are made: tokens of text through the production batches, for every objective, and through Grain.

Documents of lognormal lengths (median 400 tokens, as web text has) in a token store, two sources, rows of 1024.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lmjax.data import DataConfig, SourceConfig, TokenizerConfig, make_batches, open_splits
from lmjax.data.augmentation import AugmentConfig
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.store import write_manifest, write_split

VOCAB, SEQ_LEN, BATCH, DOCUMENTS = 32_000, 1024, 32, 5_000
STEPS = 48  # batches of a round
OBJECTIVES = {
    "causal_lm": ObjectiveConfig(),
    "causal_lm, augmented": ObjectiveConfig(augment=AugmentConfig(share=1.0)),
    "prefix_lm": ObjectiveConfig("prefix_lm"),
    "masked_lm": ObjectiveConfig("masked_lm"),
    "span_corruption": ObjectiveConfig("span_corruption"),
    "ul2": ObjectiveConfig("ul2", sentinels=200),
}


class Work(NamedTuple):
    """Something to measure, and how much is done in a run of it."""

    run: Callable[[], object]
    tokens: int
    bytes: int = 0
    documents: int = 0


def pipelines(directory: str, stack: contextlib.ExitStack) -> dict[str, Work]:
    """For each objective the next `STEPS` batches: best-fit packed, read, made, and put on the device."""
    sources = tuple(SourceConfig(name, "text:made-up", weight) for name, weight in (("a", 1.0), ("b", 2.0)))
    documents = _write(directory, DataConfig(sources=sources, tokenizer=TokenizerConfig(VOCAB)))
    found = {}
    for name, objective in OBJECTIVES.items():
        config = DataConfig(sources=sources, tokenizer=TokenizerConfig(VOCAB), seq_len=SEQ_LEN, objective=objective)
        split, _ = open_splits(config, directory)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        batches = stack.enter_context(contextlib.closing(
            make_batches(split, batch_size=BATCH, start_row=0, steps=10**9, sharding=one)))
        _take(batches, 8)  # more than are made ahead
        found[f"rows, {name}"] = Work(lambda batches=batches: _take(batches, STEPS),
                                      round(STEPS * BATCH * split.predictions / split.num_rows()))
    try:
        import grain
        from grain.experimental import FirstFitPackIterDataset
    except ImportError as error:
        print(f"bench: no comparison with Grain: {error}; pip install lmjax[compare]", file=sys.stderr)
        return found
    read = grain.MapDataset.source(documents).seed(0).shuffle().repeat().map(lambda ids: {"tokens": ids[:SEQ_LEN]})
    packed = iter(FirstFitPackIterDataset(read.to_iter_dataset(), length_struct={"tokens": SEQ_LEN},
                                          num_packing_bins=BATCH).batch(BATCH))
    real = np.mean([next(packed)["tokens_segment_ids"] > 0 for _ in range(8)])
    return found | {"rows, Grain, first-fit packed": Work(lambda: _take(packed, STEPS),
                                                          round(STEPS * BATCH * SEQ_LEN * real))}


def _take(batches: object, count: int) -> None:
    for _ in range(count):
        jax.block_until_ready(next(batches))


def _write(directory: str, config: DataConfig) -> Sequence[np.ndarray]:
    rng, entries = np.random.default_rng(0), {}
    for source in config.sources:
        lengths = np.maximum(16, rng.lognormal(np.log(400), 1.1, DOCUMENTS)).astype(np.int64)
        documents = [np.concatenate([[1], rng.integers(4, VOCAB, n), [2]]) for n in lengths]
        entries[source.name] = {
            split: write_split(directory, source.name, split, part, [str(i) for i in range(len(part))],
                               vocab_size=VOCAB, text_bytes=1)
            for split, part in (("train", documents), ("heldout", documents[:2]))}
    write_manifest(directory, {"format": "lmjax-tokens", "version": 1, "sources": entries,
                               "config": config.prepared_by(), "tokenizer": {"vocab_size": VOCAB}})
    return documents
