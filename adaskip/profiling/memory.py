"""What the C library does with freed memory, peak memory, and what is free.

A prefill allocates and frees activations of some MB for every operation. glibc gives such blocks
back to the kernel at once, so the next operation has to fault them in again, page by page: the time
for that is paid by stock transformers as well, and changes from run to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

import torch

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 << 20
_RESET_PEAK = "5"


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next allocations; returns whether it could.

    Takes effect on Linux with glibc only, for the rest of the process. The process then stays as
    large as it was at its peak; the peak itself does not grow. Only computing on the CPU gains.
    """
    libc = _glibc()
    if libc is None:
        return False
    # Nothing by mmap, which is unmapped when freed; nothing trimmed from the top of the heap.
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD))
    taken = [libc.mallopt(name, value) for name, value in options]
    return all(taken)


class Peaks:
    """Peak memory of requests one after the other, each without what those before it left.

    Allocated on CUDA, resident in the CPU's memory. Where the kernel does not let a process reset
    its peak, the CPU's is that of the whole process.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first = self._left = self._reset()

    def begin(self) -> None:
        """A request begins; caches and maps that earlier ones keep are not its own."""
        self._left = self._reset()

    def end(self) -> int | None:
        """Bytes at the request's peak; None if unknown."""
        peak = peak_bytes(self._device)
        return None if peak is None else peak - (self._left - self._first)

    def _reset(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            libc = _glibc()
            if libc is not None:
                libc.malloc_trim(0)  # or what was freed would count as resident
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        return held_bytes(self._device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak of allocated (CUDA) or resident memory since it was reset; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _kernel_says("/proc/self/status", "VmHWM")


def held_bytes(device: torch.device) -> int:
    """Allocated (CUDA) or resident memory now; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _kernel_says("/proc/self/status", "VmRSS") or 0


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free to be used on the device; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _kernel_says("/proc/meminfo", "MemAvailable")


def _kernel_says(path: str, key: str) -> int | None:
    """Bytes that a line `key: n kB` of a file in /proc says; None where there is no such line."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{key}:\s+(\d+) kB", Path(path).read_text())
        return None if found is None else int(found[1]) * 1024
    return None


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError):
        libc = ctypes.CDLL(None)
        if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")):
            return libc
    return None
