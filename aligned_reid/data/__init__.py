"""Data sets: the layout on disk, and everything between it and a batch."""

import importlib
from typing import Any

from aligned_reid.data.dataset import ReidData, TestImages, TrainImages, open_data
from aligned_reid.data.partitions import (
    ImageName,
    Partitions,
    build_partitions,
    format_image_name,
    parse_image_name,
    read_partitions,
    split_train_val,
    write_partitions,
)
from aligned_reid.data.sampler import IdentityBatchSampler, SampleRequest
from aligned_reid.data.transforms import IM_MEAN, IM_STD, normalize_images, preprocess

__all__ = [
    "IM_MEAN",
    "IM_STD",
    "IdentityBatchSampler",
    "ImageName",
    "Partitions",
    "ReidData",
    "SampleRequest",
    "TestImages",
    "TrainImages",
    "build_partitions",
    "format_image_name",
    "make_synthetic",  # noqa: F822  # by __getattr__, as is the next one
    "normalize_images",
    "open_data",
    "parse_image_name",
    "prepare_market1501",  # noqa: F822
    "preprocess",
    "read_partitions",
    "split_train_val",
    "write_partitions",
]

_LAZY = {"prepare_market1501": "aligned_reid.data.prepare.market1501", "make_synthetic": "aligned_reid.synthetic.make"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
