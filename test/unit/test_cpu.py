import platform
import sys
from pathlib import Path

import pytest
from conftest import run_program

from aligned_reid.device import available_memory, mkl_leaves_avx512


@pytest.fixture
def host_files(monkeypatch):
    """The text of files under /proc and /sys by their names; the others are missing."""
    files = {}

    def read_text(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", read_text)
    return files


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [("AuthenticAMD", "avx2 avx512f", True), ("AuthenticAMD", "avx2", False), ("GenuineIntel", "avx2 avx512f", False)],
)
def test_mkl_leaves_avx512_unused_on_other_vendors_only(host_files, vendor, flags, expected):
    assert not mkl_leaves_avx512()
    host_files["cpuinfo"] = f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n"
    assert mkl_leaves_avx512() is expected


@pytest.mark.parametrize(
    ("limit", "available"),
    [(None, 2000 * 1024), ("max\n", 2000 * 1024), ("1000000\n", 400000), ("9000000\n", 2000 * 1024)],
)
def test_available_memory_respects_the_container_limit(host_files, limit, available):
    host_files["meminfo"] = "MemTotal: 9000 kB\nMemFree: 5 kB\nMemAvailable: 2000 kB\n"
    host_files["memory.stat"] = "anon 600000\nfile 7\n"
    if limit:
        host_files["memory.max"] = limit
    assert available_memory() == available


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is configured")
def test_freed_memory_is_kept_for_the_next_step():
    source = """
import torch
from pathlib import Path
from aligned_reid.device import keep_freed_memory
keep_freed_memory()
def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident_pages()
activations = [torch.ones(2**23 + 2**20 * layer) for layer in range(1, 6)]  # too large for glibc to keep by itself
during = resident_pages()
del activations
print((resident_pages() - before) / (during - before))
"""
    done = run_program(sys.executable, "-c", source)
    assert float(done.out) > 0.9, done.err
