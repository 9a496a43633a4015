"""The product of a few rows with packed weights on a CPU, in C++ that is compiled on first use.

XLA's own loops read packed weights at half the speed, and for a float matmul it would first write
an unpacked copy (docs/compression.md has the figures). Without a compiler, that is what happens.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

SOURCE = Path(__file__).parent / "packed.cc"
SYMBOLS = {8: "LmjaxInt8", 4: "LmjaxInt4"}  # by bits of a weight
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC",
         *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []))


def is_available() -> bool:
    """Whether the product is compiled, or could be compiled now."""
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
    return jax.ffi.ffi_call(SYMBOLS[bits], out)(x_MI, values, scales_FN)


@functools.cache
def _registered() -> bool:
    library = _library()
    if library is None:
        return False
    loaded = ctypes.cdll.LoadLibrary(str(library))
    for name in SYMBOLS.values():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def _library() -> Path | None:
    """The compiled file, from the user's cache or made now; None if that is impossible."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++",
                                                                            "clang++"))), None)
    if compiler is None:
        _tell("no C++ compiler (c++, g++, clang++ or $CXX)")
        return None
    source = SOURCE.read_bytes()
    known = (source, jax.lib.__version__.encode(), compiler.encode(), _cpu(), repr(FLAGS).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmjax"
    name = f"packed-{hashlib.sha256(b'|'.join(known)).hexdigest()[:16]}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise OSError
    except OSError:  # a read-only home
        cache = Path(tempfile.mkdtemp(prefix="lmjax-"))
    library = cache / name
    if library.exists():
        return library
    part = library.with_suffix(f".{os.getpid()}.part")
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(part)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", "") or error).strip().splitlines()
        why = next((line for line in output if "error" in line), error)
        _tell(f"{compiler} fails ({why})")
        return None
    part.replace(library)
    return library


def _cpu() -> bytes:
    """What the compiled code depends on, since a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()
    except OSError:
        return platform.processor().encode() + platform.machine().encode()


def _tell(why: str) -> None:
    print(f"packed weights are unpacked for each product, which is slower: {why}", file=sys.stderr,
          flush=True)
