"""Prepares data: cleans and deduplicates text, tokenises it, and writes a store and a report.

The folders of the stages are in `.NAME.partial` next to the prepared directory NAME. NAME appears
only when it is complete. Preparing that was interrupted continues after the last finished stage.
For gs:// the stages are in a temporary directory of this machine, and the manifest is copied last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from lmjax.data import store
from lmjax.data.config import CurateConfig, DataConfig, check_prepared_by
from lmjax.data.preparation.engine import Engine, Log, versions
from lmjax.data.preparation.engine_beam import BeamEngine
from lmjax.data.preparation.ledger import FILE, write_ledger
from lmjax.data.preparation.report import write_data_report
from lmjax.data.preparation.stages import Prepared, run_stages
from lmjax.data.preparation.writer import baselines, contamination, write_store
from lmjax.data.text import sources
from lmjax.data.text.clean import check_installed
from lmjax.data.tokenizers import Tokenizer, TokenizerFactory, sentencepiece_tokenizer
from lmjax.errors import UserError, first_line
from lmjax.runtime.files import check_writable, claim, when_full
from lmjax.runtime.sealed import FILES, hashes_of

# The files whose hashes the manifest has, besides the ledger; receipts hold times.
LISTED = ("tokenizer.model", "baselines.json", "contamination.json")


def to_stderr(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)


def prepare(config: DataConfig, out: str, *,
            make_tokenizer: TokenizerFactory = sentencepiece_tokenizer,
            log: Log = to_stderr) -> str:
    """Makes a directory of prepared data, unless `out` already is what `config` describes.

    Args:
      config: the data config; its sources must not be synthetic.
      out: the directory to make: local or gs://.
      make_tokenizer: makes the tokenizer from its config and the training texts. The default trains
        one or reads a SentencePiece model; `training.pretrained.make_tokenizer` also reads the
        directories of runs and Hugging Face models.
      log: called with each line of progress.
    Returns:
      the directory.
    Raises:
      UserError: a source cannot be read, a package that the config needs is not installed, `out`
        holds data of another config or other files, or the disk is full.
    """
    if config.synthetic:
        raise UserError("text to prepare", "synthetic data, which needs no preparing",
                        "train on it directly", where="data.sources")
    out = str(out).rstrip("/")
    if (epath.Path(out) / "manifest.json").exists():
        _reuse(config, out, make_tokenizer, log)
        return out
    check_installed(config.clean)
    start = time.monotonic()
    with _workspace(out) as folder:
        with _engine(config.curate, folder, log) as engine:
            made = run_stages(config, engine, make_tokenizer)
            inputs = {"tokens": made.tokens.digest, "text": made.finished.stage.digest}
            built = engine.stage("store", config.prepared_by(), inputs,
                                 lambda folder: _build(config, made, folder, log),
                                 describe=lambda facts: f"{facts['tokens']:,} tokens")
        _publish(built.folder, out)
    log(f"prepare: {out} is ready: {built.facts['tokens']:,} tokens, "
        f"fingerprint {built.facts['fingerprint'][:12]} ({time.monotonic() - start:.1f} s)")
    return out


def _reuse(config: DataConfig, out: str, make_tokenizer: TokenizerFactory, log: Log) -> None:
    """Checks that `out` was prepared as `config` says; warns if the sources have changed since."""
    manifest = store.read_manifest(out)
    check_prepared_by(config, manifest, out)
    _check_tokenizer(config, manifest, make_tokenizer, out)
    log(f"prepare: using the data prepared in {out}, fingerprint {manifest['fingerprint'][:12]}")
    for source in config.sources:
        was, now = manifest["sources"][source.name]["identity"], sources.identity(source)
        if now and was != now:
            log(f"prepare: warning: the files of source {source.name} have changed since; "
                f"to read them again, delete {out} or prepare another directory")


def _check_tokenizer(config: DataConfig, manifest: dict[str, Any],
                     make_tokenizer: TokenizerFactory, out: str) -> None:
    """Raises a UserError if the tokenizer is now elsewhere and another one."""
    was, now = manifest["config"]["tokenizer"].get("path"), config.tokenizer.path
    if now == was or not now:
        return
    wanted = manifest["tokenizer"]["hash"]
    try:
        found = make_tokenizer(config.tokenizer, ()).hash
        got = f"another ({found[:12]}) at {now}"
    except UserError as error:
        found, got = "", f"{now} ({first_line(error)})"
    if found != wanted:
        raise UserError(f"the tokenizer that the data was prepared with ({wanted[:12]})", got,
                        f"bring it back, set data.tokenizer.path={was}, or use another directory",
                        where=out)


def _engine(curate: CurateConfig, folder: str, log: Log) -> Engine:
    if curate.beam:
        return BeamEngine(folder, options=curate.beam, workers=curate.workers,
                          memory_mib=curate.memory_mib, log=log)
    return Engine(folder, workers=curate.workers, memory_mib=curate.memory_mib, log=log)


def _build(config: DataConfig, made: Prepared, folder: str, log: Log) -> dict[str, Any]:
    """Writes all files of the prepared directory; returns its fingerprint and token count."""
    entries = write_store(config, made, folder)
    path = epath.Path(folder)
    (path / "tokenizer.model").write_bytes(made.tokenizer.to_bytes())
    result = baselines(entries, made.tokenizer, folder)
    (path / "baselines.json").write_text(json.dumps(result, indent=1) + "\n")
    scores = ", ".join(f"{b['name']} {b['bits_per_byte']:.3f}" for b in result["baselines"])
    lossy = any("lost" in entry["heldout"] for entry in entries.values())
    log(f"prepare: n-gram baselines: {scores} bits per byte of {'decoded ' * lossy}held-out text")
    (path / "receipts").mkdir()
    for stage in made.stages:
        text = json.dumps(stage.receipt, indent=1, ensure_ascii=False)
        (path / "receipts" / f"{stage.name}.json").write_text(text + "\n")
    write_ledger(made, folder)
    found = contamination(made)
    (path / "contamination.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    listed = hashes_of(path, (*LISTED, FILE))
    manifest = _manifest(config, made.tokenizer, entries) | {FILES: listed}
    store.write_manifest(folder, manifest)
    write_data_report(config, made, entries, found, folder)
    tokens = sum(entry[split]["tokens"]
                 for entry in entries.values() for split in ("train", "heldout"))
    return {"fingerprint": manifest["fingerprint"], "tokens": tokens}


def _manifest(config: DataConfig, tokenizer: Tokenizer, entries: dict[str, Any]) -> dict[str, Any]:
    """Returns what is known of the data. The fingerprint covers what decides the rows of a run."""
    arrays = {name: {split: entry[split]["sha256"] for split in ("train", "heldout")}
              for name, entry in entries.items()}
    rows = [store.FORMAT, store.VERSION, tokenizer.hash, arrays]
    return {
        "format": store.FORMAT, "version": store.VERSION,
        "fingerprint": hashlib.sha256(store.canonical(rows).encode()).hexdigest(),
        "config": config.prepared_by(),
        "versions": versions(),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "sources": entries,
    }


@contextlib.contextmanager
def _workspace(out: str) -> Iterator[str]:
    """Yields the folder of the stages, locked for this process; removes it once `out` is made."""
    if not store.is_remote(out):
        check_writable(out, out)  # before links are followed: one may lead nowhere
        out = _local(out)
    full = when_full(UserError(
        "room for the prepared data", "a full disk", "free some space and start again (finished "
        "stages are kept), or use another directory", where=out))
    if store.is_remote(out):
        with tempfile.TemporaryDirectory(prefix="lmjax-prepare-") as folder, full:
            yield folder
        return
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError("a prepared directory, an empty one or none", "something else",
                        "use another directory, or move that away", where=out)
    if os.path.ismount(out):  # the finished directory is renamed, which cannot replace it
        raise UserError("a directory that can be replaced", "a mount point",
                        f"use one below it, such as {out}/prepared", where=out)
    check_writable(os.path.dirname(out), out)
    folder = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.partial")
    lock = claim(folder, out)
    try:
        with full:
            yield folder
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _local(out: str) -> str:
    """The absolute path of `out`, without links: a link to an empty directory is followed."""
    return os.path.realpath(os.path.expanduser(out))


def _publish(folder: str, out: str) -> None:
    """Moves or uploads the finished directory to `out`; the manifest is uploaded last."""
    if not store.is_remote(out):
        os.rename(folder, _local(out))
        return
    files = [os.path.relpath(os.path.join(at, name), folder)
             for at, _, names in os.walk(folder) for name in names]
    for file in sorted(files, key=lambda file: (file == "manifest.json", file)):
        target = epath.Path(out) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(epath.Path(folder, file).read_bytes())
