"""The token store: TensorStore (zarr3) arrays and a JSON manifest, on local disk or in gs://.

    manifest.json  tokenizer.model  baselines.json
    <source>/<split>/tokens/  <source>/<split>/offsets/  <source>/<split>/ids.txt

`tokens` holds the documents of the split end to end, each as BOS + text + EOS (uint16, or uint32
for a vocabulary over 65,536). Document d is tokens[offsets[d] : offsets[d + 1]]; offsets are int64.
ids.txt has the name of one document per line. baselines.json has the losses of n-gram models on the
held-out text, to compare a trained model with. The manifest is written last: a directory without
one is not a store. It has the sha256 of every array, of the other files and of itself.

A decoder predicts every token of a document except BOS. So a document has one prediction fewer than
it has tokens; `predictions` and `Documents.lengths` count predictions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorstore as ts
from etils import epath

from lmjax.errors import UserError, first_line
from lmjax.runtime.sealed import AGAIN, read_sealed, write_sealed

FORMAT, VERSION = "lmjax-tokens", 1
EXAMPLES = "lmjax-examples"  # the format of the examples of a task, which lmjax/tasks writes
SHARD = 1 << 24          # values per file, at most
CHUNK = 1 << 14          # values per compressed chunk: the least that a read decodes
CACHE_BYTES = 256 << 20  # limit of an open array's cache of chunks


def kvstore(path: str) -> dict[str, str]:
    """TensorStore's address of a directory: a local path or gs://bucket/dir."""
    if path.startswith("gs://"):
        bucket, _, rest = path.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": rest.rstrip("/") + "/"}
    if is_remote(path):
        raise UserError("a local path or gs://BUCKET/DIR", path, "use one of those",
                        where="data.directory")
    return {"driver": "file", "path": os.path.abspath(path) + "/"}


def is_remote(path: str) -> bool:
    """Whether a path names a bucket (or anything else with a scheme)."""
    return "://" in path


