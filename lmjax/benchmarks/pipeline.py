"""Measures how fast rows are made: by the production batches, per objective, and by Grain.

The token store holds documents with lognormal lengths (median 400 tokens, as web text has) of two
sources. Rows have 1024 tokens.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.data.augmentation import AugmentConfig
from lmjax.data.batches import make_batches
from lmjax.data.config import DataConfig
from lmjax.data.objectives import ObjectiveConfig
from lmjax.data.pipeline import open_splits
from lmjax.data.store import FORMAT, VERSION, write_manifest, write_split
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import TokenizerConfig

VOCAB, SEQ_LEN, BATCH = 32_000, 1024, 32
DOCUMENTS = 5_000  # per source
STEPS = 48  # batches per round
OBJECTIVES = {
    "causal_lm": ObjectiveConfig(),
    "causal_lm, augmented": ObjectiveConfig(augment=AugmentConfig(share=1.0)),
    "prefix_lm": ObjectiveConfig("prefix_lm"),
    "masked_lm": ObjectiveConfig("masked_lm"),
    "span_corruption": ObjectiveConfig("span_corruption"),
    "ul2": ObjectiveConfig("ul2", sentinels=200),
}


class Work(NamedTuple):
    """Something to measure, and how much one run of it processes."""

    run: Callable[[], object]
    tokens: int
    bytes: int = 0
    documents: int = 0


def pipelines(directory: str, stack: contextlib.ExitStack) -> dict[str, Work]:
    """Returns the work of making the next `STEPS` batches: for each objective, and for Grain.

    Making a batch means to pack rows by best fit, to read and build them, and to put them on the
    device.

    Args:
      directory: for the token store.
      stack: closes the pipelines.
    """
    sources = tuple(SourceConfig(name, "text:made-up", weight)
                    for name, weight in (("a", 1.0), ("b", 2.0)))
    tokenizer = TokenizerConfig(VOCAB)
    documents = _write(directory, DataConfig(sources=sources, tokenizer=tokenizer))
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = {}
    for name, objective in OBJECTIVES.items():
        config = DataConfig(sources=sources, tokenizer=tokenizer, seq_len=SEQ_LEN,
                            objective=objective)
        split, _ = open_splits(config, directory)
        batches = stack.enter_context(contextlib.closing(make_batches(
            split, batch_size=BATCH, start_row=0, steps=10**9, sharding=on_device)))
        _take(batches, 8)  # more than are made ahead
        found[f"rows, {name}"] = Work(functools.partial(_take, batches, STEPS),
                                      round(STEPS * BATCH * split.predictions / split.num_rows()))
    return found | _grain(documents)


def _grain(documents: Sequence[np.ndarray]) -> dict[str, Work]:
    """Returns the work of Grain on the documents of one source: rows packed by first fit."""
    try:
        import grain
        from grain.experimental import FirstFitPackIterDataset
    except ImportError as error:
        print(f"bench: no comparison with Grain: {error}; pip install lmjax[compare]",
              file=sys.stderr)
        return {}
    read = grain.MapDataset.source(documents).seed(0).shuffle().repeat()
    read = read.map(lambda ids: {"tokens": ids[:SEQ_LEN]})
    rows = FirstFitPackIterDataset(read.to_iter_dataset(), length_struct={"tokens": SEQ_LEN},
                                   num_packing_bins=BATCH)
    packed = iter(rows.batch(BATCH))
    share = np.mean([next(packed)["tokens_segment_ids"] > 0 for _ in range(8)])  # without padding
    return {"rows, Grain, first-fit packed": Work(functools.partial(_take, packed, STEPS),
                                                  round(STEPS * BATCH * SEQ_LEN * share))}


def _take(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        jax.block_until_ready(next(batches))


def _write(directory: str, config: DataConfig) -> Sequence[np.ndarray]:
    """Writes a token store of random tokens; returns the documents of the last source."""
    rng, entries = np.random.default_rng(0), {}
    for source in config.sources:
        lengths = np.maximum(16, rng.lognormal(np.log(400), 1.1, DOCUMENTS)).astype(np.int64)
        documents = [np.concatenate([[1], rng.integers(4, VOCAB, n), [2]]) for n in lengths]
        entries[source.name] = {
            split: write_split(directory, source.name, split, part,
                               [str(i) for i in range(len(part))], vocab_size=VOCAB, text_bytes=1)
            for split, part in (("train", documents), ("heldout", documents[:2]))}
    write_manifest(directory, {
        "format": FORMAT, "version": VERSION, "sources": entries,
        "config": config.prepared_by(), "tokenizer": {"vocab_size": VOCAB}})
    return documents
