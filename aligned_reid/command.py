"""What every command does around its work: one line for a user's mistake, and an exit status that tells."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from aligned_reid.errors import InputError, RunStopped

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0 done, 1 the run stopped itself, 2 a user's mistake, 128 + n signal n."""
    name = os.path.basename(sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths that are not UTF-8 are printed as they are
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        complain(f"{name}: error: {error}", 2)
    except RunStopped as error:
        complain(f"{name}: stopped: {error}", error.status)
    except KeyboardInterrupt:
        complain(f"{name}: interrupted", 130)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        complain(
            f"{name}: error: {error.strerror}: {error.filename or 'while writing'}; make room or choose another folder",
            2,
        )
    sys.exit(0)


def complain(line: str, status: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(status)
