"""Prepares data: read, clean, split, train the tokenizer, tokenise, write the store and its baselines.

Everything is held in memory: the text (a byte or more a character), 2 or 4 bytes a token, and for the n-gram
baselines up to 2 GB, which 16 million tokens need. The 32 MB of the standard library peak at 1.5 GB.
A local directory is written under another name and renamed when whole, so that it exists completely
or not at all; on gs:// and s3:// the manifest is written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lmjax.data import ngram, sources, store
from lmjax.data.clean import Cleaner
from lmjax.data.pipeline import DataConfig, check_prepared_by
from lmjax.data.sources import Document, SourceConfig
from lmjax.data.tokenizer import Tokenizer, make_tokenizer

BATCH_CHARS = 4 << 20  # tokenised at once
BASELINE_TOKENS = 16_000_000  # of the training split that the n-grams count: some 10 s and 2 GB
Log = Callable[[str], None]


class Corpus(NamedTuple):
    """The cleaned documents of a source by split, and what was counted on the way."""

    splits: dict[str, list[Document]]
    counts: dict[str, Any]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(config: DataConfig, out: str, *, log: Log = to_stderr) -> str:
    """Makes a prepared data directory, or finds that `out` already is that one.

    Args:
      config: the data config; sources must not be synthetic.
      out: the directory to make: local, gs:// or s3://.
      log: called with each line of progress.
    Returns:
      the directory.
    Raises:
      ValueError: bad sources; `out` holds other data, or something else; no space left.
    """
    if config.synthetic:
        raise ValueError("data.sources: expected text to prepare, got synthetic data, which needs no "
                         "preparing; train on it directly")
    out = str(out).rstrip("/")
    if (epath.Path(out) / "manifest.json").exists():
        _reuse(config, out, log)
        return out
    start = time.monotonic()
    with _workspace(out) as workspace:
        facts = _write(config, workspace, log)
    log(f"prepare: {out} is ready: {facts['tokens']:,} tokens, fingerprint {facts['fingerprint'][:12]} "
        f"({time.monotonic() - start:.1f} s)")
    return out


def _reuse(config: DataConfig, out: str, log: Log) -> None:
    manifest = store.read_manifest(out)
    check_prepared_by(config, manifest, out)
    log(f"prepare: using the data prepared in {out}, fingerprint {manifest['fingerprint'][:12]}")
    for source in config.sources:
        was, now = manifest["sources"][source.name]["identity"], sources.identity(source)
        if now and was != now:
            log(f"prepare: warning: the files of source {source.name} have changed since; "
                f"to read them again, delete {out} or prepare another directory")


def _write(config: DataConfig, workspace: str, log: Log) -> dict[str, Any]:
    """All stages; returns what the last line of the log says."""
    corpora, seen = {}, set()
    for source in config.sources:
        with _stage(log, f"read and cleaned {source.name}") as note:
            corpora[source.name] = corpus = _read(config, source, seen)
            note.append(_describe(corpus))
    with _stage(log, "tokenizer") as note:
        texts = [document.data for corpus in corpora.values() for document in corpus.splits["train"]]
        tokenizer = make_tokenizer(config.tokenizer, texts)
        del texts
        (epath.Path(workspace) / "tokenizer.model").write_bytes(tokenizer.to_bytes())
        note.append(f"{tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}")
    tokens: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    entries: dict[str, dict[str, Any]] = {}
    for name, corpus in corpora.items():
        entries[name] = dict(corpus.counts)
        for split, documents in corpus.splits.items():
            with _stage(log, f"tokenised {name}/{split}") as note:
                ids = tokenise(tokenizer, documents, name)
                size = sum(len(document.data.encode()) for document in documents)
                entries[name][split] = store.write_split(
                    workspace, name, split, ids, [document.id for document in documents],
                    vocab_size=tokenizer.vocab_size, text_bytes=size)
                tokens[split].append(np.concatenate(ids))
                rate = size / entries[name][split]["predictions"]
                note.append(f"{len(tokens[split][-1]):,} tokens, {rate:.3f} bytes a token, "
                            "every document comes back exactly")
                documents.clear()
    with _stage(log, "n-gram baselines") as note:
        result = _baselines(tokens, tokenizer, sum(e["heldout"]["bytes"] for e in entries.values()))
        (epath.Path(workspace) / "baselines.json").write_text(json.dumps(result, indent=1) + "\n")
        scores = ", ".join(f"{b['name']} {b['bits_per_byte']:.3f}" for b in result["baselines"])
        note.append(f"{scores} bits per byte of held-out text")
    manifest = _manifest(config, tokenizer, entries)
    store.write_manifest(workspace, manifest)
    total = sum(len(part) for parts in tokens.values() for part in parts)
    return {"fingerprint": manifest["fingerprint"], "tokens": total}


def _read(config: DataConfig, source: SourceConfig, seen: set[bytes]) -> Corpus:
    reader = sources.Reader(source, invalid_utf8_budget=config.invalid_utf8_budget)
    cleaner = Cleaner(rules=config.clean, min_chars=config.min_chars, seen=seen)
    splits = split_by_hash(list(cleaner(reader)), config.heldout_fraction)
    counts = {"identity": sources.identity(source), "read": {"documents": reader.read, "bytes": reader.bytes},
              "changed": dict(cleaner.changed),
              "removed": {"invalid_utf8": len(reader.skipped), **cleaner.removed}}
    if not all(splits.values()):
        kept = sum(map(len, splits.values()))
        raise ValueError(f"source {source.name} ({source.uri}): expected two different documents or more, "
                         f"one to train on and one to hold out, got {kept} of the {reader.read} read; "
                         "split the text into more files, or lower data.min_chars or data.heldout_fraction")
    return Corpus(splits, counts)


def split_by_hash(documents: Sequence[Document], fraction: float) -> dict[str, list[Document]]:
    """Splits by a hash of id and text: whether a document is held out depends on nothing else.

    Only where no hash falls under `fraction` is the smallest one held out, so that no split is empty.
    """
    digests = [hashlib.sha256(f"{d.id}\0{d.data}".encode()).digest() for d in documents]
    hashes = [int.from_bytes(digest[:8], "big") for digest in digests]
    bound = int(fraction * 2.0**64)
    if len(documents) > 1:
        bound = max(bound, min(hashes) + 1)
    splits: dict[str, list[Document]] = {"train": [], "heldout": []}
    for document, value in zip(documents, hashes, strict=True):
        splits["heldout" if value < bound else "train"].append(document)
    return splits


def tokenise(tokenizer: Tokenizer, documents: Sequence[Document], source: str) -> list[np.ndarray]:
    """BOS + tokens + EOS of each document, checked to give back its exact text.

    Raises:
      ValueError: a document does not come back, which only an existing tokenizer can cause.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    out: list[np.ndarray] = []
    for batch in _batches(documents):
        texts = [document.data for document in batch]
        ids = tokenizer.encode_batch(texts)
        bad = tokenizer.lossy(texts, ids)
        if bad is not None:
            raise ValueError(f"document {batch[bad].id} of source {source}: expected a tokenizer that gives "
                             "back its text, got another text; use one that loses nothing, or train one by "
                             "leaving data.tokenizer.path empty")
        out += [np.concatenate([bos, i.astype(dtype), eos]) for i in ids]
    return out


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _baselines(tokens: dict[str, list[np.ndarray]], tokenizer: Tokenizer,
               heldout_bytes: int) -> dict[str, Any]:
    share = min(1.0, BASELINE_TOKENS / sum(map(len, tokens["train"])))
    train = np.concatenate([part[: int(len(part) * share)] for part in tokens["train"]])
    return ngram.baselines(train, np.concatenate(tokens["heldout"]), heldout_bytes=heldout_bytes,
                           vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id)


