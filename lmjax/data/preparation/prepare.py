"""Prepares data: reads, cleans, filters, removes what is there twice, tokenises, writes the store and a report.

The stages (lmjax/prepare_stages.py) lie in `.NAME.partial` beside the directory that is made. It gets its name when
it is whole, so that it exists completely or not at all; what is stopped goes on after the last finished stage. For
gs:// and s3:// the stages are in a temporary directory of this machine, and the manifest is copied last.
"""

from __future__ import annotations

import contextlib
import functools
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
from lmjax.data.config import DataConfig, check_prepared_by
from lmjax.data.preparation import shards
from lmjax.data.preparation.engine import Engine, Log, versions
from lmjax.data.preparation.engine_beam import BeamEngine
from lmjax.data.preparation.report import write_data_report
from lmjax.data.preparation.stages import Prepared, run_stages
from lmjax.data.preparation.writer import baselines, contamination, write_store
from lmjax.data.text import sources
from lmjax.data.text.clean import check_installed
from lmjax.data.tokenizers import Tokenizer, TokenizerFactory, make_tokenizer
from lmjax.runtime.files import claim, when_full


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(config: DataConfig, out: str, *, make_tokenizer: TokenizerFactory = make_tokenizer,
            log: Log = to_stderr) -> str:
    """Makes a prepared data directory, or finds that `out` already is that one.

    Args:
      config: the data config; sources must not be synthetic.
      out: the directory to make: local, gs:// or s3://.
      make_tokenizer: makes the tokenizer from its config and the training texts.
      log: called with each line of progress.
    Returns:
      the directory.
    Raises:
      ValueError: bad sources, or a package that they need and that is not installed; `out` holds other data, or
        something else; no space left.
    """
    if config.synthetic:
        raise ValueError("data.sources: expected text to prepare, got synthetic data, which needs no "
                         "preparing; train on it directly")
    out = str(out).rstrip("/")
    if (epath.Path(out) / "manifest.json").exists():
        _reuse(config, out, log)
        return out
    check_installed(config.clean)
    start = time.monotonic()
    with _workspace(out) as folder:
        curate = config.curate
        make = functools.partial(BeamEngine, options=curate.beam) if curate.beam else Engine
        with make(folder, workers=curate.workers, memory_mib=curate.memory_mib, log=log) as engine:
            made = run_stages(config, engine, make_tokenizer)
            inputs = {"tokens": made.tokens.receipt["output"], "text": made.texts[-1].digest}
            built = engine.stage("store", config.prepared_by(), inputs, lambda f: _build(config, made, f, log),
                                 describe=lambda facts: f"{facts['tokens']:,} tokens")
        _publish(built.folder, out)
    log(f"prepare: {out} is ready: {built.facts['tokens']:,} tokens, fingerprint {built.facts['fingerprint'][:12]} "
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


def _build(config: DataConfig, made: Prepared, folder: str, log: Log) -> dict[str, Any]:
    """Everything that the prepared directory holds."""
    entries = write_store(config, made, folder)
    path = epath.Path(folder)
    (path / "tokenizer.model").write_bytes(made.tokenizer.to_bytes())
    result = baselines(entries, made.tokenizer, folder)
    (path / "baselines.json").write_text(json.dumps(result, indent=1) + "\n")
    scores = ", ".join(f"{b['name']} {b['bits_per_byte']:.3f}" for b in result["baselines"])
    log(f"prepare: n-gram baselines: {scores} bits per byte of held-out text")
    (path / "receipts").mkdir()
    for stage in made.stages:
        text = json.dumps(stage.receipt, indent=1, ensure_ascii=False)
        (path / "receipts" / f"{stage.receipt['stage']}.json").write_text(text + "\n")
    _write_ledger(made, str(path / "ledger.parquet"))
    found = contamination(made)
    (path / "contamination.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    manifest = _manifest(config, made.tokenizer, entries)
    store.write_manifest(folder, manifest)
    write_data_report(config, made, entries, found, folder)
    tokens = sum(entry[split]["tokens"] for entry in entries.values() for split in ("train", "heldout"))
    return {"fingerprint": manifest["fingerprint"], "tokens": tokens}


def _write_ledger(made: Prepared, path: str) -> None:
    """One row for each document that went: id, source, stage, rule, by (the document that stays), value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "source", "stage", "rule", "by")]
                       + [("value", pa.float64())])
    with pq.ParquetWriter(path, schema, compression="zstd") as out:
        for text in made.texts:
            for part in text.parts:
                rows = shards.read(f"{part.path}.ledger").to_pydict()
                count = len(rows["id"])
                rows |= {"source": [part.source] * count, "stage": [text.stage.receipt["stage"]] * count}
                if count:
                    out.write_table(pa.table({name: rows[name] for name in schema.names}, schema=schema))


def trace(directory: str, name: str) -> list[str]:
    """What became of the document of that id, and of those that went because of it: a sentence each.

    Raises:
      ValueError: no prepared directory, or no such document.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lines = []
    for source, entry in store.read_manifest(directory)["sources"].items():
        for split in ("train", "heldout"):
            if name in store.SplitStore(directory, source, split, entry[split]).ids:
                lines.append(f"{source}: {name} is in the {split} split")
    rows = pq.read_table(str(epath.Path(directory) / "ledger.parquet"))
    mine = rows.filter(pc.or_(pc.equal(rows["id"], name), pc.equal(rows["by"], name))).to_pylist()
    for row in mine:
        why = f" for {row['by']}, which stays" if row["by"] else ""
        lines.append(f"{row['source']}: {row['id']} was removed in {row['stage']} by {row['rule']}{why} "
                     f"({row['value']:.4g})")
    if not lines:
        raise ValueError(f"{directory}: expected the id of a document that was read, got {name!r}; ids.txt of each "
                         "split and ledger.parquet list them")
    return lines


def _manifest(config: DataConfig, tokenizer: Tokenizer, entries: dict[str, Any]) -> dict[str, Any]:
    """Everything about the data; the fingerprint covers what decides its rows."""
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
    """The directory that the stages are written into, for this process alone."""
    if store.is_remote(out):
        with tempfile.TemporaryDirectory(prefix="lmjax-prepare-") as folder, _when_full(out):
            yield folder
        return
    out = _local(out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out}: expected a prepared directory, an empty one or none, got something else; "
                         "use another directory, or move that away")
    folder = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.partial")
    lock = claim(folder, out)
    try:
        with _when_full(out):
            yield folder
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _when_full(out: str) -> contextlib.AbstractContextManager[None]:
    return when_full(ValueError(f"{out}: expected room for the prepared data, got a full disk; free some space and "
                                "start again (finished stages are kept), or use another directory"))


def _local(out: str) -> str:
    return os.path.abspath(os.path.expanduser(out))


def _publish(folder: str, out: str) -> None:
    if not store.is_remote(out):
        os.rename(folder, _local(out))
        return
    files = [os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names]
    for file in sorted(files, key=lambda file: (file == "manifest.json", file)):
        target = epath.Path(out) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(epath.Path(folder, file).read_bytes())
