"""The embedded data set: drawn pedestrians in front of drawn cameras, in the layout that --data_path takes."""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from aligned_reid import __version__
from aligned_reid.data.loader import num_processors
from aligned_reid.data.partitions import format_image_name
from aligned_reid.data.prepare.layout import IMAGES_NAME, NUM_VAL_IDS, PARTITIONS_NAME, Row, check_unused, write_table
from aligned_reid.data.prepare.sources import list_folder
from aligned_reid.errors import InputError
from aligned_reid.synthetic.camera import Camera, make_camera, take_picture
from aligned_reid.synthetic.figure import Figure
from aligned_reid.synthetic.person import sample_person

SETTINGS_NAME = "generated.json"  # the settings of a set; written first, it identifies the folder
DISTRACTOR_ID = 0  # as in Market-1501: other people and empty boxes, in the gallery only

# First number of a random stream's key, after the seed; the next ones identify the person, camera or image.
_PERSON, _CAMERA, _IMAGE = 1, 2, 3


@dataclass(frozen=True)
class _Settings:
    """Everything that determines the files' content."""

    num_ids: int
    num_cameras: int
    images_per_camera: int
    seed: int
    made_by: str = f"aligned_reid {__version__}, numpy {np.__version__}, opencv {cv2.__version__}"

    @property
    def num_train_ids(self) -> int:
        return self.num_ids * 3 // 4  # training from scratch needs variety


def make_synthetic(
    save_dir: str | Path,
    num_ids: int = 300,
    num_cameras: int = 6,
    images_per_camera: int = 4,
    seed: int = 1,
    num_workers: int | None = None,
) -> Path:
    """Draw a data set: images/ (128 x 64 JPEGs), partitions.pkl, ori_to_new_im_name.pkl. Returns `save_dir`.

    Three of four identities are for training, the others for test. Each camera sees every identity `images_per_camera`
    times. Of a test identity, one image per camera is a query and, from 4 images on, another one is multi-query; the
    rest is gallery, with as many distractors (person 0) as an identity has images. The same arguments and package
    versions give the same bytes, for any `num_workers` (None: one per core). If interrupted, repeat the call to resume;
    partitions.pkl is written last. Raises InputError if the numbers make no data set, and if `save_dir` holds anything
    else, is being written by another process or cannot be written.
    """
    settings = _Settings(num_ids, num_cameras, images_per_camera, seed)
    _check(settings)
    if num_workers is not None and num_workers < 1:
        raise InputError(f"num_workers is {num_workers}; it must be at least 1")
    save_dir = Path(save_dir).expanduser()
    files = {SETTINGS_NAME: json.dumps(asdict(settings), indent=2).encode()}
    check_unused(save_dir, SETTINGS_NAME, files[SETTINGS_NAME])
    table = list(_make_table(settings))
    if os.path.isfile(save_dir / PARTITIONS_NAME) and len(list_folder(save_dir / IMAGES_NAME)[1]) == len(table):
        return save_dir  # complete
    num_val_ids = math.ceil(settings.num_train_ids * NUM_VAL_IDS / 751)  # Market-1501's share
    with _draw_images(settings, min(num_workers or num_processors(), num_ids + 1)) as images:
        return write_table(save_dir, table, lambda _: next(images), num_val_ids, files)


def _check(settings: _Settings) -> None:
    limits = {"num_ids": (4, 99_999_999), "num_cameras": (2, 9_999), "images_per_camera": (2, 99_999_999)}
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        if not least <= value <= most:  # two identities each for training and test; digits in an image's name
            raise InputError(f"{name} is {value}; it must be from {least} to {most:,}")
    if settings.seed < 0:
        raise InputError(f"seed is {settings.seed}; it must not be negative")


def _make_table(settings: _Settings) -> Iterator[Row]:
    """The parts. Per identity and camera, the last images are query and multi-query, as in Market-1501."""
    last = ["query", "multi_query"] if settings.images_per_camera >= 4 else ["query"]
    of_tested = ["gallery"] * (settings.images_per_camera - len(last)) + last
    for person_id in range(settings.num_ids + 1):
        is_trained = DISTRACTOR_ID < person_id <= settings.num_train_ids
        for camera in range(1, settings.num_cameras + 1):
            for index, part in enumerate(of_tested):
                part = "trainval" if is_trained else "gallery" if person_id == DISTRACTOR_ID else part
                yield Row(format_image_name(person_id, camera, index), person_id, camera, part)


@contextlib.contextmanager
def _draw_images(settings: _Settings, num_workers: int) -> Iterator[Iterator[bytes]]:
    """The images as JPEG files, in the order of the table."""
    draw = functools.partial(_draw_person, settings)
    persons = range(settings.num_ids + 1)
    with _one_opencv_thread():
        if num_workers == 1:
            yield itertools.chain.from_iterable(map(draw, persons))
            return
        # A forked worker inherits imported modules, so it starts in milliseconds. The parent handles Ctrl-C.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                yield itertools.chain.from_iterable(pool.map(draw, persons, chunksize=4))
            finally:
                pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Pictures are too small for several threads, and forking is safer without OpenCV's threads."""
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(num_threads)


def _draw_person(settings: _Settings, person_id: int) -> list[bytes]:
    """All images of an identity, under one camera after the other."""
    figure = Figure(sample_person(_generator(settings.seed, _PERSON, person_id)))
    images = []
    for number, index in itertools.product(range(1, settings.num_cameras + 1), range(settings.images_per_camera)):
        rng = _generator(settings.seed, _IMAGE, person_id, number, index)
        seen: Figure | None = figure
        if person_id == DISTRACTOR_ID:  # a different person each time, or nobody
            seen = Figure(sample_person(rng)) if index % 2 else None
        camera = _camera(settings.seed, number)
        image = take_picture(camera, seen, rng)
        quality = camera.jpeg_quality + int(rng.integers(-5, 6))
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        images.append(jpeg.tobytes())
    return images


@functools.cache
def _camera(seed: int, number: int) -> Camera:
    return make_camera(_generator(seed, _CAMERA, number), number - 1)


def _generator(seed: int, *key: int) -> np.random.Generator:
    """An independent stream for each key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
