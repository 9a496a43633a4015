"""Tokenises a corpus: which documents are held out, which train the tokenizer, and their tokens."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmjax.data import store
from lmjax.data.hashing import key_of, permute
from lmjax.data.preparation import shards
from lmjax.data.preparation.corpus import Corpus
from lmjax.data.preparation.shards import Shard
from lmjax.data.text.words import batches
from lmjax.data.tokenizers import Tokenizer, tokenizer_from_bytes

BATCH_CHARS = 1 << 20  # tokenised at once


def heldout_bounds(corpus: Corpus, names: Sequence[str], fraction: float) -> dict[str, int]:
    """Returns, by source, the bound below which a document's split key means that it is held out.

    The bounds hold out at least one document of every source, and never all of them.

    Args:
      corpus: the finished corpus.
      names: of the sources.
      fraction: the share of documents to hold out.
    """
    bounds = {}
    for name in names:
        keys = [key for key, part in zip(corpus.stage.facts["keys"], corpus.parts, strict=True)
                if part.source == name]
        lowest, highest = min(low for low, _ in keys), max(high for _, high in keys)
        bounds[name] = min(max(int(fraction * 2.0**64), lowest + 1), highest)
    return bounds


def is_heldout(part: Shard, keys: np.ndarray, bounds: Mapping[str, int]) -> np.ndarray:
    """Returns which documents of a shard are held out, given their split keys: bool [n]."""
    return keys < np.uint64(min(bounds[part.source], 2**64 - 1))


def training_sample(parts: Sequence[Shard], bounds: Mapping[str, int], budget: int,
                    seed: int) -> list[str]:
    """Returns training documents in a keyed random order, until they have `budget` bytes.

    Only the documents that are returned are held in memory.
    """
    size, where = [], []
    for p, part in enumerate(parts):
        keys = shards.read(part.path, ["key"]).column(0).to_numpy()
        train = np.flatnonzero(~is_heldout(part, keys, bounds))
        size.append(np.array([len(raw) for raw in shards.raw_texts(part)], np.int64)[train])
        where.append(np.stack([np.full(len(train), p), train]))
    sizes, places = np.concatenate(size), np.concatenate(where, axis=1)
    order = (np.argsort(permute(np.arange(len(sizes)), len(sizes), key_of("sample", seed)))
             if len(sizes) else sizes)
    order = order[: int(np.searchsorted(np.cumsum(sizes[order]), budget)) + 1]
    chosen = {}
    for p in np.unique(places[0, order]):
        column = shards.read(parts[p].path, ["text"]).column(0)
        chosen.update({int(i): column[int(places[1, i])].as_py()
                       for i in order[places[0, order] == p]})
    return [chosen[int(i)] for i in order]


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: str, changed_ns: int) -> Tokenizer:
    with open(path, "rb") as file:
        return tokenizer_from_bytes(file.read())


def tokenise(part: Shard, model: str, bounds: Mapping[str, int], folder: str) -> dict[str, Any]:
    """Turns each document into BOS + tokens + EOS, and counts what does not come back.

    Args:
      part: the shard.
      model: the file of the tokenizer.
      bounds: of the split keys, see `heldout_bounds`.
      folder: for SHARD.tokens.npy, SHARD.lengths.npy and SHARD.heldout.npy.
    Returns:
      `languages`, by language the documents, bytes, tokens (EOS counts, BOS does not) and words;
      `splits`, of `train` and `heldout` the documents, the bytes of their decoded text, the
      documents that the tokenizer changes, and the characters that these lose;
      `example`, a line on the first document that changes, or "".
    """
    tokenizer = _load_tokenizer(model, os.stat(model).st_mtime_ns)
    batch = shards.read(part.path)
    texts, names = batch.column("text").to_pylist(), batch.column("id").to_pylist()
    dtype = store.token_dtype(tokenizer.vocab_size)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    decoded_sizes, example = sizes.copy(), ""
    changes, lost = np.zeros((2, len(texts)), np.int64)
    out: list[np.ndarray] = []
    for base, group in batches(texts, BATCH_CHARS):
        ids = tokenizer.encode_batch(group, num_threads=1)
        for n, decoded in sorted(tokenizer.changed(group, ids).items()):
            decoded_sizes[base + n], changes[base + n] = len(decoded.encode()), 1
            lost[base + n] = (Counter(group[n]) - Counter(decoded)).total()
            example = example or (f"document {names[base + n]} of source {part.source}: "
                                  f"{_difference(group[n], decoded)}")
        out += [np.concatenate([bos, i.astype(dtype), eos]) for i in ids]
    held = is_heldout(part, batch.column("key").to_numpy(), bounds)
    lengths = np.array([len(ids) for ids in out], np.int64)
    tokens = np.concatenate([np.zeros(0, dtype), *out])
    for name, values in (("tokens", tokens), ("lengths", lengths), ("heldout", held)):
        np.save(os.path.join(folder, f"{part.name}.{name}.npy"), values)
    words = batch.column("words").to_numpy(zero_copy_only=False).astype(np.int64)
    counts = {"documents": np.ones(len(texts), np.int64), "bytes": sizes,
              "tokens": np.maximum(lengths - 1, 0), "words": words}
    codes = np.array(batch.column("language").to_pylist(), dtype=object)
    languages = {code: {name: int(values[codes == code].sum()) for name, values in counts.items()}
                 for code in sorted(set(codes.tolist()))}
    splits = {split: [int(values[mine].sum())
                      for values in (counts["documents"], decoded_sizes, changes, lost)]
              for split, mine in (("train", ~held), ("heldout", held))}
    return {"languages": languages, "splits": splits, "example": example}


def _difference(text: str, decoded: str) -> str:
    """Where a text and its decoded text begin to differ, for a message."""
    at = len(os.path.commonprefix([text, decoded]))
    start = max(at - 10, 0)
    return f"{text[start : at + 20]!r} comes back as {decoded[start : at + 20]!r}"
