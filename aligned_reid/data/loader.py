"""The loader that brings batches of a data set's images, from this process or from workers."""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from aligned_reid.data.dataset import TestImages, TrainImages
from aligned_reid.errors import InputError, RunStopped

SECONDS_BETWEEN_LOOKS = 2.0  # of a worker for its main process
SECONDS_TO_DIE = 1.0  # of a worker, until its end is seen
BATCHES_PER_WORKER = 2  # that wait in shared memory, of a worker
FILES_PER_WORKER, OTHER_FILES = 10, 16  # that a process opens: pipes and shared memory of each worker, and all else
SOCKET_PATH_BYTES = 60  # of a temporary folder; a socket's path has at most 107 bytes, and multiprocessing's adds 40
USUAL_CAUSES = {
    signal.SIGKILL: ", as the system does when memory runs out",
    signal.SIGBUS: ", as happens when shared memory (/dev/shm) is full",
}


class WorkerDied(RunStopped):
    """A loading worker has ended before its work; the message has its signal or status, and the usual cause."""


def _as_it_is(batch: Any) -> Any:
    """The collate function of batches that are whole when they are loaded."""
    return batch


class Flag:
    """An event of several processes without a lock, which a killed worker would keep: torch then waits forever."""

    def __init__(self, context: multiprocessing.context.BaseContext) -> None:
        self.value = context.RawValue("b", 0)

    def set(self) -> None:
        self.value.value = 1

    def is_set(self) -> bool:
        return bool(self.value.value)


class LoaderContext(multiprocessing.context.ForkServerContext):
    """Forking a process whose threads compute (torch's, a device driver's) can hang the child.

    A fork server is forked from nothing; it imports torch once for all workers.
    """

    def Event(self) -> Flag:  # type: ignore[override]  # noqa: N802
        return Flag(self)


class ImageLoader(DataLoader[Any]):
    """A DataLoader whose workers' InputErrors are raised here as they are; a worker's death is a WorkerDied."""

    processes: Sequence[Any] = ()  # of the workers

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Not itself a generator: workers start now, not at the first batch. They, and what multiprocessing starts for
        # them, inherit what is blocked: a closing terminal signals all, and the main process has yet to save.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
        try:
            with self._deaths_named():
                batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.processes = self.processes or multiprocessing.active_children()
        return self._raise_errors(batches)

    def _raise_errors(self, batches: Iterable[Any]) -> Iterator[Any]:
        with self._deaths_named():
            for batch in batches:
                if isinstance(batch, InputError):
                    raise batch
                yield batch

    @contextlib.contextmanager
    def _deaths_named(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # torch's, or of a batch that died on its way
            multiprocessing.connection.wait([process.sentinel for process in self.processes], SECONDS_TO_DIE)
            dead = [process.exitcode for process in self.processes if process.exitcode]
            if not dead:
                raise
            raise WorkerDied(f"a loading worker {_describe_end(dead[0])}; fewer --workers may help)") from error


def _describe_end(exit_code: int) -> str:
    """What ended a worker, and in a bracket that stays open the usual cause."""
    if exit_code > 0:
        return f"ended (status {exit_code}"
    number = signal.Signals(-exit_code)
    return f"was killed ({number.name}{USUAL_CAUSES.get(number, '')}"


def make_loader(
    images: TrainImages | TestImages,
    batches: Iterable[Sequence[Any]] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
    *,
    num_held: int = 1,
    say: Callable[[str], None] | None = None,
) -> ImageLoader:
    """The loader of TrainBatch or EvaluationBatch.

    batches: what each batch holds, `batch_size` images at most: an IdentityBatchSampler for TrainImages, lists of
    indices for TestImages (None: all of them in order, `batch_size` at a time). `workers` processes, but no more than
    there are processors, stay for the loader's life; 0 loads in this process, as do images that a cache holds resized:
    a batch of those costs less than its way from another process. There are fewer if shared memory or open files are
    short, and `say` gets a line about it. num_held: batches that the caller keeps at a time.
    """
    workers = min(workers, num_processors())
    if images.comes_resized():
        workers = 0
    if workers > 0:
        height, width = images.size
        workers, reason = fit_workers(workers, batch_size * height * width * 3, num_held, *free_resources())
        if reason and say:
            say(reason)
    if batches is None:
        batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    context = None
    if workers > 0:
        context = LoaderContext()
        context.set_forkserver_preload(["__main__", "aligned_reid.data"])
        _shorten_temp_dir()
    return ImageLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of sequences will do
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        multiprocessing_context=context,
        generator=torch.Generator(),  # else it draws from the global one, and more often with workers than without
        persistent_workers=workers > 0,
    )


def fit_workers(
    workers: int, batch_bytes: int, num_held: int, shared_bytes: float, num_files: float
) -> tuple[int, str]:
    """As many of `workers` as there is room for, and a line that says why they are fewer (empty: they are not).

    shared_bytes: free ones of shared memory, where each worker's next batches wait beside those that the main process
    holds: `num_held`, one on its way to the device, one that has arrived. num_files: how many more it may open.
    """
    by_memory = (shared_bytes / batch_bytes - num_held - 2) / BATCHES_PER_WORKER
    by_files = (num_files - OTHER_FILES) / FILES_PER_WORKER
    fitting = max(0, int(min(workers, by_memory, by_files)))
    if fitting == workers:
        return workers, ""
    short = f"shared memory (/dev/shm) has {shared_bytes / 2**20:.0f} MB free; docker run --shm-size raises it"
    if by_files < by_memory:
        short = f"{num_files:.0f} more files may be opened; ulimit -n raises it"
    return fitting, f"loading with {fitting} workers instead of {workers}: {short}"


def free_resources() -> tuple[float, float]:
    """Bytes of shared memory that are free for this process, a share of the machine's, and files it may yet open."""
    if sys.platform != "linux":
        return math.inf, math.inf
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free / num_ranks, limit - len(os.listdir("/proc/self/fd")) if limit >= 0 else math.inf


def num_processors() -> int:
    """Those that this process may use, which a container or taskset may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shorten_temp_dir() -> None:
    """Main process and workers reach each other through sockets in the temporary folder."""
    if len(os.fsencode(tempfile.gettempdir())) > SOCKET_PATH_BYTES:
        tempfile.tempdir = "/tmp"


def _start_worker(main_process: int, _: int) -> None:
    """One core a worker, signals are the main process's to answer, and no worker outlives it."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shorten_temp_dir()
    # torch's workers watch their parent, which here is the fork server; that lives as long as one of them does.
    threading.Thread(target=_end_with, args=(main_process,), daemon=True).start()


def _end_with(process: int) -> None:
    """End this process once another one, which may be killed, is gone."""
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(SECONDS_BETWEEN_LOOKS)
