"""Prepares the examples of a task: tokenises them once and writes them as columns.

    manifest.json  tokenizer.model
    <source>/<split>/<column>/      one token store per column of the task
    <source>/<split>/records.jsonl  the records of held-out and test examples, as their files had

The split is train, heldout or test. The directory appears only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from etils import epath

import lmjax
from lmjax.config import differences, plain
from lmjax.data import store
from lmjax.data.config import DataConfig
from lmjax.data.reading import Reader
from lmjax.data.text.records import Broken
from lmjax.data.text.sources import SourceConfig, check_budget, identity
from lmjax.data.tokenizers import Tokenizer, prepared_tokenizer
from lmjax.errors import UserError, first_line
from lmjax.runtime.files import check_writable, new_directory, when_full
from lmjax.runtime.sealed import AGAIN, FILES, hashes_of, read_sealed
from lmjax.tasks.columns import ColumnWriter
from lmjax.tasks.examples import Example, check_columns, examples, is_heldout, sources_of
from lmjax.tasks.task import Facts, Record, Sizes, Task

FORMAT, VERSION = store.EXAMPLES, 1
RECORDS = "records.jsonl"
# In an entry of the manifest: examples that were cut, and their tokens; then the same of targets.
CUTS = (("cut_examples", "cut_tokens"), ("cut_targets", "cut_target_tokens"))
SPOKE_EVERY = 5.0  # seconds between lines of progress
Log = Callable[[str], None]


class Setting(NamedTuple):
    """What decides the columns of the examples."""

    task: Task
    data: DataConfig
    sizes: Sizes
    family: str = "encoder"  # of the model

    def decides(self) -> dict[str, Any]:
        """The settings that decide what is written, as plain JSON values."""
        sources = [plain(source) for source in self.data.sources]
        for source in sources:
            del source["weight"]  # may change from run to run
        sizes = self.sizes._asdict()
        del sizes["positions"]  # limits what is answered
        task = self.task.decides()
        if self.family == "encdec":
            task.pop("max_tokens", None)  # its rows leave no room for answers
        return {"task": task, "family": self.family, "sources": sources,
                "sizes": sizes, "tokenizer": plain(self.data.tokenizer),
                "heldout_fraction": self.data.heldout_fraction,
                "broken_budget": self.data.broken_budget}


def prepare_examples(setting: Setting, out: str, *,
                     make_tokenizer: Callable[[Sequence[str]], Tokenizer],
                     make_reader: Callable[[Tokenizer], Reader], log: Log,
                     resumes: bool = False) -> str:
    """Makes a directory of prepared examples, unless `out` already is what `setting` describes.

    Args:
      setting: the task, its files, and how long its rows are.
      out: the directory to make, on a local or mounted file system.
      make_tokenizer: makes the tokenizer from texts of the training examples, which it need not
        read.
      make_reader: says how the model reads texts with that tokenizer.
      log: called with each line of progress.
      resumes: whether the model may be gone that the run began from, so that `make_reader` does
        not know how it reads.
    Returns:
      the directory.
    Raises:
      UserError: a file cannot be read, too many of its records are no examples of the task, or
        `out` holds something else.
    """
    if store.is_remote(out):
        raise UserError("a local directory, or one on a mounted file system, for the examples of "
                        "a task", out, "leave data.directory out", where="config.data.directory")
    if (epath.Path(out) / "manifest.json").exists():
        _reuse(setting, out, log, None if resumes else make_reader)
        return out
    check_writable(out, "config.data.directory")
    full = UserError("room for the prepared examples", "a full disk", "free some space and start "
                     "again", where=out)
    began = time.monotonic()
    with when_full(full), new_directory(Path(out)) as folder:
        reading = _Reading(setting, log)
        tokenizer = setting.task.tokenizer(make_tokenizer(_Texts(reading, setting)), log)
        reader = make_reader(tokenizer)
        facts = _facts(reading)
        entries = {}
        for name, split, source in sources_of(setting.task, setting.data):
            entries[f"{name}/{split}"] = _Part(setting, reader, facts, name, split,
                                               source).write(reading, folder)
        (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())
        kept = [str(file.relative_to(folder)) for file in sorted(folder.rglob(RECORDS))]
        manifest = _manifest(setting, tokenizer, facts, entries) | {
            "reads": _reads(reader),
            FILES: hashes_of(epath.Path(folder), ["tokenizer.model", *kept])}
        store.write_manifest(str(folder), manifest)
    for line in _table(entries):
        log(line)
    log(f"examples: {out} is ready, fingerprint {manifest['fingerprint'][:12]} "
        f"({time.monotonic() - began:.1f} s)")
    return out


def read_manifest(directory: str) -> dict[str, Any]:
    """The manifest of a directory of prepared examples.

    Raises:
      UserError: there is none, it is damaged, or it is of something else.
    """
    path = epath.Path(directory) / "manifest.json"
    if not path.exists():
        raise UserError("prepared examples", "none", AGAIN, where=str(path))
    manifest = read_sealed(path)
    got = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if got != (FORMAT, VERSION):
        raise UserError(f"{FORMAT} version {VERSION}", got, "use another data.directory, or "
                        "delete this one", where=str(path))
    return manifest


def _reads(reader: Reader) -> dict[str, Any]:
    """What a model puts around a text, as plain JSON values."""
    return {"prefix": list(reader.prefix), "middle": list(reader.middle),
            "suffix": list(reader.suffix), "second_type": reader.second_type,
            "start": reader.start_id, "ends": list(reader.end_ids)}


def _reuse(setting: Setting, out: str, log: Log,
           make_reader: Callable[[Tokenizer], Reader] | None) -> None:
    """Checks that `out` was prepared as `setting` says; warns if the files have changed since."""
    manifest = read_manifest(out)
    changed = differences(manifest["config"], setting.decides())
    if changed:
        raise UserError("the settings that its examples were prepared with",
                        f"others ({changed[0]})", "undo that, or use another directory", where=out)
    if make_reader is not None:
        reads = _reads(make_reader(prepared_tokenizer(out)))
        if reads != manifest.get("reads", reads):
            raise UserError(f"examples that are read as the model reads texts ({reads})",
                            manifest["reads"], "use another directory", where=out)
    log(f"examples: using those prepared in {out}, fingerprint {manifest['fingerprint'][:12]}")
    for name, split, source in sources_of(setting.task, setting.data):
        was, now = manifest["splits"][f"{name}/{split}"]["identity"], identity(source)
        if now and was != now:
            log(f"examples: warning: the files of source {name} have changed since; to read them "
                f"again, delete {out} or use another directory")


class _Reading:
    """Reads the records of splits, checks their columns, and says how far it is."""

    def __init__(self, setting: Setting, log: Log):
        self.setting, self.log, self.spoke = setting, log, time.monotonic()
        self.splits = sources_of(setting.task, setting.data)

    def examples(self, split: str, source: SourceConfig) -> Iterator[Example | Broken]:
        """The examples of one source that belong to a split."""
        data, checked, seen = self.setting.data, False, 0
        own = not self.setting.task.validation and source in data.sources
        for item in examples(source, data.broken_budget):
            seen += 1
            if time.monotonic() > self.spoke + SPOKE_EVERY:
                self.log(f"examples: {seen:,} records of {source.name} read for {split}")
                self.spoke = time.monotonic()
            if isinstance(item, Broken):
                yield item
                continue
            if not checked:
                check_columns(self.setting.task, item.record, source)
                checked = True
            held = own and is_heldout(item.record, data.heldout_fraction)
            if not own or held == (split == "heldout"):
                yield item

    def records(self, split: str) -> Iterator[Record]:
        """The records of all sources of a split."""
        for _, its, source in self.splits:
            if its == split:
                for item in self.examples(split, source):
                    if isinstance(item, Example):
                        yield item.record


def _facts(reading: _Reading) -> Facts:
    """What the task keeps of the training examples.

    Raises:
      UserError: the task refuses them; or no record is an example, and why the first one is none.
    """
    task = reading.setting.task
    try:
        return task.facts(reading.records("train"))
    except UserError:
        first: UserError | None = None
        for record in reading.records("train"):
            try:
                task.truth(record)
            except UserError as error:
                first = first or error
            else:
                raise  # of the facts: some records are examples
        raise _no_examples(first) from None


def _no_examples(first: UserError | None) -> UserError:
    """Says that no record is an example; `first` says why the first one is none."""
    got = f"none (the first record: {first_line(first)})" if first else "no record"
    return UserError("examples to train on", got, "correct config.task or the files",
                     where="config.data.sources")


class _Texts(Sequence[str]):
    """Texts of the training examples for a tokenizer, read when they are first asked for."""

    def __init__(self, reading: _Reading, setting: Setting):
        self._reading, self._setting, self._found = reading, setting, list[str]()

    def __len__(self) -> int:
        return len(self._texts())

    def __getitem__(self, index: Any) -> Any:
        return self._texts()[index]

    def _texts(self) -> list[str]:
        if not self._found:
            room = 4 * self._setting.data.tokenizer.train_bytes
            first: UserError | None = None
            for record in self._reading.records("train"):
                try:
                    self._found += self._setting.task.texts(record)
                except UserError as error:
                    first = first or error
                room -= sum(map(len, self._found[-4:]))
                if room < 0:
                    break
            if not self._found:
                raise _no_examples(first)
        return self._found


class _Part(NamedTuple):
    """One split of one source, to be written."""

    setting: Setting
    reader: Reader
    facts: Facts
    name: str
    split: str
    source: SourceConfig

    def write(self, reading: _Reading, folder: Path) -> dict[str, Any]:
        """Encodes the examples and writes their columns; returns the entry in the manifest.

        Raises:
          UserError: no examples, or too many records that are none.
        """
        place = folder / self.name / self.split
        place.mkdir(parents=True)
        with ColumnWriter() as columns, contextlib.ExitStack() as stack:
            kept: TextIO | None = None
            if self.split != "train":
                kept = stack.enter_context((place / RECORDS).open("w", encoding="utf-8"))
            number, cuts, left_out = self._encode(reading, columns, kept)
            budget = self.setting.data.broken_budget
            if left_out:
                check_budget(self.source, documents=number, broken=len(left_out),
                             example=left_out[0], budget=budget)
            if self.split == "train" and columns.most("loss_mask") == 0:
                raise UserError("something to learn within data.seq_len="
                                f"{self.setting.data.seq_len} tokens of an example",
                                f"none in {number:,} examples", "raise it, or shorten them",
                                where=f"source {self.name} ({self.source.uri})")
            if not columns.ids:
                raise UserError(f"at least one example to be {self.split}", "none", "add examples, "
                                "name files in task.validation, or raise data.heldout_fraction",
                                where=f"source {self.name} ({self.source.uri})")
            written = columns.write(str(folder), f"{self.name}/{self.split}")
        entry = {"examples": number, "windows": len(columns.ids), "columns": written,
                 "left_out": len(left_out), "identity": identity(self.source)}
        for (what, tokens), cut in zip(CUTS, cuts, strict=True):
            if cut or self.setting.task.writes or what == CUTS[0][0]:
                entry |= {what: len(cut), tokens: sum(cut)}
        return entry

    def _encode(self, reading: _Reading, columns: ColumnWriter, kept: TextIO | None) -> tuple[
            int, list[list[int]], list[tuple[str, str]]]:
        """Returns the number of examples, the tokens of each cut by `CUTS`, what was left out."""
        number, cuts, left_out = 0, [list[int](), list[int]()], list[tuple[str, str]]()
        task = self.setting.task
        for item in reading.examples(self.split, self.source):
            try:
                if isinstance(item, Broken):
                    raise UserError("a record", item.reason, "repair it")
                encoded = task.encode(item.record, self.reader, self.facts, self.setting.sizes)
            except UserError as error:
                left_out.append((item.id, first_line(error)))
                continue
            assert item.id not in columns.ids[-1:], item.id  # what has one id is one example
            for window in (encoded.columns, *encoded.more):
                columns.add(item.id, window)
            number += 1
            for cut, tokens in zip(cuts, (encoded.cut, encoded.cut_target), strict=True):
                if tokens:
                    cut.append(tokens)
            if kept is not None:
                print(json.dumps(item.record, ensure_ascii=False), file=kept)
        return number, cuts, left_out


def _manifest(setting: Setting, tokenizer: Tokenizer, facts: Facts,
              splits: dict[str, Any]) -> dict[str, Any]:
    """What is known of the examples. The fingerprint covers what decides the rows of a run."""
    hashes = {name: {column: entry["sha256"] for column, entry in part["columns"].items()}
              for name, part in splits.items()}
    rows = [FORMAT, VERSION, tokenizer.hash, facts, hashes]
    return {
        "format": FORMAT, "version": VERSION,
        "fingerprint": hashlib.sha256(store.canonical(rows).encode()).hexdigest(),
        "config": setting.decides(), "versions": lmjax.versions(),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "facts": facts, "splits": splits,
    }


def _table(splits: dict[str, Any]) -> list[str]:
    """How many examples each split has, and what was cut and left out, as lines of a table."""
    writes = any(CUTS[1][0] in part for part in splits.values())
    heads: tuple[str, ...] = ("inputs too long", "tokens cut", "targets too long", "tokens cut")
    heads = heads if writes else ("too long", "tokens cut")
    rows: list[tuple[str, ...]] = [("examples of", "number", "windows", *heads, "left out")]
    for name, part in splits.items():
        cells = [name, f"{part['examples']:,}", f"{part['windows']:,}"]
        for what, tokens in CUTS[: 1 + writes]:
            count = part.get(what, 0)
            cells += [f"{count:,} ({count / part['examples']:.1%})", f"{part.get(tokens, 0):,}"]
        rows.append((*cells, f"{part['left_out']:,}"))
    if all(part["windows"] == part["examples"] for part in splits.values()):
        rows = [(*row[:2], *row[3:]) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
        row[1:], widths[1:], strict=True))]) for row in rows]
