"""Statistics by layer on the disk: arrays of fixed shapes, one record per step, appended.

DIR/statistics/<step>.bin begins with a line of JSON that names the arrays and their lengths. Each
record is the step (int64), all arrays one after another (float32) and a CRC-32 (uint32), little
endian. A record that a kill cut off, or that is damaged, is left out. Another set of arrays begins
another file, named by its first step.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmjax.runtime.files import write_whole

FOLDER = "statistics"
FORMAT = 1


class StatisticsWriter:
    """Appends records, which survive a kill as soon as they are appended.

    Args:
      workdir: of the run; None on processes that write nothing.
      last_step: the step that the run resumes from. Records of later steps are removed. A file
        without one readable record gets the ending .damaged.
    """

    def __init__(self, workdir: Path | None, last_step: int):
        self._folder = workdir and workdir / FOLDER
        self._file: BinaryIO | None = None
        self._header = b""
        for path in _files(self._folder):
            header, records = _parsed(path.read_bytes())
            intact = _intact(records)
            if not header or (len(records) and not intact.any()):
                # Its header is damaged or cut off: what was appended could not be read.
                path.replace(path.with_name(f"{path.name}.damaged"))
                continue
            kept = records[records["step"] <= last_step]
            whole = header + kept.tobytes()
            if not len(kept):
                path.unlink()
            elif path.stat().st_size != len(whole):
                write_whole(path, whole)

    def append(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds the record of a step: float32 [n] per name."""
        if self._folder is None or not arrays:
            return
        columns = {name: len(x) for name, x in arrays.items()}
        header = json.dumps({"format": FORMAT, "columns": columns}).encode() + b"\n"
        if header != self._header:
            self._open(step, header)
        record = np.zeros(1, _dtype(columns))
        record["step"] = step
        record["values"] = np.concatenate([np.asarray(x, np.float32) for x in arrays.values()])
        record["crc"] = zlib.crc32(record.tobytes()[:-4])
        assert self._file is not None
        self._file.write(record.tobytes())
        self._file.flush()

    def _open(self, step: int, header: bytes) -> None:
        """Opens the newest file if it holds the same arrays, else a new one."""
        assert self._folder is not None
        self.close()
        self._folder.mkdir(exist_ok=True)
        newest = _files(self._folder)[-1:]
        goes_on = newest and newest[0].read_bytes().startswith(header)
        path = newest[0] if goes_on else self._folder / f"{step:09d}.bin"
        if not goes_on:
            write_whole(path, header)  # a full disk leaves no half of it
        self._file, self._header = path.open("ab"), header

    def sync(self) -> None:
        """Returns when every record is on the disk."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
            self._file = None


def read_statistics(workdir: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads what a run has recorded.

    Returns:
      The steps, int64 [N], and by name the values, float32 [N, layers]: NaN at steps without them.
    """
    parts = []
    for path in _files(workdir / FOLDER):
        header, records = _parsed(path.read_bytes())
        records = records[_intact(records)]
        columns = json.loads(header)["columns"] if header else {}
        ends = np.cumsum([0, *columns.values()])
        parts.append((records["step"], {
            name: records["values"][:, begin:end]
            for name, begin, end in zip(columns, ends[:-1], ends[1:], strict=True)}))
    steps = np.concatenate([np.zeros(0, np.int64), *(part for part, _ in parts)])
    found: dict[str, np.ndarray] = {}
    first = 0
    for own, arrays in parts:
        for name, values in arrays.items():
            whole = found.setdefault(name, np.full((len(steps), values.shape[1]), np.nan,
                                                   np.float32))
            if whole.shape[1] == values.shape[1]:
                whole[first : first + len(own)] = values
        first += len(own)
    return steps, found


def _files(folder: Path | None) -> list[Path]:
    return sorted(folder.glob("*.bin")) if folder and folder.is_dir() else []


def _dtype(columns: Mapping[str, int]) -> np.dtype[Any]:
    return np.dtype([("step", "<i8"), ("values", "<f4", (sum(columns.values()),)),
                     ("crc", "<u4")])


def _parsed(content: bytes) -> tuple[bytes, np.ndarray]:
    """The header of a file, b"" if it has none, and its records without a short last one."""
    header, end, body = content.partition(b"\n")
    try:
        columns = json.loads(header)["columns"] if end else {}
        dtype = _dtype(columns)
    except (ValueError, KeyError, TypeError, AttributeError):
        columns = {}
    if not columns:
        return b"", np.zeros(0, _dtype({}))
    return header + end, np.frombuffer(body, dtype, len(body) // dtype.itemsize)


def _intact(records: np.ndarray) -> np.ndarray:
    """Which records have the checksum that was written with them, bool [N]."""
    return np.array([zlib.crc32(record.tobytes()[:-4]) == record["crc"] for record in records],
                    bool)
