"""A prepared data set: opening it, and loading its training and test images as uint8 batches."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from aligned_reid.data.cache import ImageCache, open_cache
from aligned_reid.data.partitions import MULTI_QUERY, Partitions, parse_image_name, read_partitions
from aligned_reid.data.prepare.jpeg import decode_upright
from aligned_reid.data.prepare.sources import IMAGE_ENDINGS, find_images, prepare_command
from aligned_reid.data.sampler import SampleRequest
from aligned_reid.data.transforms import (
    decode_image,
    erase_rectangle,
    pad_and_crop,
    random_crop,
    read_content,
    resize_into,
)
from aligned_reid.errors import InputError

IMAGES_PER_TASK = 64  # of a thread that checks images


@dataclasses.dataclass(frozen=True)
class ReidData:
    """A prepared data set: its folder, the folder of its images, and its partitions."""

    root: Path
    images_dir: Path
    partitions: Partitions


class TrainBatch(NamedTuple):
    """images uint8 [N, H, W, 3] (RGB), labels int64 [N], indices int64 [N] into the data set's image_names."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class EvaluationBatch(NamedTuple):
    """images uint8 [N, H, W, 3] (RGB), indices int64 [N] into the data set's image_names."""

    images: Tensor
    indices: Tensor


def open_data(data_path: str | Path, partition_file: str | Path | None = None) -> ReidData:
    """Open the folder given as --data_path; `partition_file` replaces its partitions.pkl.

    Raises InputError if the folder does not exist, is not a prepared data set, or has a bad partition file.
    """
    # os.path, as methods of Path raise some errors, such as those of an unknown ~user and a name that is too long.
    root = Path(os.path.expanduser(data_path))
    images_dir = root / "images"
    partitions_path = Path(os.path.expanduser(partition_file)) if partition_file else root / "partitions.pkl"
    if not os.path.exists(root):
        raise InputError(f"--data_path {root} does not exist or is not accessible")
    if not images_dir.is_dir() or not os.path.isfile(partitions_path):
        raise InputError(_explain_unprepared(root, partitions_path))
    return ReidData(root, images_dir, read_partitions(partitions_path))


def _explain_unprepared(root: Path, partitions_path: Path) -> str:
    """Why `root` cannot be opened; for an original data set or photos, with the command that prepares it."""
    from aligned_reid.data.prepare import cuhk03, market1501, msmt17, photo_source  # only needed for this message

    for what, find, kind, flags in (
        ("is the original Market-1501", market1501.find_raw_market1501, "market1501", ""),
        ("is the original MSMT17", msmt17.find_raw_msmt17, "msmt17", ""),
        ("is the original CUHK03", cuhk03.find_raw_cuhk03, "cuhk03", " --kind labeled"),
        # Last, because every data set is a folder of folders with images.
        ("looks like photos of persons", photo_source.find_photos, "photos", ""),
    ):
        raw = find(root)
        if raw is not None:
            return f"--data_path {root} {what}; prepare it first: {prepare_command(kind, raw, flags)}"
    if not (root / "images").is_dir():
        return f"--data_path {root} has no images/; give a prepared data set with images/ and partitions.pkl"
    if partitions_path.parent != root:
        return f"--partition_file {partitions_path} is not a file"
    return f"--data_path {root} has no {partitions_path.name}; if its preparation was interrupted, run it again"


class _Images(Dataset[Any]):
    """The common part of training and test images: names, persons, cameras, image size, reading."""

    def __init__(self, data: ReidData, part: str, image_names: list[str], size: tuple[int, int]) -> None:
        if not image_names:
            raise InputError(f"{data.root}: partitions.pkl has no {part} images")
        self.images_dir = str(data.images_dir)
        self.image_names = image_names
        self.size = size
        self.cache: ImageCache | None = None
        parsed = [parse_image_name(name) for name in image_names]
        self.person_ids = np.array([image.person_id for image in parsed], dtype=np.int64)
        self.cameras = np.array([image.camera for image in parsed], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.image_names)

    def decode(self, index: int) -> np.ndarray:
        """The image at its original size, uint8 [h, w, 3]. Raises InputError with its path."""
        return decode_image(f"{self.images_dir}/{self.image_names[index]}")

    def read(self, index: int) -> np.ndarray:
        """The image from the cache if there is one, else from its file, uint8 [h, w, 3]."""
        return self.decode(index) if self.cache is None else self.cache[index]

    load: Callable[[Sequence[Any]], Any]  # loads a whole batch; a method of each subclass

    def __getitems__(self, requests: Sequence[Any]) -> Any:
        # A worker would turn an exception into a traceback in a string, so the loader gets it as a value and raises it.
        try:
            return self.load(requests)
        except InputError as error:
            return error


