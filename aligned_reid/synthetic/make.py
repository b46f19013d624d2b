"""The embedded data set: drawn pedestrians in front of drawn cameras, in the layout that --data_path takes."""

import contextlib
import errno
import functools
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from aligned_reid import __version__
from aligned_reid.data.partitions import Partitions, build_partitions, format_image_name, write_partitions
from aligned_reid.errors import InputError
from aligned_reid.files import write_file
from aligned_reid.lock import LOCK_NAME, hold
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


class _Job(NamedTuple):
    """The missing images of one identity: (camera, index) of each."""

    person_id: int
    images: list[tuple[int, int]]


class _Studio(NamedTuple):
    """Everything a worker needs to draw."""

    cameras: list[Camera]
    images_dir: Path
    seed: int


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
    try:
        if save_dir.exists() and not save_dir.is_dir():
            raise InputError(f"save_dir {save_dir} is not a folder; choose another one")
        save_dir.mkdir(parents=True, exist_ok=True)
        with hold(save_dir, "--save_dir"):
            _claim(save_dir, settings)
            images_dir = save_dir / "images"
            images_dir.mkdir(exist_ok=True)
            _draw_all(_missing_images(images_dir, settings), images_dir, settings, num_workers)
            names = {name: name for name in _image_names(settings)}
            write_file(save_dir / "ori_to_new_im_name.pkl", pickle.dumps(names, protocol=2))
            write_partitions(save_dir / "partitions.pkl", _partitions(settings))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"no space left for {save_dir}; make room and run the same command again") from error
        raise InputError(f"cannot write {save_dir}: {error.strerror}") from error
    return save_dir


def _check(settings: _Settings) -> None:
    limits = {"num_ids": (4, 99_999_999), "num_cameras": (2, 9_999), "images_per_camera": (2, 99_999_999)}
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        if not least <= value <= most:  # two identities each for training and test; digits in an image's name
            raise InputError(f"{name} is {value}; it must be from {least} to {most:,}")
    if settings.seed < 0:
        raise InputError(f"seed is {settings.seed}; it must not be negative")


def _claim(save_dir: Path, settings: _Settings) -> None:
    """Write the settings into the folder. Raises InputError if it holds anything but a set with these settings."""
    ours = asdict(settings)
    path = save_dir / SETTINGS_NAME
    if not path.exists():
        if any(path.name != LOCK_NAME for path in save_dir.iterdir()):
            raise InputError(f"save_dir {save_dir} holds other files, which are not overwritten; choose another one")
        write_file(path, json.dumps(ours, indent=2).encode())
        return
    try:
        theirs = json.loads(path.read_bytes())
    except ValueError:
        theirs = None
    if theirs != ours:
        raise InputError(
            f"save_dir {save_dir} holds a data set made with other settings ({path}); delete it or choose another one"
        )


def _images_of(settings: _Settings) -> list[tuple[int, int]]:
    """(camera, index) of each image of an identity."""
    return [(c, i) for c in range(1, settings.num_cameras + 1) for i in range(settings.images_per_camera)]


def _image_names(settings: _Settings) -> list[str]:
    return [
        format_image_name(person, *image) for person in range(settings.num_ids + 1) for image in _images_of(settings)
    ]


def _missing_images(images_dir: Path, settings: _Settings) -> list[_Job]:
    """The images still to be drawn; temporary files of an interrupted run are deleted."""
    present = set(os.listdir(images_dir))
    for name in present:
        if name.startswith(".") and name.endswith(".tmp"):
            (images_dir / name).unlink(missing_ok=True)
    jobs = []
    for person_id in range(settings.num_ids + 1):
        images = [image for image in _images_of(settings) if format_image_name(person_id, *image) not in present]
        if images:
            jobs.append(_Job(person_id, images))
    return jobs


def _draw_all(jobs: Sequence[_Job], images_dir: Path, settings: _Settings, num_workers: int | None) -> None:
    if not jobs:
        return
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(jobs))
    with _one_opencv_thread():
        cameras = [
            make_camera(_generator(settings.seed, _CAMERA, camera), camera - 1)
            for camera in range(1, settings.num_cameras + 1)
        ]
        studio = _Studio(cameras, images_dir, settings.seed)
        num_images = sum(len(job.images) for job in jobs)
        if num_workers == 1:
            _report(map(functools.partial(_draw_person, studio), jobs), num_images)
            return
        # A forked worker inherits cameras and imported modules, so it starts in milliseconds.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_workers, context, _start_worker, (studio,)) as pool:
            _report(pool.map(_draw_person_in_worker, jobs, chunksize=4), num_images)


@contextlib.contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Pictures are too small for several threads, and forking is safer without OpenCV's threads."""
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(num_threads)


_worker_studio: _Studio  # of a worker process, set when it starts


def _start_worker(studio: _Studio) -> None:
    global _worker_studio
    _worker_studio = studio
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C


def _draw_person_in_worker(job: _Job) -> int:
    return _draw_person(_worker_studio, job)


def _draw_person(studio: _Studio, job: _Job) -> int:
    """Draw and write some images of one identity; returns how many."""
    figure = Figure(sample_person(_generator(studio.seed, _PERSON, job.person_id)))
    for camera_number, index in job.images:
        rng = _generator(studio.seed, _IMAGE, job.person_id, camera_number, index)
        seen: Figure | None = figure
        if job.person_id == DISTRACTOR_ID:  # a different person each time, or nobody
            seen = Figure(sample_person(rng)) if index % 2 else None
        camera = studio.cameras[camera_number - 1]
        image = take_picture(camera, seen, rng)
        quality = camera.jpeg_quality + int(rng.integers(-5, 6))
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        write_file(studio.images_dir / format_image_name(job.person_id, camera_number, index), jpeg.tobytes())
    return len(job.images)


def _generator(seed: int, *key: int) -> np.random.Generator:
    """An independent stream for each key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _report(drawn: Iterable[int], num_images: int) -> None:
    """Consume the counts of drawn images, with progress on stderr: a bar on a terminal, otherwise ten lines."""
    if sys.stderr.isatty():
        with tqdm(total=num_images, desc="Drawing", unit=" images") as bar:
            for count in drawn:
                bar.update(count)
        return
    num_done = 0
    for count in drawn:
        tenths_before, num_done = 10 * num_done // num_images, num_done + count
        if 10 * num_done // num_images > tenths_before:
            print(f"drew {num_done:,} of {num_images:,} images", file=sys.stderr, flush=True)


def _partitions(settings: _Settings) -> Partitions:
    """The parts. Per identity and camera, the last images are query and multi-query, as in Market-1501."""
    multi_query_index = (
        settings.images_per_camera - 1 if settings.images_per_camera >= 4 else settings.images_per_camera
    )
    trainval, query, multi_query, gallery = [], [], [], []
    for person_id in range(settings.num_ids + 1):
        for camera, index in _images_of(settings):
            name = format_image_name(person_id, camera, index)
            if person_id == DISTRACTOR_ID:
                gallery.append(name)
            elif person_id <= settings.num_train_ids:
                trainval.append(name)
            elif index == multi_query_index:
                multi_query.append(name)
            elif index == multi_query_index - 1:
                query.append(name)
            else:
                gallery.append(name)
    # 100 of Market-1501's 751 identities are for validation.
    num_val_ids = math.ceil(settings.num_train_ids * 100 / 751)
    return build_partitions(trainval, query, gallery, multi_query, num_val_ids)
