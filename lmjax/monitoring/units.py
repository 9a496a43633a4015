"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable


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


def time_unit(seconds: float) -> tuple[str, float]:
    """The name and length in seconds of the unit in which a time reads well: s, ms or us."""
    return ("s", 1.0) if seconds >= 0.1 else ("ms", 1e-3) if seconds >= 1e-4 else ("us", 1e-6)


def size_unit(size: float) -> tuple[str, float]:
    """The name and bytes of the unit in which a size reads well: GiB or MiB."""
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)


def human_bytes(size: float) -> str:
    """`5368709120` -> `5.0 GiB`."""
    unit, scale = size_unit(size)
    return f"{size / scale:.1f} {unit}"


def human_range(values: tuple[float, float], form: Callable[[float], str]) -> str:
    """`(2.0, 1.0)` -> `1 .. 2`; one figure if both read the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"