def digest(values: np.ndarray) -> str:
    """sha256 (hex) of an array's values in little-endian C order, however they are stored."""
    return hashlib.sha256(_little_endian(values)).hexdigest()


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values, for hashing and comparing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _little_endian(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data


def write_array(path: str, pieces: Iterable[np.ndarray], *, size: int, dtype: np.dtype) -> str:
    """Writes a 1-D integer array in shards of zstd-compressed chunks, each with a CRC32C.

    At most one shard is in memory at a time.

    Args:
      path: directory of the array, local or remote.
      pieces: parts of the array, in order.
      size: number of values.
      dtype: of the stored values.
    Returns:
      the array's `digest`.
    """
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}},
              {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
    # An array smaller than a shard has one shard: its size, rounded up to whole chunks.
    shard = min(SHARD, -(-max(size, 1) // CHUNK) * CHUNK)
    metadata = {
        "shape": [size], "data_type": dtype.name, "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [{"name": "sharding_indexed",
                    "configuration": {"chunk_shape": [CHUNK], "codecs": codecs}}],
    }
    # A chunk of zeros is stored like any other: only then is a missing chunk a damaged array.
    spec = {"driver": "zarr3", "kvstore": kvstore(path), "metadata": metadata,
            "store_data_equal_to_fill_value": True}
    array = ts.open(spec, create=True, delete_existing=True).result()
    buffer = np.empty(shard, dtype)
    filled = written = 0  # values in the buffer, and values written from it before
    sha256 = hashlib.sha256()

    def flush() -> None:
        array[written : written + filled].write(buffer[:filled]).result()
        sha256.update(_little_endian(buffer[:filled]))

    for piece in pieces:
        while len(piece):
            part = piece[: shard - filled]
            buffer[filled : filled + len(part)] = part
            filled, piece = filled + len(part), piece[len(part) :]
            if filled == shard:
                flush()
                written, filled = written + filled, 0
    flush()
    return sha256.hexdigest()


def open_array(path: str) -> ts.TensorStore:
    """Opens an array of `write_array` for reading; a missing file is an error, not zeros."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    spec = {"driver": "zarr3", "kvstore": kvstore(path), "recheck_cached_data": False,
            "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True, context=context).result()


def write_split(directory: str, source: str, split: str, documents: Iterable[np.ndarray],
                ids: Iterable[str], *, vocab_size: int, text_bytes: int,
                lengths: Sequence[int] | np.ndarray | None = None) -> dict[str, Any]:
    """Writes one split of one source.

    Args:
      directory: the prepared directory.
      source: name of the source.
      split: train or heldout.
      documents: integer token ids of each document, with BOS and EOS.
      ids: one per document, without newlines.
      vocab_size: number of token ids, which decides the dtype.
      text_bytes: UTF-8 bytes of the text that the tokens stand for.
      lengths: tokens of each document, BOS and EOS included; needed if `documents` can be iterated
        only once.
    Returns:
      the split's entry in the manifest.
    """
    if lengths is None:
        lengths = [len(document) for document in documents]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    dtype, total = token_dtype(vocab_size), int(offsets[-1])
    path = epath.Path(directory) / source / split
    path.mkdir(parents=True, exist_ok=True)
    tokens = write_array(str(path / "tokens"), documents, size=total, dtype=dtype)
    write_array(str(path / "offsets"), [offsets], size=len(offsets), dtype=offsets.dtype)
    sha256 = hashlib.sha256()
    with (path / "ids.txt").open("wb") as out:
        for name in ids:
            line = f"{name}\n".encode()
            out.write(line)
            sha256.update(line)
    return {
        "documents": len(lengths), "tokens": total, "predictions": total - len(lengths),
        "bytes": text_bytes, "dtype": dtype.name,
        "sha256": {"tokens": tokens, "offsets": digest(offsets), "ids": sha256.hexdigest()},
    }


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of stored tokens."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_manifest(directory: str, manifest: dict[str, Any]) -> None:
    """Writes the manifest, after which the directory is a store."""
    write_sealed(epath.Path(directory) / "manifest.json", manifest)


def read_manifest(directory: str) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises:
      UserError: there is none, it is damaged, or it has another version.
    """
    path = epath.Path(directory) / "manifest.json"
    if not path.exists():
        raise UserError(f"prepared data in {directory}", "no manifest.json there",
                        "prepare it first, or correct data.directory")
    got = manifest = read_sealed(path)
    if isinstance(manifest, dict):
        got = manifest.get("format"), manifest.get("version")
    if got == (EXAMPLES, 1):
        raise UserError("prepared text", "the examples of a task", "name that task, or use another "
                        "data.directory", where=str(path))
    if got != (FORMAT, VERSION):
        raise UserError(f"{FORMAT} version {VERSION}", got, "prepare the data again",
                        where=str(path))
    return manifest


class Documents(Protocol):
    """Documents, each BOS + text + EOS: document d is tokens offsets[d] to offsets[d + 1] - 1."""

    predictions: int     # of all documents: their tokens, but one fewer per document
    bytes: int           # UTF-8 bytes of their text
    fingerprint: str     # hash of their content
    offsets: np.ndarray  # int64 [documents + 1]

    @property
    def lengths(self) -> np.ndarray:
        """Predictions of each document (its tokens minus one), int64 [documents]."""

    @property
    def ids(self) -> list[str]:
        """The name of each document."""

    @property
    def specials(self) -> tuple[int, int]:
        """The ids of BOS and EOS."""

    def gather(self, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads ranges of tokens: range p begins at token starts[p] and has sizes[p] tokens.

        Returns:
          (flat, at) such that range p is flat[at[p] : at[p] + sizes[p]].
        """


class SplitStore:
    """The documents of one split of one source, for reading.

    Args:
      directory: the prepared directory.
      source: name of the source.
      split: train or heldout.
      facts: the split's entry in the manifest.
      memory_limit: bytes. If all tokens of the split fit, they are loaded now; otherwise each read
        takes its ranges from the files.
      verify: reads everything now and compares its sha256 with the manifest.
    Raises:
      UserError: an array or a file of it is missing, has another size than the manifest says, or
        holds other values. Of tokens that stay in their files, a damaged chunk is noticed when it
        is read, and whole chunks of other tokens only with `verify`.
    """

    def __init__(self, directory: str, source: str, split: str, facts: dict[str, Any], *,
                 memory_limit: int = 1 << 30, verify: bool = False):
        self.path, self.facts = epath.Path(directory) / source / split, facts
        self.documents, self.predictions = facts["documents"], facts["predictions"]
        self.bytes = facts["bytes"]
        self.fingerprint = hashlib.sha256(canonical(facts["sha256"]).encode()).hexdigest()
        self._tokens = self._open("tokens", facts["tokens"])
        self.offsets = self._read(self._open("offsets", facts["documents"] + 1), "offsets")
        self._check("offsets", self.offsets)
        fits = facts["tokens"] * np.dtype(facts["dtype"]).itemsize <= memory_limit
        self._memory = self._read(self._tokens, "tokens") if fits else None
        if fits or verify:
            self._check("tokens", self.tokens())
        if verify:
            _ = self.ids

    @property
    def lengths(self) -> np.ndarray:
        """Predictions of each document (its tokens minus one), int64 [documents]."""
        return np.diff(self.offsets) - 1

    @functools.cached_property
    def ids(self) -> list[str]:
        """The name of each document.

        Raises:
          UserError: the file is missing, or is another one.
        """
        file = self.path / "ids.txt"
        content = file.read_bytes() if file.exists() else None
        got = "none" if content is None else f"sha256 {hashlib.sha256(content).hexdigest()}"
        if content is None or got != f"sha256 {self.facts['sha256']['ids']}":
            raise self._damaged("ids", f"{got:.19}")
        return content.decode().split("\n")[:-1]

    @functools.cached_property
    def specials(self) -> tuple[int, int]:
        """The ids of BOS and EOS, read from the first document."""
        flat, at = self.gather(np.array([0, self.offsets[1] - 1]), np.array([1, 1]))
        return int(flat[at[0]]), int(flat[at[1]])

    def tokens(self) -> np.ndarray:
        """All tokens of the split, uint16 or uint32 [tokens]; not a copy if they are in memory."""
        return self._memory if self._memory is not None else self._read(self._tokens, "tokens")

    def gather(self, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads ranges of tokens: range p begins at token starts[p] and has sizes[p] tokens.

        Returns:
          (flat, at) such that range p is flat[at[p] : at[p] + sizes[p]].
        """
        if self._memory is not None:
            return self._memory, starts
        # Reads a chunk once for all its ranges, and all chunks concurrently.
        with ts.Batch() as batch:
            ranges = zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
            pending = [self._tokens[begin:end].read(batch=batch) for begin, end in ranges]
        try:
            flat = np.concatenate([p.result() for p in pending])
        except ValueError as error:
            raise self._damaged("tokens", error) from error
        return flat, np.cumsum(sizes) - sizes

    def _open(self, name: str, size: int) -> ts.TensorStore:
        try:
            array = open_array(str(self.path / name))
        except ValueError as error:
            raise self._damaged(name, error) from error
        if array.shape != (size,):
            raise self._damaged(name, f"the shape {list(array.shape)} where the manifest says "
                                f"{size} values")
        self._check_files(name, array)
        return array

    def _check_files(self, name: str, array: ts.TensorStore) -> None:
        """Compares the files of an array's shards with those that its size asks for."""
        shard = array.chunk_layout.write_chunk.shape
        assert shard is not None and shard[0] is not None
        wanted = {f"c/{i}" for i in range(math.ceil(array.shape[0] / shard[0]))}
        listed = ts.KvStore.open(kvstore(str(self.path / name))).result().list().result()
        if missing := sorted(wanted - {key.decode() for key in listed}):
            raise self._damaged(name, f"one without {', '.join(missing[:3])}")

    def _read(self, array: ts.TensorStore, name: str) -> np.ndarray:
        try:
            return array.read().result()
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _check(self, name: str, values: np.ndarray) -> None:
        """Compares an array with its sha256; that takes about a second per GB."""
        if (got := digest(values)) != self.facts["sha256"][name]:
            raise self._damaged(name, f"sha256 {got[:12]}")

    def _damaged(self, name: str, got: object) -> UserError:
        kind, file = ("file", "ids.txt") if name == "ids" else ("array", name)
        return UserError(f"the {kind} of sha256 {self.facts['sha256'][name][:12]}", first_line(got),
                         AGAIN, where=str(self.path / file))
