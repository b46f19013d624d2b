"""Data sets: the layout on disk, and everything between it and a batch."""

import importlib
from typing import Any

from aligned_reid.data.dataset import ReidData, TestImages, TrainImages, open_data
from aligned_reid.data.partitions import (
    Partitions,
    build_partitions,
    parse_image_name,
    read_partitions,
    split_train_val,
    write_partitions,
)
from aligned_reid.data.transforms import preprocess

__all__ = [
    "Partitions",
    "ReidData",
    "TestImages",
    "TrainImages",
    "build_partitions",
    "open_data",
    "parse_image_name",
    "preprocess",
    "read_partitions",
    "split_train_val",
    "write_partitions",
]

_IMPORTED_ON_USE = {
    "prepare_market1501": "aligned_reid.data.prepare.market1501",
    "make_synthetic": "aligned_reid.synthetic.make",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_ON_USE:
        return getattr(importlib.import_module(_IMPORTED_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
