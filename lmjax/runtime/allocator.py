"""The C library's memory allocator. Nothing here imports JAX: the settings must come before it."""

import ctypes
import os

ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")  # NVIDIA, AMD, TPUs
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1  # options of mallopt, from <malloc.h>
NEVER = -1  # as M_TRIM_THRESHOLD; two steps in flight exceed any size that fits into its C int


def keep_freed_memory() -> None:
    """Lets the C library keep the memory that XLA frees after a step, for the next step.

    On a CPU, XLA allocates the temporaries of a step anew in every step. If the C library returns
    them to the system, the kernel maps and zeroes each page again: a tenth of a step or more.

    Call it before JAX is imported: JAX starts threads, and a thread that has allocated memory keeps
    an arena of its own. It does nothing on a machine with accelerators or without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(map(os.path.exists, ACCELERATORS)):
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)):
            libc.mallopt(option, value)
