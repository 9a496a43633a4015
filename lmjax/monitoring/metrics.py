"""What a run writes down while it trains, and what it shows on the terminal.

| file | holds | on resuming at step k |
| --- | --- | --- |
| metrics.jsonl | figures that follow from the config and the data alone | lines after step k are removed |
| samples.jsonl | generated text | lines after step k are removed |
| timing.jsonl | figures of this machine: rates, waits, events | kept; redone steps appear twice |

The same scalars and texts go to TensorBoard. The event file is written here, record by record, because the
usual writers queue events in a thread (a killed run loses them) and import PyTorch wherever it is installed.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import shutil
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lmjax.config import MAX_FLOAT32

# Numbers for people ---------------------------------------------------------------------------------------


def human_count(value: float) -> str:
    """`1234567` -> `1.2M`, `12` -> `12`: at most four characters of digits and one suffix (k, M, B, T)."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    suffix = ""
    for suffix in ("", "k", "M", "B", "T"):
        if abs(value) < 999.5 or suffix == "T":
            break
        value /= 1000
    whole = abs(value) >= 99.95 or (suffix == "" and value.is_integer())
    return f"{value:.0f}{suffix}" if whole else f"{value:.1f}{suffix}"


def human_seconds(seconds: float) -> str:
    """`0.02` -> `20ms`, `5.25` -> `5.2s`, `200` -> `3m20s`, `3700` -> `1h01m`, `200000` -> `2d07h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, sub_unit, size, sub_size in (("m", "s", 60, 1), ("h", "m", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < size:
            break
        text = f"{whole // size}{unit}{whole % size // sub_size:02d}{sub_unit}"
    return text if whole >= 60 else f"{whole}s"


# JSON lines -----------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Numpy and JAX scalars as Python ones; NaN and infinities as strings, since JSON has no such numbers.

    A float is written as its shortest decimal that reads back to the same bits.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
        return number if math.isfinite(number) else str(number)


def _line(record: Mapping[str, Any]) -> bytes:
    plain = {key: _plain(value) for key, value in record.items()}
    # A half of a surrogate pair cannot be written as UTF-8; it becomes "?".
    return json.dumps(plain, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; none if there is no file. A torn last line is left out.

    Raises ValueError at a whole line that is not a JSON object with a step.
    """
    return (record for _, record in _whole_lines(Path(path)))


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line of the file with the object on it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill in the middle of a write
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; "
                    "remove that line, or move the file away"
                )
            yield line, record


def _truncate(path: Path, last_step: float) -> Counter[bytes]:
    """Keeps exactly the whole lines with step <= last_step, in one rename. Returns those of last_step."""
    kept = [(line, record) for line, record in _whole_lines(path) if record["step"] <= last_step]
    content = b"".join(line for line, _ in kept)
    if path.exists() and path.stat().st_size != len(content):
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return Counter(line for line, record in kept if record["step"] == last_step)


