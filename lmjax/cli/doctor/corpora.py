"""The doctor's look at text to train on: files, directories, and sources such as jsonl:*.jsonl."""

import collections
import json
import os
import shlex
from collections.abc import Sequence

from lmjax.cli.doctor.diagnosis import BAD, GOOD, NOTE, Diagnosis
from lmjax.data.text.formats import CorpusFile, describe_file
from lmjax.data.text.sources import SCHEMES, SourceConfig, units
from lmjax.monitoring.units import human_bytes

LOOKED_AT = 1000  # records of a file
LOOKED_AT_QUICKLY = 20
MOST_FILES = 500  # of a directory or a source; more are counted, not opened
MOST_PROBLEMS = 5  # that are told one by one
# Format of a file -> scheme of a source; of text, every file is one document.
SCHEME = {"json": "jsonl"}


def is_source(path: str) -> bool:
    """Whether `path` is the uri of a source of text."""
    scheme, _, rest = path.partition(":")
    return scheme in SCHEMES and bool(rest) and not os.path.exists(path)


def is_corpus(path: str) -> bool:
    """Whether `path` is a file, or a directory that holds files, itself or in its folders."""
    return os.path.isfile(path) or (os.path.isdir(path) and any(names for _, _, names in
                                                                os.walk(path)))


def examine_source(path: str, whole: bool) -> Diagnosis:
    """Examines the files of a source."""
    found = Diagnosis(path, "a source of text")
    files: list[str] = []

    def listed() -> str:
        source = SourceConfig("source", path)
        files.extend(file for unit in units(source, 1 << 40) for _, file in unit)
        return f"{len(files):,}"

    if found.check("files", listed) and path.partition(":")[0] != "tfds":
        _add_files(found, files, whole)
    found.uses += _uses(path)
    return found


def examine_corpus(path: str, whole: bool) -> Diagnosis:
    """Examines a file, or all files of a directory."""
    if os.path.isdir(path):
        found = Diagnosis(path, "a directory of files, none of which lmjax wrote")
        formats = _add_files(found, _files(path), whole)
        if len(formats) == 1:
            found.uses += _uses(f"{SCHEME.get(formats[0], formats[0])}:{path.rstrip('/')}/**/*")
        return found
    file = describe_file(path, limit=LOOKED_AT if whole else LOOKED_AT_QUICKLY)
    found = Diagnosis(path, f"a file of {_format(file)}")
    found.add(BAD if file.problem else GOOD, "content", file.problem or _records(file))
    found.uses += _uses(f"{SCHEME.get(file.format, file.format)}:{path}")
    return found


def _files(folder: str) -> list[str]:
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names
                  if not name.startswith("."))


def _add_files(found: Diagnosis, paths: Sequence[str], whole: bool) -> list[str]:
    """Adds a finding per format and per problem; returns the formats."""
    limit = LOOKED_AT if whole else LOOKED_AT_QUICKLY
    for path in paths:
        if not os.path.isfile(path):
            what = "a link to nothing" if os.path.islink(path) else "no file"
            found.add(BAD, "files", f"{path} is {what}")
    paths = [path for path in paths if os.path.isfile(path)]
    files = {path: describe_file(path, limit=limit) for path in paths[:MOST_FILES]}
    kinds = collections.Counter(map(_format, files.values()))
    for kind, count in kinds.most_common():
        size = sum(os.path.getsize(path) for path, file in files.items() if _format(file) == kind)
        found.add(GOOD, "files", f"{count:,} of {kind}, {human_bytes(size)}")
    if len(paths) > MOST_FILES:
        found.add(NOTE, "files", f"{len(paths) - MOST_FILES:,} more were not opened")
    bad = [(path, file.problem) for path, file in files.items() if file.problem]
    for path, problem in bad[:MOST_PROBLEMS]:
        found.add(BAD, "content", problem if path in problem else f"{path}: {problem}")
    if len(bad) > MOST_PROBLEMS:
        found.add(BAD, "content", f"{len(bad) - MOST_PROBLEMS:,} more files have a problem")
    return sorted({file.format for file in files.values()})


def _format(file: CorpusFile) -> str:
    packed = f", compressed with {' and '.join(file.compression)}" if file.compression else ""
    code = f" in {file.encoding}" if file.encoding not in ("", "utf-8") else ""
    return f"{file.format or 'an unknown format'}{code}{packed}"


def _records(file: CorpusFile) -> str:
    return f"{file.records:,} record(s) looked at, {file.broken:,} without a text"


def _uses(uri: str) -> list[str]:
    sources = json.dumps([{"name": "mine", "uri": uri}], ensure_ascii=False)
    return [f"lmjax prepare --config FILE --out DIR --config.data.sources={shlex.quote(sources)}"]
