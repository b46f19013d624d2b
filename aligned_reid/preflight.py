"""What can be known to be wrong before a process, a device or an hour is spent on a run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from aligned_reid.config import Config
from aligned_reid.data.checks import check_images, check_protocol
from aligned_reid.data.dataset import TestImages, TrainImages, open_data
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.errors import InputError
from aligned_reid.model import make_trunk
from aligned_reid.training.checkpoint import read_checkpoint
from aligned_reid.weights import CHECKPOINT_NAME, load_trunk, read_imagenet_weights, read_state_dict

CHECKPOINT_BYTES = 320 * 2**20  # model and Adam's two moments, float32


@dataclass(frozen=True)
class RunData:
    """The images of a run."""

    test: TestImages
    train: TrainImages | None  # None where nothing is trained


def check_input(config: Config) -> RunData:
    """Check all that a run will read and write, without a device; returns its images. Raises InputError.

    A launcher calls it once before it starts processes; each process finds the images' stamp and is spared the reading.
    """
    data = open_run_data(config)
    if data.train is not None:
        IdentityBatchSampler(
            data.train.person_ids, config.ids_per_batch, config.ims_per_id, config.train_final_batch, 0
        )
    check_weight_files(config)
    check_run_dir(config)
    return data


def open_run_data(config: Config) -> RunData:
    """The images that the run uses, each of them checked to be whole."""
    if not config.data_path:
        raise InputError(
            "no --data_path: give a prepared data set (script/prepare_market1501.py makes one of Market-1501, "
            "script/make_synthetic.py draws one)"
        )
    data = open_data(config.data_path, config.partition_file or None)
    size = config.resize_h_w
    test = TestImages(data, "test", config.multi_query, size)
    train = None
    if not config.only_test:
        train = TrainImages(data, config.trainset_part, size, config.crop_prob, config.crop_ratio)
    check_protocol(test.person_ids, test.cameras, test.marks)
    check_images(data, [*(train.image_names if train else []), *test.image_names])
    return RunData(test, train)


def check_weight_files(config: Config) -> None:
    """The files behind --model_weight_file, --pretrained and --resume hold what the run needs of them."""
    if config.model_weight_file:
        check_trunk(config.model_weight_file)
    elif config.resume or config.only_test:
        if not (config.run_dir / CHECKPOINT_NAME).is_file():
            flag = "--resume true" if config.resume else "--only_test true without --model_weight_file"
            raise InputError(
                f"{flag} needs {config.run_dir / CHECKPOINT_NAME}, and it is not there: is --exp_dir right?"
            )
        if config.resume:
            read_checkpoint(config.run_dir / CHECKPOINT_NAME)
        check_trunk(str(config.run_dir))
    elif config.pretrained == "imagenet":
        load_trunk(make_trunk(), read_imagenet_weights(), "imagenet")
    elif config.pretrained != "none":
        check_trunk(config.pretrained)


def check_trunk(path: str) -> None:
    """The file holds a whole ResNet-50."""
    load_trunk(make_trunk(), read_state_dict(path), path)


def check_run_dir(config: Config) -> None:
    """The run folder can be made and written, and a checkpoint fits onto its disk."""
    folder = config.run_dir
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"--exp_dir {folder}: {existing} is a file")
    if not can_write(existing):
        raise InputError(f"--exp_dir {folder}: {existing} cannot be written to; choose another folder")
    free = shutil.disk_usage(existing).free
    if not config.only_test and free < CHECKPOINT_BYTES:
        raise InputError(
            f"--exp_dir {folder}: {free // 2**20} MB are free, a checkpoint needs {CHECKPOINT_BYTES // 2**20}; "
            "make room or choose another folder"
        )


def can_write(folder: Path) -> bool:
    """Whether a file can be made there: os.access does not know of read-only mounts or, for root, of permissions."""
    probe = folder / f".write_test_{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
