"""The devices of this process: their memory and speed, and what is kept between runs."""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, or in ~/.cache/lmjax/xla: those that took 0.2 s, or
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lmjax" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def device_memory() -> int:
    """Bytes that each device of this process may use: of CPU devices, a share of the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", sys.maxsize)  # not every plugin says


def matmul_rate(dtype: str = "float32", repeats: int = 5) -> float:
    """FLOP/s of a square matmul on one device, the best of `repeats`: what it can do at most."""
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192  # enough to fill the device
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        at = time.monotonic()
        multiply(a, a).block_until_ready()
        best = min(best, time.monotonic() - at)
    return 2 * size**3 / best
