"""What the library asks of the machine's memory and knows of its processor."""

import mmap
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from aligned_reid.device.cpu import available_memory, mkl_leaves_avx512, populate_memory


@pytest.mark.parametrize(
    ("vendor", "flags", "left"),
    [
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx2 avx512f", False),
    ],
)
def test_mkl_has_avx512_on_intels_processors_only(monkeypatch, vendor, flags, left):
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    assert mkl_leaves_avx512() is left


def test_a_system_that_does_not_tell_its_processor_is_taken_as_it_is(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert not mkl_leaves_avx512()


@pytest.mark.parametrize(
    ("limit", "available"),
    [(None, 2000 * 1024), ("max\n", 2000 * 1024), ("1000000\n", 400000), ("9000000\n", 2000 * 1024)],
)
def test_available_memory_is_within_the_containers_limit(monkeypatch, limit, available):
    files = {
        "meminfo": "MemTotal: 9000 kB\nMemFree: 5 kB\nMemAvailable: 2000 kB\n",
        "memory.stat": "anon 600000\nfile 7\n",
    }
    files |= {"memory.max": limit} if limit else {}

    def read_text(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_memory() == available


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' memory comes page by page")
def test_populated_memory_is_there_when_it_is_written():
    faults = []
    for populated in (False, True):
        memory = np.frombuffer(mmap.mmap(-1, 2**22), dtype=np.uint8)
        if populated:
            populate_memory(memory.ctypes.data + 5, len(memory) - 5)
        before = page_faults()
        memory[mmap.PAGESIZE :] = 7
        faults.append(page_faults() - before)
    if faults[0] < 100:
        pytest.skip("this system gives memory in large pieces anyway")
    assert faults[1] < faults[0] / 10


def test_memory_smaller_than_a_page_is_left_alone():
    memory = np.zeros(100, dtype=np.uint8)
    populate_memory(memory.ctypes.data, len(memory))
    assert not memory.any()
