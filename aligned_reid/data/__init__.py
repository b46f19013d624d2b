"""Data sets: the layout on disk and everything between it and a batch."""

from aligned_reid.data.checks import check_images, check_protocol
from aligned_reid.data.dataset import (
    EvaluationBatch,
    JoinedTrainImages,
    ReidData,
    TestImages,
    TrainBatch,
    TrainImages,
    open_data,
)
from aligned_reid.data.loader import make_loader
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
from aligned_reid.data.prepare.cuhk03 import prepare_cuhk03
from aligned_reid.data.prepare.market1501 import is_raw_market1501, prepare_market1501
from aligned_reid.data.prepare.msmt17 import prepare_msmt17
from aligned_reid.data.prepare.photos import prepare_photos
from aligned_reid.data.sampler import IdentityBatchSampler, SampleRequest
from aligned_reid.data.transforms import IM_MEAN, IM_STD, decode_image, normalize_images, preprocess, resize_image
from aligned_reid.synthetic.make import make_synthetic

__all__ = [
    "IM_MEAN",
    "IM_STD",
    "EvaluationBatch",
    "IdentityBatchSampler",
    "ImageName",
    "JoinedTrainImages",
    "Partitions",
    "ReidData",
    "SampleRequest",
    "TestImages",
    "TrainBatch",
    "TrainImages",
    "build_partitions",
    "check_images",
    "check_protocol",
    "decode_image",
    "format_image_name",
    "is_raw_market1501",
    "make_loader",
    "make_synthetic",
    "normalize_images",
    "open_data",
    "parse_image_name",
    "prepare_cuhk03",
    "prepare_market1501",
    "prepare_msmt17",
    "prepare_photos",
    "preprocess",
    "read_partitions",
    "resize_image",
    "split_train_val",
    "write_partitions",
]