class TrainImages(_Images):
    """The images of part "trainval" or "train", with class labels 0 ... num_classes - 1.

    `self[SampleRequest(index, seed)]` -> (uint8 [H, W, 3], label, index): cropped with probability `crop_prob` to a
    random share of height and width in [crop_ratio, 1], resized to `size` (height, width), mirrored with probability
    0.5 if `mirror`, shifted by up to `pad_crop` pixels, and partly erased with probability `erase_prob`. All randomness
    comes from the request's seed, so a sample is the same in any worker and after a resume.
    """

    def __init__(
        self,
        data: ReidData,
        part: str = "trainval",
        size: tuple[int, int] = (256, 128),
        crop_prob: float = 0.0,
        crop_ratio: float = 1.0,
        mirror: bool = True,
        pad_crop: int = 0,
        erase_prob: float = 0.0,
    ) -> None:
        super().__init__(data, part, getattr(data.partitions, f"{part}_im_names"), size)
        ids2labels: dict[int, int] = getattr(data.partitions, f"{part}_ids2labels")
        self.labels = np.array([ids2labels[person_id] for person_id in self.person_ids.tolist()], dtype=np.int64)
        self.num_classes = len(ids2labels)
        self.crop_prob = crop_prob
        self.crop_ratio = crop_ratio
        self.mirror = mirror
        self.pad_crop = pad_crop
        self.erase_prob = erase_prob

    def open_cache(self, folders: Sequence[Path], say: Callable[[str], None]) -> None:
        """Read images from a cache in one of `folders` from now on; see `cache.open_cache`."""
        size = None if self.crop_prob > 0 else self.size  # crops are taken from the image at its original size
        self.cache = open_cache(self.images_dir, self.image_names, size, folders, say)

    def __getitem__(self, request: SampleRequest) -> tuple[np.ndarray, int, int]:
        batch = self.load([request])
        return batch.images[0].numpy(), int(batch.labels[0]), int(batch.indices[0])

    def load(self, requests: Sequence[SampleRequest]) -> TrainBatch:
        """The batch of `requests`. Raises InputError with the path of an image that cannot be decoded."""
        images = _empty_images(len(requests), self.size)
        for slot, (index, seed) in zip(images.numpy(), requests, strict=True):
            random = Random(seed)
            image = self.read(index)
            if random.random() < self.crop_prob:
                image = random_crop(image, self.crop_ratio, random)
            resize_into(slot, image, mirror=self.mirror and random.random() < 0.5)
            if self.pad_crop:
                pad_and_crop(slot, self.pad_crop, random)
            if self.erase_prob and random.random() < self.erase_prob:
                erase_rectangle(slot, random)
        indices = [request.index for request in requests]
        return TrainBatch(images, torch.from_numpy(self.labels[indices]), torch.tensor(indices))


class TestImages(_Images):
    """The images of part "test" or "val", with `marks` [N]: 0 query, 1 gallery, and 2 multi-query if included.

    `self[index]` -> (uint8 [H, W, 3], index), resized to `size` (height, width).
    """

    __test__ = False  # not a test case, although pytest would collect a class of this name

    def __init__(
        self,
        data: ReidData,
        part: str = "test",
        include_multi_query: bool = False,
        size: tuple[int, int] = (256, 128),
    ) -> None:
        names: list[str] = getattr(data.partitions, f"{part}_im_names")
        marks: list[int] = getattr(data.partitions, f"{part}_marks")
        chosen = [index for index, mark in enumerate(marks) if mark != MULTI_QUERY or include_multi_query]
        super().__init__(data, part, [names[index] for index in chosen], size)
        self.marks = np.array([marks[index] for index in chosen], dtype=np.int64)

    def at_size(self, size: tuple[int, int]) -> TestImages:
        """The same images, loaded at another (height, width)."""
        images = copy.copy(self)
        images.size = size
        return images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.load([index]).images[0].numpy(), index

    def load(self, requests: Sequence[int]) -> EvaluationBatch:
        """The batch of these indices. Raises InputError with the path of an image that cannot be decoded."""
        images = _empty_images(len(requests), self.size)
        for slot, index in zip(images.numpy(), requests, strict=True):
            resize_into(slot, self.read(index))
        return EvaluationBatch(images, torch.tensor(list(requests), dtype=torch.int64))


class FolderImages(TestImages):
    """The images in a folder and in its folders, as they are, turned upright: no persons, no cameras, no marks.

    `image_names` are relative to the folder; person_ids and cameras are -1, and `marks` is empty. `log` receives a line
    about each image that cannot be read; the other images are served. Raises InputError if there are none.
    """

    def __init__(self, folder: Path, size: tuple[int, int], log: Callable[[str], None]) -> None:
        self.images_dir, self.size, self.cache = str(folder), size, None
        files, _ = find_images(folder)
        defects = find_defects(files, self.read_upright)
        for defect in defects.values():
            log(f"left out: {defect}")
        self.num_left_out = len(defects)
        self.image_names = [str(path.relative_to(folder)) for path in files if path not in defects]
        if not self.image_names:
            raise InputError(f"--images {folder} has no images that can be read ({', '.join(IMAGE_ENDINGS)})")
        self.person_ids = self.cameras = np.full(len(self), -1)
        self.marks = np.zeros(0, np.int64)

    def decode(self, index: int) -> np.ndarray:
        return self.read_upright(Path(self.images_dir, self.image_names[index]))

    @staticmethod
    def read_upright(path: Path) -> np.ndarray:
        return decode_upright(path, read_content(path))


def find_defects(paths: Sequence[Path], read: Callable[[Path], Any]) -> dict[Path, str]:
    """The error of each image that `read` refuses. Decoding releases Python's global lock."""

    def find(start: int) -> dict[Path, str]:
        defects = {}
        for path in paths[start : start + IMAGES_PER_TASK]:
            try:
                read(path)
            except InputError as error:
                defects[path] = str(error)
        return defects

    with ThreadPoolExecutor() as pool:
        parts = pool.map(find, range(0, len(paths), IMAGES_PER_TASK))
        return {path: defect for part in parts for path, defect in part.items()}


def _empty_images(num_images: int, size: tuple[int, int]) -> Tensor:
    """Memory for a batch, uint8 [N, H, W, 3]; a worker allocates shared memory, so the batch is not copied."""
    shape = (num_images, *size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as in torch's default collate function
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
