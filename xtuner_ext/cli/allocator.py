"""Keeping freed memory in the process."""

import ctypes
import platform

# Names of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory():
    """Let glibc reuse large blocks instead of returning each to the kernel, which zeroes it page by page again.

    Training on a CPU frees and allocates the same activations every step; without this a third of the time goes
    into page faults. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 256 * 2**20)
