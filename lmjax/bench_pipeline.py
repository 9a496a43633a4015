"""How fast rows are made: tokens of text a second through the production batches, for every objective.

    python -m lmjax.bench_pipeline

Documents of lognormal lengths (median 400 tokens, as web text has) in a token store, two sources, rows of 1024.
"""

import contextlib
import tempfile
import time

import jax
import numpy as np

from lmjax.data import DataConfig, SourceConfig, TokenizerConfig, make_batches, open_splits
from lmjax.data.objectives import AugmentConfig, ObjectiveConfig
from lmjax.data.store import write_manifest, write_split

VOCAB, SEQ_LEN, BATCH, DOCUMENTS = 32_000, 1024, 32, 5_000
OBJECTIVES = {
    "causal_lm": ObjectiveConfig(),
    "causal_lm, augmented": ObjectiveConfig(augment=AugmentConfig(share=1.0)),
    "prefix_lm": ObjectiveConfig("prefix_lm"),
    "masked_lm": ObjectiveConfig("masked_lm"),
    "span_corruption": ObjectiveConfig("span_corruption"),
    "ul2": ObjectiveConfig("ul2", sentinels=200),
}


def bench_pipeline(seconds: float = 3.0) -> dict[str, float]:
    """Tokens of text a second by objective, best-fit packed, read, made, and put on the device."""
    sources = tuple(SourceConfig(name, "text:made-up", weight) for name, weight in (("a", 1.0), ("b", 2.0)))
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        _write(directory, DataConfig(sources=sources, tokenizer=TokenizerConfig(VOCAB)))
        for name, objective in OBJECTIVES.items():
            config = DataConfig(sources=sources, tokenizer=TokenizerConfig(VOCAB), seq_len=SEQ_LEN, objective=objective)
            split, _ = open_splits(config, directory)
            one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            batches = make_batches(split, batch_size=BATCH, start_row=0, steps=10**9, sharding=one)
            with contextlib.closing(batches):
                for _ in range(8):  # more than are made ahead
                    next(batches)
                steps, began = 0, time.monotonic()
                while time.monotonic() - began < seconds:
                    jax.block_until_ready(next(batches))
                    steps += 1
                rows = steps * BATCH / (time.monotonic() - began)
            found[name] = rows * split.predictions / split.num_rows()
    return found


def _write(directory: str, config: DataConfig) -> None:
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


if __name__ == "__main__":
    for name, rate in bench_pipeline().items():
        print(f"{name:22} {rate / 1e6:6.2f} M tokens/s")
