"""Numbers with units for people: counts, durations and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable


def human_count(value: float) -> str:
    """Shortens a count: `1234567` -> `1.2M`, `12` -> `12`.

    Returns:
      At most four characters of digits, with a suffix (k, M, B or T) where one is needed.
    """
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
    """Words a duration: `0.02` -> `20ms`, `5.25` -> `5.2s`, `200` -> `3m20s`, `3700` -> `1h01m`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    text = f"{whole}s"
    units = (("m", "s", 60, 1), ("h", "m", 3600, 60), ("d", "h", 86400, 3600))
    for unit, sub_unit, size, sub_size in units:
        if whole < size:
            break
        text = f"{whole // size}{unit}{whole % size // sub_size:02d}{sub_unit}"
    return text


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which to show a time, s, ms or us: its name and its seconds."""
    return ("s", 1.0) if seconds >= 0.1 else ("ms", 1e-3) if seconds >= 1e-4 else ("us", 1e-6)


def size_unit(size: float) -> tuple[str, float]:
    """The unit in which to show a size, GiB or MiB: its name and its bytes."""
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)


def human_bytes(size: float) -> str:
    """Words a size: `5368709120` -> `5.0 GiB`."""
    unit, scale = size_unit(size)
    return f"{size / scale:.1f} {unit}"


def human_range(values: tuple[float, float], form: Callable[[float], str]) -> str:
    """Words a range, `(2.0, 1.0)` -> `1 .. 2`; one figure if both ends read the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"
