"""Directories of safetensors files, single or sharded: read one tensor at a time, written one shard at a time."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lmjax.config import choice

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' name -> NumPy's: what weights come in. Reading widens to float32, which loses nothing.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Entry(NamedTuple):
    """Where a tensor is and what it looks like. name: in that file. dtype: safetensors' name."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def open_tensors(directory: Path) -> dict[str, Entry]:
    """Every tensor of a directory, by name, from the files' headers alone.

    Raises:
      ValueError: no safetensors file, a truncated one, or an index that does not agree with its files.
    """
    index = directory / INDEX
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index}: expected weight_map to name each tensor's file, got {where!r:.40}; fetch it "
                             "again")
        files = sorted({directory / str(file) for file in where.values()})
        if any(file.parent != directory for file in files):
            raise ValueError(f"{index}: expected files of this directory, got a path out of it; correct the index")
    else:
        files, where = [directory / SINGLE], None
    entries: dict[str, Entry] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                part = opened.get_slice(name)
                entries[name] = Entry(file, name, tuple(part.get_shape()), part.get_dtype())
    if where is not None and {name: directory / file for name, file in where.items()} != {
            name: entry.file for name, entry in entries.items()}:
        odd = sorted(where.keys() ^ entries.keys()) or ["a tensor in another file"]
        raise ValueError(f"{index}: expected the tensors that its files hold, got another list (first: {odd[0]}); "
                         "fetch the directory again")
    return entries


def read_tensor(entry: Entry) -> np.ndarray:
    """One whole tensor, in the dtype that it is stored in."""
    with _opened(entry.file) as opened:
        return opened.get_tensor(entry.name)


def write_tensors(directory: Path, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray], *,
                  dtype: str, max_shard_bytes: int) -> None:
    """Writes the tensors `get(name)` as float32, bfloat16 or float16, in files of at most `max_shard_bytes` each.

    A tensor that is larger gets a file of its own. No more than one file's tensors are held at a time.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    choice("dtype", dtype, NAMES)
    to = DTYPES[NAMES[dtype]]
    sizes = {name: math.prod(shape) * to.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                                              for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: np.ascontiguousarray(get(name).astype(to)) for name in names}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
            (directory / file).chmod(directory.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
        except SafetensorError as error:  # no OSError, whatever the disk has said
            size = sum(sizes[name] for name in names)
            failed = OSError(f"{directory / file}: expected to write {size / 1e6:.1f} MB, got: {error}; make room, "
                             "then try again")
            failed.errno = next(map(int, re.findall(r"os error (\d+)", str(error))), None)
            raise failed from None
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: no such file, or none in it.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent}: expected a Hugging Face model with {file.name}, got none; check the path")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}; fetch it again")
    return found


def write_json(file: Path, value: Any) -> None:
    """Indented, as transformers writes it."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file.parent}: expected the weights in {file.name}, got no such file; fetch it, or convert "
                         "pytorch_model.bin to safetensors first")
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got one of {file.stat().st_size} bytes with "
                         f"{error}; fetch it again") from None


def _shards(sizes: Mapping[str, int], limit: int) -> Iterable[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
