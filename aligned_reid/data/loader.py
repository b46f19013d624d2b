"""The loader that brings batches of a data set's images, from this process or from workers."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from aligned_reid.data.dataset import TestImages, TrainImages
from aligned_reid.errors import InputError

SECONDS_BETWEEN_LOOKS = 2.0  # of a worker for its main process


def _as_it_is(batch: Any) -> Any:
    """The collate function of batches that are whole when they are loaded."""
    return batch


class ImageLoader(DataLoader[Any]):
    """A DataLoader whose workers' InputErrors are raised here as they are."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _raise_errors(super().__iter__())  # not itself a generator: workers start now, not at the first batch


def _raise_errors(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def make_loader(
    images: TrainImages | TestImages,
    batches: Iterable[Sequence[Any]] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
) -> ImageLoader:
    """The loader of TrainBatch or EvaluationBatch.

    batches: what each batch holds: an IdentityBatchSampler for TrainImages, lists of indices for TestImages (None: all
    of them in order, `batch_size` at a time). `workers` processes, but no more than there are processors, stay for the
    loader's life; 0 loads in this process, as do images that a cache holds resized: a batch of those costs less than
    its way from another process.
    """
    workers = min(workers, num_processors())
    if images.comes_resized():
        workers = 0
    if batches is None:
        batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    context = None
    if workers > 0:
        # Forking a process whose threads compute (torch's, a device driver's) can hang the child. A fork server is
        # forked from nothing; it imports torch once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "aligned_reid.data"])
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


def num_processors() -> int:
    """Those that this process may use, which a container or taskset may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(main_process: int, _: int) -> None:
    """One core a worker, Ctrl-C is the main process's to answer, and no worker outlives it."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
