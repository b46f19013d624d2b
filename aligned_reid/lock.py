"""Locks: one process at a time writes into a folder, or a file."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aligned_reid.errors import InputError

LOCK_NAME = ".lock"  # in a folder; the lock of a file is .<name>.lock beside it

_held: set[int] = set()  # descriptors; a forked child closes them, or it would keep the lock after its parent's death
os.register_at_fork(after_in_child=lambda: list(map(os.close, [_held.pop() for _ in range(len(_held))])))


@contextmanager
def hold(place: Path, flag: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of `place`, an existing folder or a file to write, until the block ends.

    If another process holds it, raises InputError, which names `flag` and the process, or waits for it with `wait`. The
    kernel releases a lock when its process dies. There is no lock if the lock file cannot be written or the file system
    does not support locks.
    """
    path = place / LOCK_NAME if place.is_dir() else place.with_name(f".{place.name}.lock")
    descriptor = None
    try:
        descriptor = _open_locked(path, wait)
    except BlockingIOError:
        holder = "another process"
        with suppress(OSError):
            holder = path.read_text() or holder
        raise InputError(
            f"{flag} {place}: {holder} is writing there; wait until it ends, or choose another {flag}"
        ) from None
    except OSError:
        pass
    else:
        _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            _held.discard(descriptor)
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _open_locked(path: Path, wait: bool) -> int:
    """Create and lock a lock file; returns its descriptor. Raises BlockingIOError if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            with suppress(OSError):  # a full disk
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # the former holder has removed the file
