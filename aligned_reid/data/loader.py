"""The loader of batches of images, from this process or from worker processes."""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
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
from torch.utils.data import BatchSampler, DataLoader

from aligned_reid.data.dataset import TestImages, TrainImages
from aligned_reid.errors import InputError, RunStopped

SECONDS_BETWEEN_LOOKS = 2.0  # at which a worker checks that its main process is alive
SECONDS_TO_DIE = 1.0  # that the main process waits for the exit status of a dead worker
BATCHES_PER_WORKER = 2  # that wait in shared memory
SOCKET_PATH_BYTES = 60  # of the temporary folder; a socket's path has at most 107, and multiprocessing adds 40
USUAL_CAUSES = {
    signal.SIGKILL: ", as the system does when memory runs out",
    signal.SIGBUS: ", as happens when shared memory (/dev/shm) is full",
}


class WorkerDied(RunStopped):
    """A loading worker died; the message has its signal or exit status and the usual cause."""


class Flag:
    """An event shared by processes, without a lock: torch would wait forever for the lock of a killed worker."""

    def __init__(self, context: multiprocessing.context.BaseContext) -> None:
        self.value = context.RawValue("b", 0)

    def set(self) -> None:
        self.value.value = 1

    def is_set(self) -> bool:
        return bool(self.value.value)


class LoaderContext(multiprocessing.context.ForkServerContext):
    """Starts workers from a fork server, which imports torch once for all of them.

    Forking the main process can hang the child, because torch and device drivers compute in threads.
    """

    def Event(self) -> Flag:  # type: ignore[override]  # noqa: N802
        return Flag(self)


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises its workers' InputErrors unchanged, and a WorkerDied when a worker dies."""

    processes: Sequence[Any] = ()  # of the workers

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Not a generator, so that workers start now. They inherit blocked signals: a closing terminal sends SIGHUP to
        # all processes, and the main process still has to save.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
        try:
            with self._explain_deaths():
                batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.processes = self.processes or multiprocessing.active_children()
        return self._raise_errors(batches)

    def _raise_errors(self, batches: Iterable[Any]) -> Iterator[Any]:
        with self._explain_deaths():
            for batch in batches:
                if isinstance(batch, InputError):
                    raise batch
                yield batch

    @contextlib.contextmanager
    def _explain_deaths(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # from torch, or from a batch that was not sent completely
            multiprocessing.connection.wait([process.sentinel for process in self.processes], SECONDS_TO_DIE)
            dead = [process.exitcode for process in self.processes if process.exitcode]
            if not dead:
                raise
            end = f"ended (status {dead[0]}"
            if dead[0] < 0:
                number = signal.Signals(-dead[0])
                end = f"was killed ({number.name}{USUAL_CAUSES.get(number, '')}"
            raise WorkerDied(f"a loading worker {end}; fewer --workers may help)") from error


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

    batches: the requests of each batch, at most `batch_size` each: an IdentityBatchSampler for TrainImages, lists of
    indices for TestImages (None: all images in order). `workers` processes, at most one per processor, live as long as
    the loader; 0 loads in this process. There are fewer if shared memory is short, which `say` gets a line about, and
    none if a cache holds the images resized: copying those costs less than sending them from another process. num_held:
    number of batches that the caller keeps at a time.
    """
    workers = min(workers, num_processors())
    if images.cache is not None and images.cache.size:
        workers = 0
    context = None
    if workers > 0:
        wanted, free = workers, free_shared_memory()
        workers = fit_workers(wanted, batch_size * math.prod(images.size) * 3, num_held, free)
        if workers < wanted and say:
            short = f"/dev/shm has {free / 2**20:.0f} MB free; docker run --shm-size raises it"
            say(f"loading with {workers} workers instead of {wanted}: {short}")
    if workers > 0:
        context = LoaderContext()
        context.set_forkserver_preload(["__main__", "aligned_reid.data.dataset"])
        _shorten_temp_dir()
    if batches is None:
        batches = BatchSampler(range(len(images)), batch_size, drop_last=False)
    return ImageLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of sequences will do
        num_workers=workers,
        collate_fn=_return_batch,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        multiprocessing_context=context,
        generator=torch.Generator(),  # else it draws from the global one, more often with workers than without
        persistent_workers=workers > 0,
    )


def fit_workers(workers: int, batch_bytes: int, num_held: int, free_bytes: float) -> int:
    """How many of `workers` there is shared memory for: `free_bytes`, for the batches of all workers and those of the
    main process, which are `num_held`, one on its way to the device, and one received.
    """
    return max(0, min(workers, int((free_bytes / batch_bytes - num_held - 2) / BATCHES_PER_WORKER)))


def free_shared_memory() -> int:
    """This rank's share of the free shared memory of the machine, in bytes."""
    try:
        return shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except OSError:  # systems other than Linux do not have it as a folder
        return sys.maxsize


def num_processors() -> int:
    """The number of processors that this process may use, which a container or taskset can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _return_batch(batch: Any) -> Any:
    """The collate function: images are loaded as whole batches."""
    return batch


def _shorten_temp_dir() -> None:
    """Keep the paths of the sockets between main process and workers, in the temporary folder, short enough."""
    if len(os.fsencode(tempfile.gettempdir())) > SOCKET_PATH_BYTES:
        tempfile.tempdir = "/tmp"


def _start_worker(main_process: int, _: int) -> None:
    """Use one core, leave Ctrl-C to the main process, and exit when that exits."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shorten_temp_dir()
    # torch's workers watch their parent, but theirs is the fork server, which lives as long as they do.
    threading.Thread(target=_exit_with, args=(main_process,), daemon=True).start()


def _exit_with(process: int) -> None:
    """Exit this process once another one, which may be killed, is gone."""
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(SECONDS_BETWEEN_LOOKS)