def _manifest(config: DataConfig, tokenizer: Tokenizer, entries: dict[str, Any]) -> dict[str, Any]:
    """Everything about the data; the fingerprint covers what decides its rows."""
    arrays = {name: {split: entry[split]["sha256"] for split in ("train", "heldout")}
              for name, entry in entries.items()}
    rows = [store.FORMAT, store.VERSION, tokenizer.hash, arrays]
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "sentencepiece", "tensorstore")}
    return {
        "format": store.FORMAT, "version": store.VERSION,
        "fingerprint": hashlib.sha256(store.canonical(rows).encode()).hexdigest(),
        "config": config.prepared_by(),
        "versions": {"python": platform.python_version()} | versions,
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "sources": entries,
    }


def _describe(corpus: Corpus) -> str:
    counts = corpus.counts
    removed = ", ".join(f"{n:,} {reason}" for reason, n in counts["removed"].items() if n)
    changed = ", ".join(f"{n:,} {rule}" for rule, n in counts["changed"].items() if n)
    kept = {split: len(documents) for split, documents in corpus.splits.items()}
    return (f"{counts['read']['documents']:,} documents, {counts['read']['bytes'] / 1e6:.1f} MB; "
            f"changed: {changed or 'none'}; removed: {removed or 'none'}; "
            f"{kept['train']:,} train, {kept['heldout']:,} held out")


@contextlib.contextmanager
def _stage(log: Log, name: str) -> Iterator[list[str]]:
    """Logs one line when the stage is done: its name, what the block noted, and its seconds."""
    start, note = time.monotonic(), []
    yield note
    log(f"prepare: {name}: {'; '.join(note)} ({time.monotonic() - start:.1f} s)")


@contextlib.contextmanager
def _workspace(out: str) -> Iterator[str]:
    """A directory to write into: it becomes `out` when the block ends well, and vanishes when it does not."""
    if store.is_remote(out):
        yield out
        return
    out = os.path.abspath(os.path.expanduser(out))
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out}: expected a prepared directory, an empty one or none, got something else; "
                         "use another directory, or move that away")
    temporary = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.partial")
    lock = _claim(temporary, out)
    try:
        yield temporary
        os.rename(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise ValueError(f"{out}: expected room for the prepared data, got a full disk; free some space, "
                             "or use another directory") from error
        raise
    finally:
        os.close(lock)


def _claim(temporary: str, out: str) -> int:
    """Makes an empty `temporary` that only this process holds: a lock on it dies with its process."""
    os.makedirs(temporary, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(temporary)):
            raise BlockingIOError  # the other process has just finished, and renamed it
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise ValueError(f"{out}: expected nobody else at work there, got another process that is preparing "
                         "it; wait until it has ended") from None
    for name in os.listdir(temporary):  # left behind by a process that was killed
        path = os.path.join(temporary, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return lock
