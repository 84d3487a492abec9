"""What a CPU is told before it trains: to keep its memory, and not to linger over numbers that are as good as zero."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def ready_cpu() -> None:
    """For this process, before the first step; nothing where the C library or the processor has no such setting."""
    keep_freed_memory()
    # Probabilities of unlikely tokens underflow, and arithmetic on such remains is a hundred times slower.
    torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """From now on large blocks come out of the heap and stay in it; False where the C library is not glibc.

    glibc takes every large block from the system and gives it back when it is freed, and the system hands over each
    page of the next one by a fault and zeroed. A step asks for the same blocks as the one before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
