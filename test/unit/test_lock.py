"""Locks of folders and files: one process at a time, and no lock outlives its process."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import refusal

from aligned_reid import InputError
from aligned_reid.lock import hold

# Holds a lock, and forks a child that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from aligned_reid.lock import hold
with hold(Path(sys.argv[1]), "--exp_dir"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(3600)
"""


# Holds a lock in the parent of a process that opens a file under the number of the lock's, and has a child.
GRANDPARENT = """
import os, sys
from pathlib import Path
from aligned_reid.lock import hold
with hold(Path(sys.argv[1]), "--exp_dir"):
    if os.fork() == 0:
        file = os.open(os.devnull, os.O_RDONLY)
        if os.fork() == 0:
            os.fstat(file)
            os._exit(0)
        os._exit(os.wait()[1] != 0)
    sys.exit(os.wait()[1] != 0)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path, and the number of its child."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path, holder):
    assert f"--exp_dir {tmp_path}: process {holder.pid} on " in refusal(hold(tmp_path, "--exp_dir").__enter__)
    holder.kill()
    holder.wait()
    with hold(tmp_path, "--exp_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_grandchild_keeps_the_files_of_its_parent(tmp_path):
    subprocess.run([sys.executable, "-c", GRANDPARENT, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize("place", [".", "features.h5"])
def test_nothing_is_left_after_the_block(tmp_path, place):
    for _ in range(2):
        with hold(tmp_path / place, "--save_file"):
            with pytest.raises(InputError), hold(tmp_path / place, "--save_file"):
                pass
            with hold(tmp_path / "other.h5", "--save_file"):
                pass
        assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "none" / "features.h5", "--save_file"):  # no lock if its file cannot be written
        assert not (tmp_path / "none").exists()


def test_waiting_processes_get_the_lock_one_after_the_other(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with hold(tmp_path / "a.images", "--cache", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: work(), range(4)))
    assert len(most) == 80 and max(most) == 1
