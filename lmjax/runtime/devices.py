"""The devices of this process: their memory, their speed, and the cache of compiled programs."""

import importlib.metadata
import os
import sys
import time

import jax
import jax.numpy as jnp

from lmjax.runtime.files import cache_directory

CACHE = "JAX_COMPILATION_CACHE_DIR"
# JAX's options for a cache that cannot be written: nothing takes long enough to be kept, and no
# files are made for a limit of its size.
READ_ONLY = {"jax_persistent_cache_min_compile_time_secs": float("inf"),
             "jax_compilation_cache_max_size": -1}


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next process need not compile them.

    The folder is JAX_COMPILATION_CACHE_DIR, or ~/.cache/lmjax/xla. If it cannot be written, it is
    only read. A program is kept if it took at least JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS to
    compile, or 0.2 seconds.
    """
    # JAX declares its options while it is imported, where mypy does not see them.
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if "://" not in (given or ""):
        # For GPUs, JAX makes XLA write its own files there, whatever happens.
        on_gpu = any(kind in plugin.name for kind in ("cuda", "rocm")
                     for plugin in importlib.metadata.entry_points(group="jax_plugins"))
        folder, is_writable = cache_directory("xla", given or "", CACHE, read=not on_gpu)
        jax.config.update("jax_compilation_cache_dir", str(folder) if folder else None)
        if folder and not is_writable:
            for name, value in READ_ONLY.items():
                jax.config.update(name, value)
            return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def device_memory() -> int:
    """The bytes that each device of this process may use.

    CPU devices share the machine's memory. A device that does not tell counts as unlimited.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", sys.maxsize)


def matmul_rate(dtype: str = "float32", repeats: int = 5) -> float:
    """Measures the FLOP/s of a large square matmul on one device: the best of `repeats`."""
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192  # enough to fill the device
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.monotonic()
        multiply(a, a).block_until_ready()
        best = min(best, time.monotonic() - began)
    return 2 * size**3 / best
