"""What the evaluation functions compute with: compiled loops, threads, and conversions from and to the caller's types.

No thread outlives the call that started it, and nothing is compiled or imported before its first use: worker processes
may be forked at any time.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@functools.cache
def compiled(name: str, dtype: str = "float32") -> Callable[..., None] | None:
    """The function `name` of kernels.py as machine code, for distances of type dtype; None where numba is missing.

    The code is kept on disk for the next process where that can be written, and only in memory where it cannot (a
    read-only installation without a home directory, a full disk). It releases the interpreter lock.
    """
    try:
        import numba

        from aligned_reid.evaluation import kernels
    except ImportError:
        return None
    function, signature = getattr(kernels, name), kernels.SIGNATURES[name].format(dtype=dtype)
    try:
        return numba.njit([signature], cache=True, **kernels.OPTIONS)(function)
    except (RuntimeError, OSError):  # "no locator available", or the write failed
        return numba.njit([signature], **kernels.OPTIONS)(function)


def num_threads() -> int:
    """As many as torch uses, which follows the processor count, OMP_NUM_THREADS and torch.set_num_threads."""
    return torch.get_num_threads()


def in_threads(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """[function(*a) for a in zip(*arguments)] in num_threads() threads, torch single-threaded in each.

    The first error is raised.
    """
    threads = num_threads()
    if threads == 1:
        return list(map(function, *arguments))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, *arguments))
    finally:
        torch.set_num_threads(threads)  # MKL keeps one count for all threads


def to_numpy(x: Any) -> NDArray[Any]:
    """A tensor of any device, or anything that numpy takes, as an array; bfloat16 and float16 as float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def to_tensor(x: Any) -> torch.Tensor:
    """A tensor without its gradient, or anything that numpy takes as a tensor, of the same memory where possible."""
    if isinstance(x, torch.Tensor):
        return x.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")  # a mapped file; nor do we write
        return torch.from_numpy(np.ascontiguousarray(x))
