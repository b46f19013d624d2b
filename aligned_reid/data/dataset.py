"""A prepared data set: opening it, and its training and test images as uint8 batches."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from aligned_reid.data.cache import CacheContent, ImageCache, open_cache
from aligned_reid.data.partitions import MULTI_QUERY, Partitions, parse_image_name, read_partitions
from aligned_reid.data.prepare import cuhk03, market1501, msmt17, photo_source
from aligned_reid.data.sampler import SampleRequest
from aligned_reid.data.transforms import decode_image, erase_rectangle, pad_and_crop, random_crop, resize_into
from aligned_reid.device.cpu import populate_memory
from aligned_reid.errors import InputError


@dataclasses.dataclass(frozen=True)
class ReidData:
    """A prepared data set: its folder, the folder of its images, and which image is in which part."""

    root: Path
    images_dir: Path
    partitions: Partitions


class TrainBatch(NamedTuple):
    """images uint8 [N, H, W, 3] (RGB), labels int64 [N], indices int64 [N] into the data set's image_names.

    replaced int64 [R, 2]: the indices of images that cannot be decoded, and of those in the batch in their place.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    replaced: Tensor = torch.empty((0, 2), dtype=torch.int64)


class EvaluationBatch(NamedTuple):
    """images uint8 [N, H, W, 3] (RGB), indices int64 [N] into the data set's image_names."""

    images: Tensor
    indices: Tensor


def open_data(data_path: str | Path, partition_file: str | Path | None = None) -> ReidData:
    """Open the folder that --data_path names; `partition_file` replaces its partitions.pkl.

    Raises InputError that says what to do: no such path, a data set not prepared yet, no images/, no or a bad
    partitions.pkl.
    """
    root = Path(data_path).expanduser()
    images_dir = root / "images"
    partitions_path = Path(partition_file).expanduser() if partition_file else root / "partitions.pkl"
    if not root.exists():
        raise InputError(f"--data_path {root} does not exist")
    if not images_dir.is_dir() or not partitions_path.is_file():
        raise InputError(_not_prepared(root, partitions_path))
    return ReidData(root, images_dir, read_partitions(partitions_path))


def _not_prepared(root: Path, partitions_path: Path) -> str:
    # Photos come last, for every data set is a folder of folders with images.
    for what, find, command in (
        ("is the original Market-1501", market1501.find_raw_market1501, market1501.prepare_command),
        ("is the original MSMT17", msmt17.find_raw_msmt17, msmt17.prepare_command),
        ("is the original CUHK03", cuhk03.find_raw_cuhk03, cuhk03.prepare_command),
        ("looks like photos of persons", photo_source.find_photos, photo_source.prepare_command),
    ):
        raw = find(root)
        if raw is not None:
            return f"--data_path {root} {what}; prepare it first: {command(raw)}"
    if not root.is_dir():
        return f"--data_path {root} is no folder; it takes a prepared data set"
    if not (root / "images").is_dir():
        return f"--data_path {root} has no images/; it takes a prepared data set with images/ and partitions.pkl"
    if partitions_path.parent != root:
        return f"--partition_file {partitions_path} does not exist"
    return f"--data_path {root} has no {partitions_path.name}; if its preparation was interrupted, run it again"


class _Images(Dataset[Any]):
    """What training and test images share: names, folder, size, loading."""

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

    def open_cache(self, folders: Sequence[Path], say: Callable[[str], None], show_progress: bool = True) -> None:
        """Load from a cache in one of `folders` from now on; see `cache.open_cache`."""
        content = CacheContent(self.images_dir, self.image_names, None if self.is_cropped() else self.size)
        self.cache = open_cache(content, folders, say, show_progress)

    def is_cropped(self) -> bool:
        """Whether loading needs images at their original size."""
        return False

    def comes_resized(self) -> bool:
        """Whether loading is no more than copying out of a cache."""
        return self.cache is not None and not self.is_cropped()

    def decode(self, index: int) -> np.ndarray:
        """The image as the file holds it, uint8 [h, w, 3]. Raises InputError with its path."""
        return decode_image(f"{self.images_dir}/{self.image_names[index]}")

    def read(self, index: int) -> np.ndarray:
        """The image from the cache, resized already unless images are cropped, else from its file, uint8 [h, w, 3]."""
        cached = self.cache[index] if self.cache is not None else None
        return self.decode(index) if cached is None else cached

    def __getitems__(self, requests: Sequence[Any]) -> Any:
        # A worker's exception would arrive as a traceback in a string. As a value it stays whole; the loader raises it.
        try:
            return self.load(requests)
        except InputError as error:
            return error

    def load(self, requests: Sequence[Any]) -> Any:
        """A whole batch."""
        raise NotImplementedError


