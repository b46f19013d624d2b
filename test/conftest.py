"""What tests share: a tiny drawn data set, and commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aligned_reid.data import make_synthetic

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--pretrained=none", "--resize_h_w=64,32", "--ids_per_batch=4", "--ims_per_id=2", "--workers=0", "--device=cpu")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A drawn data set of 16 people and 2 cameras, prepared and never written to by a test."""
    return make_synthetic(tmp_path_factory.mktemp("data") / "tiny", 16, 2, 3, seed=1)


@pytest.fixture
def tiny_flags(tiny_data):
    """Flags of a run that takes seconds."""
    return (f"--data_path={tiny_data}", *TINY)


def run_script(name, *arguments, cwd=None, environment=None, timeout=120):
    """Run script/<name> as a user does; returns the finished process with its text output."""
    return subprocess.run(
        [sys.executable, str(ROOT / "script" / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