class Appender:
    """Appends whole lines, each given to the system at once: what was appended survives a kill."""

    def __init__(self, path: Path, last_step: float = math.inf):
        # A run resumed at step k may replay what it logged at step k; no line is added twice.
        self._seen = _truncate(path, last_step)
        self._file = path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds it, unless it is one of the last step that is there."""
        line = _line(record)
        if self._seen[line]:
            self._seen[line] -= 1
        else:
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Returns once all of it is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricsWriter:
    """Writes metrics.jsonl, timing.jsonl, samples.jsonl and a TensorBoard event file into `workdir`.

    For a killed run to end with the same metrics and samples as a straight one, write everything of step k
    before the checkpoint of step k is committed (and call `flush` in between).

    Args:
      workdir: the run's directory; made if missing.
      resume_step: the step of the checkpoint that was restored; 0 or -1 on a fresh start. Metrics and samples
        after it are removed.
      tensorboard: whether to write TensorBoard events.

    Attributes:
      seconds_before: the `seconds` of the last timing line, i.e. wall seconds that earlier starts spent.

    Raises:
      ValueError: one of the files holds something other than JSON lines with a step.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int, tensorboard: bool = True):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        last_steps = {"metrics": resume_step, "samples": resume_step, "timing": math.inf}
        self._metrics, self._samples, self._timing = (
            Appender(workdir / f"{name}.jsonl", step) for name, step in last_steps.items())  # may refuse a file
        timed = (line for line in read_jsonl(workdir / "timing.jsonl") if "event" not in line)
        earlier = [line["seconds"] for line in timed if "seconds" in line]
        self.seconds_before = float(earlier[-1]) if earlier else 0.0
        self._events = _EventFile(workdir, purge_step=resume_step + 1) if tensorboard else None
        self._files = [f for f in (self._metrics, self._samples, self._timing, self._events) if f]
        self._sample_step, self._sample_index = -1, 0

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Deterministic figures of a train step, to metrics.jsonl as they are named and as `train/<name>`."""
        self._metrics.append({"step": step, **metrics})
        self._scalars(step, metrics, "train")

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures on held-out data; a name without a group (`loss`) becomes `eval/<name>`."""
        metrics = {name if "/" in name else f"eval/{name}": value for name, value in metrics.items()}
        self._metrics.append({"step": step, **metrics})
        self._scalars(step, metrics, "eval")

    def timing(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures that depend on the machine (rates in 1/s, durations in s), to timing.jsonl."""
        self._timing.append({"step": step, **metrics})
        self._scalars(step, metrics, "timing")

    def event(self, step: int, name: str, seconds: float, **more: Any) -> None:
        """Something that took `seconds`: start, resume, compile, checkpoint, eval, slow_step, and more about it."""
        self._timing.append({"step": step, "event": name, "seconds": seconds, **more})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Generated text (with or without its prompt in front)."""
        self._samples.append({"step": step, "prompt": prompt, "text": text})
        if self._events:
            self._sample_index = self._sample_index + 1 if step == self._sample_step else 0
            self._sample_step = step
            whole = text if text.startswith(prompt) else prompt + text
            markdown = "".join(f"    {line}\n" for line in whole.split("\n"))
            self._events.text(step, f"samples/{self._sample_index}", markdown)

    def _scalars(self, step: int, metrics: Mapping[str, float], group: str) -> None:
        if self._events:
            tags = (name if "/" in name else f"{group}/{name}" for name in metrics)
            self._events.scalars(step, dict(zip(tags, map(float, metrics.values()), strict=True)))

    def flush(self) -> None:
        """Returns once everything written so far is on the disk, safe from a power cut too."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


# TensorBoard: a file of TFRecords, each an `Event` protocol buffer (tensorflow/core/util/event.proto) -----


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(byte)
    return table


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and offset as TFRecords want it, little-endian."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | bytes | str) -> bytes:
    """A protocol buffer field: an integer (wire type 0), or a string, bytes or a message (2)."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


class _EventFile:
    """An event file that tells TensorBoard to forget what earlier files hold from `purge_step` on."""

    def __init__(self, workdir: Path, purge_step: int):
        # TensorBoard reads the files of a directory in the order of their names: the time comes first.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (workdir / name).open("ab")
        self._write(0, _field(3, "brain.Event:2"))
        self._write(purge_step, _field(7, _field(1, 1)))  # session_log { status: START }

    def _write(self, step: int, what: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _field(2, max(int(step), 0)) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Rounded to float32, which is what the format holds."""
        summary = b""
        for tag, value in values.items():
            if math.isfinite(value):  # struct.pack refuses what rounds beyond; NaN and inf pass
                value = max(-MAX_FLOAT32, min(MAX_FLOAT32, value))
            summary += _field(1, _field(1, tag) + struct.pack("<Bf", 2 << 3 | 5, value))
        self._write(step, _field(5, summary))

    def text(self, step: int, tag: str, markdown: str) -> None:
        tensor = _field(1, 7) + _field(2, _field(2, _field(1, 1))) + _field(8, markdown)  # strings, shape [1]
        metadata = _field(1, _field(1, "text"))
        value = _field(1, f"{tag}/text_summary") + _field(8, tensor) + _field(9, metadata)
        self._write(step, _field(5, _field(1, value)))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


# The progress line ----------------------------------------------------------------------------------------


class Progress:
    """Shows how far a run is: a line rewritten in place on a terminal, plain lines now and then elsewhere.
    Piped lines come at the first update, then 1, 2, 4, 8, 15, 15, ... seconds apart, and always at the end.

    total_steps: the step at which the run ends. stream: standard error unless given, so that standard output
    stays clean. clock: seconds, monotonic.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._gap = 0.1 if self._live else 1.0
        self._next_time = -math.inf
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._line = ""
        self._shown = True

    def update(self, step: int, loss: float, bits_per_byte: float, tokens_per_second: float,
               data_wait_share: float = 0.0, mfu: float | None = None) -> None:
        """Figures of the newest step: nats per token, bits per byte, 1/s, and shares of 0..1 (None: not known).

        Cheap enough for every step; it draws at most ten times a second.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        remaining = math.nan
        if step > first_step:
            remaining = (now - first_time) / (step - first_step) * (self._total - step)
        done = f"{step:,}/{self._total:,} {step / max(self._total, 1):.0%}"
        losses, rate = (f"loss {loss:.3f}", f"{bits_per_byte:.3f} bits/byte"), human_count(tokens_per_second)
        left = f"ETA {'-' if math.isnan(remaining) else human_seconds(round(remaining))}"
        used = () if mfu is None else (f"MFU {mfu:.0%}",)
        if self._live:  # short enough for 80 columns
            parts = (done, *losses, f"{rate} tok/s", *(used or (f"wait {data_wait_share:.0%}",)), left)
        else:
            parts = (f"step {done}", *losses, f"{rate} tokens/s", *used, f"data wait {data_wait_share:.1%}", left)
        self._line = ("  " if self._live else " | ").join(parts)
        self._shown = False
        if now >= self._next_time or step >= self._total:
            self._show()
            self._next_time = now + self._gap
            self._gap = self._gap if self._live else min(2 * self._gap, 15.0)

    def log(self, message: str) -> None:
        """Prints a message on lines of its own, the live line staying below it."""
        if not self._live:
            self._emit(message + "\n")
            return
        self._emit("\r\x1b[K" + message + "\n")
        if self._line:
            self._show()

    def close(self) -> None:
        """Shows the last figures, if they were not yet, and ends the line."""
        if self._live and self._line:
            self._show()
            self._emit("\n")
        elif not self._shown:
            self._show()
        self._line, self._shown = "", True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        if self._live:
            # One column stays free: some terminals wrap when the last one is written.
            width = shutil.get_terminal_size().columns - 1
            self._emit("\r" + self._line[:width] + "\x1b[K")
        else:
            self._emit(self._line + "\n")
        self._shown = True

    def _emit(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
