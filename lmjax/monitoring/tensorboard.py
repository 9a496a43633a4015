"""TensorBoard event files: TFRecords, each an `Event` message (tensorflow/core/util/event.proto).

lmjax encodes the messages itself. The usual writers queue events in a thread, so that a killed run
loses them, and they import PyTorch wherever it is installed.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from lmjax.config import MAX_FLOAT32


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(byte)
    return table


def _masked_crc(data: bytes) -> bytes:
    """The CRC-32C of `data`, masked (rotated and offset) as in TFRecords; little-endian."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    """A protocol buffer's integer: 7 bits per byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protocol buffer: an integer, a string, bytes or an encoded message."""
    integer, delimited = 0, 2  # wire types
    if isinstance(value, int):
        return _varint(number << 3 | integer) + _varint(value)
    value = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return _varint(number << 3 | delimited) + _varint(len(value)) + value


class EventFile:
    """A TensorBoard event file of one start of a run.

    Args:
      workdir: the folder of the file.
      purge_step: TensorBoard forgets the events of earlier files from this step on.
    """

    def __init__(self, workdir: Path, purge_step: int):
        # TensorBoard reads the files of a folder in the order of their names: the time comes first.
        now = f"{time.time():017.6f}"
        name = f"events.out.tfevents.{now}.{socket.gethostname()}.{os.getpid()}"
        self._file = (workdir / name).open("ab")
        self._write(0, _field(3, "brain.Event:2"))
        self._write(purge_step, _field(7, _field(1, 1)))  # session_log { status: START }

    def _write(self, step: int, content: bytes) -> None:
        """Writes one TFRecord: an `Event` with the time, the step and the encoded `content`."""
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _field(2, max(int(step), 0)) + content
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one value per tag, rounded to float32."""
        summary = b""
        for tag, value in values.items():
            if math.isfinite(value):  # struct.pack takes NaN and infinities, but no overflow
                value = max(-MAX_FLOAT32, min(MAX_FLOAT32, value))
            summary += _field(1, _field(1, tag) + struct.pack("<Bf", 2 << 3 | 5, value))
        self._write(step, _field(5, summary))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes a text, which TensorBoard shows as Markdown."""
        shape = _field(2, _field(2, _field(1, 1)))  # [1]
        tensor = _field(1, 7) + shape + _field(8, markdown)  # type 7: strings
        metadata = _field(1, _field(1, "text"))
        value = _field(1, f"{tag}/text_summary") + _field(8, tensor) + _field(9, metadata)
        self._write(step, _field(5, _field(1, value)))

    def sync(self) -> None:
        """Returns when every event is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