class TrainImages(_Images):
    """The images of part "trainval" or "train", with class labels 0 ... num_classes - 1.

    `self[SampleRequest(index, seed)]` -> (uint8 [H, W, 3], label, index): with probability `crop_prob` a random crop to
    shares of height and width in [crop_ratio, 1], resized to `size` (height, width), mirrored every second time when
    `mirror`, moved by up to `pad_crop` pixels, and with probability `erase_prob` partly erased. All chance comes from
    the request's seed, so it is the same in whatever worker and after a resume. In the place of an image that cannot be
    decoded comes another of the same person, which the seed chooses too.
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

    @property
    def parts(self) -> list[TrainImages]:
        """The data sets that the images come from, each with its folder and cache."""
        return [self]

    def is_cropped(self) -> bool:
        return self.crop_prob > 0

    def __getitem__(self, request: SampleRequest) -> tuple[np.ndarray, int, int]:
        batch = self.load([request])
        return batch.images[0].numpy(), int(batch.labels[0]), int(batch.indices[0])

    def load(self, requests: Sequence[SampleRequest]) -> TrainBatch:
        """The batch of `requests`. Raises InputError where every image of a person is bad."""
        images = _empty_images(len(requests), self.size)
        used = [request.index for request in requests]
        replaced: list[tuple[int, int]] = []
        for number, (slot, request) in enumerate(zip(images.numpy(), requests, strict=True)):
            try:
                self._write(slot, request.index, request.seed)
            except InputError as error:
                used[number] = self._write_another(slot, request, error)
                replaced.append((request.index, used[number]))
        labels = torch.from_numpy(self.labels[used])
        return TrainBatch(
            images, labels, torch.tensor(used), torch.tensor(replaced, dtype=torch.int64).view(len(replaced), 2)
        )

    def _write(self, slot: np.ndarray, index: int, seed: int) -> None:
        """Write one image into its place in the batch."""
        random = Random(seed)
        image = self.read(index)
        if random.random() < self.crop_prob:
            image = random_crop(image, self.crop_ratio, random)
        resize_into(slot, image, mirror=self.mirror and random.random() < 0.5)
        if self.pad_crop:
            pad_and_crop(slot, self.pad_crop, random)
        if self.erase_prob and random.random() < self.erase_prob:
            erase_rectangle(slot, random)

    def _write_another(self, slot: np.ndarray, request: SampleRequest, error: InputError) -> int:
        """Write another image of the same person; returns its index."""
        person_id = self.person_ids[request.index]
        images = np.flatnonzero(self.person_ids == person_id).tolist()
        others = [index for index in images if index != request.index]
        Random(request.seed).shuffle(others)
        for index in others:
            try:
                self._write(slot, index, request.seed)
            except InputError:
                continue
            return index
        raise InputError(
            f"{error}, and person {person_id} has no other image that can be read, of {len(images)}: "
            "prepare the data again"
        )


class JoinedTrainImages(TrainImages):
    """The training images of several data sets, one after the other; `parts` maps each set's name to its images.

    Persons, cameras and labels of a set are counted on from those of the sets before it, so that nobody is taken for
    somebody else; image_names begin with the set's name. An image comes as its own set gives it.
    """

    def __init__(self, parts: Mapping[str, TrainImages]) -> None:
        self._parts = list(parts.values())
        self.starts = np.cumsum([0, *map(len, self.parts)])[:-1]
        self.image_names = [f"{name}/{image_name}" for name, part in parts.items() for image_name in part.image_names]
        self.size = self.parts[0].size
        self.person_ids = _count_on([part.person_ids for part in self.parts])
        self.cameras = _count_on([part.cameras for part in self.parts])
        first_labels = np.cumsum([0, *(part.num_classes for part in self.parts)])
        self.labels = np.concatenate(
            [part.labels + first for part, first in zip(self.parts, first_labels, strict=False)]
        )
        self.num_classes = int(first_labels[-1])

    @property
    def parts(self) -> list[TrainImages]:
        return self._parts

    def _find(self, index: int) -> tuple[TrainImages, int]:
        """The set that has an image, and the image's index there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[number], index - int(self.starts[number])

    def decode(self, index: int) -> np.ndarray:
        part, index = self._find(index)
        return part.decode(index)

    def comes_resized(self) -> bool:
        return all(part.comes_resized() for part in self.parts)

    def _write(self, slot: np.ndarray, index: int, seed: int) -> None:
        part, index = self._find(index)
        part._write(slot, index, seed)


def _count_on(numbers: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of numbers from 0 in one, each raised above all before it."""
    raised: list[np.ndarray] = []
    first = 0
    for some in numbers:
        raised.append(some + first)
        first = int(raised[-1].max()) + 1
    return np.concatenate(raised)


class TestImages(_Images):
    """The images of part "test" or "val" with `marks` [N] (0 query, 1 gallery; 2 multi-query, only when asked for).

    `self[index]` -> (uint8 [H, W, 3], index). An image that cannot be decoded is an InputError: another in its place
    would change the score.
    """

    __test__ = False  # it is no test, whatever pytest thinks of its name

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
        images.size, images.cache = size, None
        return images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.load([index]).images[0].numpy(), index

    def load(self, requests: Sequence[int]) -> EvaluationBatch:
        """The batch of these indices."""
        images = _empty_images(len(requests), self.size)
        for slot, index in zip(images.numpy(), requests, strict=True):
            resize_into(slot, self.read(index))
        return EvaluationBatch(images, torch.tensor(list(requests), dtype=torch.int64))


def _empty_images(num_images: int, size: tuple[int, int]) -> Tensor:
    """Memory for a batch, uint8 [N, H, W, 3]; in a worker, memory that the main process sees without a copy."""
    shape = (num_images, *size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    populate_memory(storage.data_ptr(), storage.nbytes())
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
