"""The machine's own processor and memory: what the CPU can compute, and how the C library keeps its memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from mmap import PAGESIZE
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MADV_POPULATE_WRITE = 23  # of Linux


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors free, for the tensors of the next step.

    As it is, it gives each activation back to the system and gets it again, zeroed, page by page. Peak memory grows by
    what lies between the pieces. Other libraries than glibc are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def populate_memory(address: int, num_bytes: int) -> None:
    """Get all pages of memory that is written next at once, not one by one as they are reached.

    Where it is not known (Linux before 5.14, other systems) nothing happens.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        start = -(-address // PAGESIZE) * PAGESIZE
        end = (address + num_bytes) // PAGESIZE * PAGESIZE
        if end > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_WRITE)


def available_memory() -> int:
    """Bytes that this process can take without swapping, within its container's limit; a huge number if unknown."""
    try:
        available = 1024 * _number_after("MemAvailable:", Path("/proc/meminfo"))
    except (OSError, ValueError):
        return sys.maxsize
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no version 2 of cgroups, or "max": no limit
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - _number_after("anon", group / "memory.stat"))
    return available


def _number_after(word: str, path: Path) -> int:
    words = path.read_text().split()
    return int(words[words.index(word) + 1])


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX or AVX-512 BF16)."""
    return not _cpu_words().isdisjoint({"amx_bf16", "avx512_bf16"})


def mkl_leaves_avx512() -> bool:
    """Whether the CPU has AVX-512 and MKL, which uses it on Intel's only, does not use it."""
    words = _cpu_words()
    return "avx512f" in words and "GenuineIntel" not in words


def _cpu_words() -> set[str]:
    """What Linux says of the processor: its vendor, its flags; empty on other systems."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()
