"""The doctor's look at prepared data."""

import contextlib
import functools
import os
from typing import Any

from etils import epath

from lmjax.cli.doctor.diagnosis import GOOD, NOTE, Diagnosis
from lmjax.data.store import SplitStore, read_manifest
from lmjax.data.tokenizers import prepared_tokenizer
from lmjax.errors import UserError
from lmjax.monitoring.units import human_bytes
from lmjax.runtime.sealed import FILES, read_listed
from lmjax.tasks.prepare import read_manifest as read_examples

SPLITS = ("train", "heldout")


def is_prepared(path: str) -> bool:
    """Whether `path` is a directory of prepared data."""
    return (epath.Path(path) / "manifest.json").exists()


def is_unfinished(path: str) -> bool:
    """Whether `path` is the folder of the stages of a preparation that has not finished."""
    name = os.path.basename(os.path.abspath(path))
    return name.startswith(".") and name.endswith(".partial") and os.path.isdir(path)


def examine_prepared(path: str, whole: bool) -> Diagnosis:
    """Examines a directory of prepared data."""
    with contextlib.suppress(UserError):
        return _examine_examples(path, read_examples(path), whole)
    found = Diagnosis(path, "prepared data")
    manifests: list[dict[str, Any]] = []

    def manifest() -> str:
        manifests.append(read_manifest(path))
        return f"fingerprint {manifests[0]['fingerprint'][:12]}"

    if not found.check("manifest", manifest):
        return found
    found.check("tokenizer", lambda: _tokenizer(path, manifests[0]))
    for source, entry in manifests[0]["sources"].items():
        for split in SPLITS:
            found.check(f"{source}/{split}", functools.partial(
                _split, path, source, split, entry[split], whole))
    found.uses.append(f"lmjax train --config FILE --workdir DIR --config.data.directory={path}")
    if (epath.Path(path) / "ledger.parquet").exists():
        found.uses.append(f"lmjax trace --data {path} --id DOCUMENT")
    return found


def _examine_examples(path: str, manifest: dict[str, Any], whole: bool) -> Diagnosis:
    """Examines the examples of a task."""
    task = manifest["config"]["task"]["name"]
    found = Diagnosis(path, f"prepared examples of the task {task}")
    found.add(GOOD, "manifest", f"fingerprint {manifest['fingerprint'][:12]}")
    found.check("tokenizer", lambda: _tokenizer(path, manifest))
    for place, entry in manifest["splits"].items():
        found.check(place, functools.partial(_columns, path, place, entry, whole))
    found.uses.append(f"lmjax train --config FILE --workdir DIR --config.data.directory={path}")
    return found


def _columns(path: str, place: str, entry: dict[str, Any], whole: bool) -> str:
    for column, facts in entry["columns"].items():
        SplitStore(path, place, column, facts, memory_limit=0, verify=whole)
    read = "read and equal to the manifest's sha256" if whole else "not read (--quick)"
    return (f"{entry['examples']:,} examples, {entry['cut_examples']:,} of them cut, "
            f"{entry['left_out']:,} records left out; {read}")


def examine_unfinished(path: str, whole: bool) -> Diagnosis:
    """Examines the stages of a preparation that has not finished."""
    where = os.path.abspath(path)
    out = os.path.join(os.path.dirname(where), os.path.basename(where)[1:-len(".partial")])
    found = Diagnosis(path, f"the unfinished work of `lmjax prepare --out {out}`")
    done = sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
    found.add(NOTE, "stages", ", ".join(done) or "none has begun")
    found.uses.append(f"lmjax prepare --config FILE --out {out}    (goes on after the last stage)")
    return found


def _tokenizer(path: str, manifest: dict[str, Any]) -> str:
    tokenizer = prepared_tokenizer(path)
    for name in manifest.get(FILES, {}):
        read_listed(path, name, manifest)
    return f"{type(tokenizer).__name__} of {tokenizer.vocab_size:,} tokens"


def _split(path: str, source: str, split: str, facts: dict[str, Any], whole: bool) -> str:
    SplitStore(path, source, split, facts, memory_limit=0, verify=whole)
    read = "read and equal to the manifest's sha256" if whole else "not read (--quick)"
    return (f"{facts['documents']:,} documents, {facts['tokens']:,} tokens of "
            f"{human_bytes(facts['bytes'])} of text; {read}")
