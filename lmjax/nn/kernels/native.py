"""The product of a few rows with packed weights on a CPU, in C++ that is compiled on first use.

XLA's own loops read packed weights at half the speed, and for a float matmul it would first write
an unpacked copy (docs/compression.md has the figures). Without a compiler, that is what happens.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp

SOURCE = Path(__file__).parent / "packed.cc"
SYMBOLS = {8: "LmjaxInt8", 4: "LmjaxInt4"}  # by bits of a weight
# No -ffast-math: with it, loading the file would make this process treat tiny floats as zeros.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared",
         "-fPIC", *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []))
_LOCK = threading.Lock()


def is_available() -> bool:
    """Whether the product is compiled, or could be compiled now."""
    with _LOCK:  # so that one thread compiles
        return _registered()


def multiply(x_MI: jax.Array, values: jax.Array, scales_FN: jax.Array, bits: int) -> jax.Array:
    """x by packed weights, float32 [M, F].

    Args:
      x_MI: float32.
      values: int8 [F, I], or uint8 [F, I / 2].
      scales_FN: float32.
      bits: of a weight.
    """
    out = jax.ShapeDtypeStruct((x_MI.shape[0], values.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(SYMBOLS[bits], out, vmap_method="sequential")
    return call(x_MI, values, scales_FN)


@functools.cache
def _registered() -> bool:
    try:
        loaded = ctypes.CDLL(str(_library()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0] if lines else error)
        print(f"packed weights are unpacked for each product, which is slower: {why}",
              file=sys.stderr, flush=True)
        return False
    for name in SYMBOLS.values():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def _library() -> Path:
    """The compiled file, from the user's cache or made now.

    Raises:
      OSError, RuntimeError, subprocess.SubprocessError: there is no compiler, it fails, or no
        directory can be written.
    """
    found = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not found:
        raise OSError("no C++ compiler (c++, g++, clang++ or $CXX)")
    compiler = shlex.split(found)
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=60).stdout
    known = (SOURCE.read_bytes(), jax.lib.__version__.encode(), version, _cpu(),
             repr(FLAGS).encode())
    library = _cache() / f"packed-{hashlib.sha256(b'|'.join(known)).hexdigest()[:16]}.so"
    if library.exists():
        return library
    print(f"compiling {SOURCE.name} into {library.parent}, once", file=sys.stderr, flush=True)
    handle, part = tempfile.mkstemp(dir=library.parent, suffix=".part")
    os.close(handle)
    try:
        subprocess.run([*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", part],
                       check=True, capture_output=True, text=True, timeout=300)
        os.replace(part, library)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return library


def _cache() -> Path:
    """A directory of this user that can be written."""
    with contextlib.suppress(OSError, RuntimeError):  # a read-only home, or none
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmjax"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    return Path(tempfile.mkdtemp(prefix="lmjax-"))


def _cpu() -> bytes:
    """What the compiled code depends on, since a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()
    except OSError:
        return platform.processor().encode() + platform.machine().encode()

