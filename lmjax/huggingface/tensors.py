"""Directories of safetensors files: read one tensor at a time, written one file at a time."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lmjax.config import choice
from lmjax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The dtypes that weights may be stored in: safetensors' code -> NumPy's dtype.
# Weights are read as float32, which holds all of them without loss.
STORED_DTYPES = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# The same dtypes by the name that --dtype takes -> safetensors' code.
DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")  # of weight files

CHUNK = 1 << 22  # values of a tensor that are compared at once


class Entry(NamedTuple):
    """One stored tensor, as its file's header describes it."""

    file: Path
    name: str  # within the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' code
    read: Callable[[], np.ndarray] | None = None  # of a tensor that is made of several stored ones


def open_tensors(directory: Path) -> dict[str, Entry]:
    """Lists the tensors of a directory by name. Reads only the headers of its files.

    Raises:
      UserError: a safetensors file is missing or truncated, or the index disagrees with the files.
    """
    index = directory / INDEX
    # As in transformers, a whole file goes before an index, which may be older.
    if (directory / SINGLE).is_file() or not index.is_file():
        return headers([directory / SINGLE])
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError("weight_map to name each tensor's file", f"{listed!r:.40}",
                        "fetch it again", where=str(index))
    files = sorted({directory / str(file) for file in listed.values()})
    if any(file.parent != directory for file in files):
        raise UserError("files of this directory", "a path out of it", "correct the index",
                        where=str(index))
    entries = headers(files)
    if {name: directory / file for name, file in listed.items()} != {
            name: entry.file for name, entry in entries.items()}:
        odd = sorted(listed.keys() ^ entries.keys()) or ["a tensor in another file"]
        raise UserError("the tensors that its files hold", f"another list (first: {odd[0]})",
                        "fetch the directory again", where=str(index))
    return entries


def read_tensor(entry: Entry) -> np.ndarray:
    """Reads one whole tensor, in its stored shape and dtype."""
    if entry.read is not None:
        return entry.read()
    with _open(entry.file) as opened:
        return opened.get_tensor(entry.name)


def equal_tensors(a: Entry, b: Entry) -> bool:
    """Whether two stored tensors have the same shape and values; holds `CHUNK` values of each."""
    if a.shape != b.shape or not a.shape:
        return a.shape == b.shape and np.array_equal(read_tensor(a), read_tensor(b))
    rows = max(CHUNK // max(math.prod(a.shape[1:]), 1), 1)
    with _open(a.file) as mine, _open(b.file) as other:
        parts = mine.get_slice(a.name), other.get_slice(b.name)
        return all(np.array_equal(*(part[at : min(at + rows, a.shape[0])] for part in parts))
                   for at in range(0, a.shape[0], rows))


def write_tensors(directory: Path, shapes: Mapping[str, tuple[int, ...]],
                  get: Callable[[str], np.ndarray], *, dtype: str, max_shard_bytes: int) -> None:
    """Writes the tensors `get(name)` into one or more safetensors files.

    Only the tensors of one file are held in memory at a time.

    Args:
      shapes: every tensor's shape by name, in the order in which they are written.
      get: returns the tensor of that name, in any float dtype.
      dtype: what the tensors are stored as: float32, bfloat16 or float16.
      max_shard_bytes: limit of a file's size. A tensor above it gets a file of its own.

    Raises:
      UserError: `dtype` is none of these.
      OSError: a file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    choice("dtype", dtype, DTYPE_CODES)
    stored = STORED_DTYPES[DTYPE_CODES[dtype]]
    sizes = {name: math.prod(shape) * stored.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                 for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: np.ascontiguousarray(get(name).astype(stored)) for name in names}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
            # safetensors lets only the owner read its files.
            (directory / file).chmod(directory.stat().st_mode & 0o666)
        except SafetensorError as error:  # not an OSError, even when the disk is full
            size = sum(sizes[name] for name in names)
            failed = OSError(f"{directory / file}: expected to write {size / 1e6:.1f} MB, got: "
                             f"{error}; make room, then try again")
            code = re.search(r"os error (\d+)", str(error))
            failed.errno = int(code[1]) if code else None
            raise failed from None
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True)
                      for name in names}
        write_json(directory / INDEX, {
            "metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      UserError: the file is missing, or holds anything else.
    """
    if not file.is_file():
        raise UserError(f"a Hugging Face model with {file.name}", "none", "check the path",
                        where=str(file.parent))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("JSON", error, "fetch it again", where=str(file)) from None
    if not isinstance(found, dict):
        raise UserError("a JSON object", type(found).__name__, "fetch it again", where=str(file))
    return found


def write_json(file: Path, value: Any) -> None:
    """Writes indented JSON, as transformers does."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def headers(files: list[Path]) -> dict[str, Entry]:
    """Lists the tensors of safetensors files by name."""
    entries = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - `opened` is no dict
                tensor = opened.get_slice(name)
                entries[name] = Entry(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return entries


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        others = sorted(path.name for path in file.parent.iterdir() if path.suffix in WEIGHTS)
        raise UserError(
            f"the weights in {file.name}", ", ".join(others[:3]) or "no such file",
            f"fetch it and, if there are shards, {INDEX}; or let transformers convert the directory"
            " (from_pretrained, then save_pretrained); or rename a variant", str(file.parent))
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise UserError("a whole safetensors file",
                        f"one of {file.stat().st_size} bytes with {error}", "fetch it again",
                        where=str(file)) from None


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Splits the names, in their order, into files of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
