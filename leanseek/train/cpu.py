"""What a CPU is told before it trains: how to keep its memory, and not to linger over numbers as good as zero."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MADV_HUGEPAGE, LARGE_PAGE = 14, 1 << 21  # of Linux
ROOM = 1 << 30  # bytes of the heap that are in large pages


def ready_cpu() -> None:
    """For this process, before the first step; nothing where the C library or the processor has no such setting."""
    if keep_freed_memory():
        in_large_pages(ROOM)
    # Probabilities of unlikely tokens underflow, and arithmetic on such remains is a hundred times slower.
    torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """From now on large blocks come out of the heap and stay in it; False where the C library is not glibc.

    glibc takes every large block from the system and gives it back when it is freed, and the system hands over each
    page of the next one by a fault and zeroed. A step asks for the same blocks as the one before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def in_large_pages(room: int) -> None:
    """Asks for the next `room` bytes of the heap in pages of 2 MiB, for a process whose heap keeps what is freed.

    A step goes through hundreds of megabytes, and with pages of 4 KiB the processor looks most of them up in the page
    table, twice over in a virtual machine. A page uses no memory before it is touched.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block: int | None = libc.malloc(room)
    if block is not None:
        first = -(-block // LARGE_PAGE) * LARGE_PAGE
        libc.madvise(first, block + room - first, MADV_HUGEPAGE)
        libc.free(block)
