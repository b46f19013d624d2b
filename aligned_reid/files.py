"""Files that are written whole or not at all, and where one can be written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, *, durable: bool = False, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` once the block ends without an error; until then `path` is as before.

    durable: wait until the disk has it, so that a power failure cannot leave an empty file. keep: a name for the former
    content; one of the two names holds a whole file at any moment. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if keep is not None and path.is_file():
            _link_or_move(path, keep)
        temporary.replace(path)
    except BaseException as error:  # also Ctrl-C
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # writing to an open file does not name it
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def check_room(path: Path, num_bytes: int) -> None:
    """Raise OSError if the disk has no room for so many bytes in `path`; HDF5 crashes the process if it runs out."""
    if shutil.disk_usage(path.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def can_write(folder: Path) -> bool:
    """Whether a file can be made there; os.access misses read-only mounts and, for root, permissions."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _link_or_move(path: Path, name: Path) -> None:
    """Give a file a second name, which replaces another file of that name; without hard links, rename it."""
    link = name.with_name(f".{name.name}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        path.replace(name)
    else:
        link.replace(name)
