"""What can be known to be wrong before a process, a device or an hour is spent on a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligned_reid.config import Config
from aligned_reid.data.checks import check_images, check_protocol
from aligned_reid.data.dataset import JoinedTrainImages, TestImages, TrainImages, open_data
from aligned_reid.data.identities import check_identities
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device.base import check_device_name
from aligned_reid.errors import InputError
from aligned_reid.model import make_trunk
from aligned_reid.training.checkpoint import read_last_good
from aligned_reid.weights import (
    CHECKPOINT_NAME,
    PREVIOUS_NAME,
    find_state_dict,
    load_trunk,
    read_imagenet_weights,
    read_weight_file,
)

# Of one model: its weights and Adam's two moments, float32; and the moving average of its weights.
CHECKPOINT_BYTES, AVERAGE_BYTES = 320 * 2**20, 100 * 2**20
NUM_CHECKPOINTS = 3  # the newest, the one before it, and the one that is being written


@dataclass(frozen=True)
class RunInput:
    """What a run starts from."""

    tests: Mapping[str, TestImages]  # by the data set's name, in the order of --dataset
    train: TrainImages | None  # None where nothing is trained
    weights: Any = None  # the content of the weight file to start or test from; read before the run writes anything

    @property
    def test(self) -> TestImages:
        """The test images of the only data set, or of the first one."""
        return next(iter(self.tests.values()))


def check_input(config: Config, *, has_run_dir: bool = True) -> RunInput:
    """Check all that a run will read and write, without a device; returns what it starts from. Raises InputError.

    A launcher calls it once before it starts processes; each process finds the images' stamp and is spared the reading.
    has_run_dir: whether the checkpoint to resume from has to be here; only rank 0 reads it.
    """
    check_device_name(config.device)
    if config.repeat > 1:
        config = replace(config, resume=False)  # each of its runs looks into its own folder
    given = open_images(config)
    if given.train is not None:
        person_ids = given.train.person_ids
        IdentityBatchSampler(person_ids, config.ids_per_batch, config.ims_per_id, config.train_final_batch, seed=0)
    weights = read_start_weights(config, has_run_dir, given.train)
    check_run_dir(config)
    return replace(given, weights=weights)


def open_images(config: Config) -> RunInput:
    """The images that the run uses, each of them checked to be whole."""
    if not config.data_path:
        raise InputError(
            "no --data_path: give a prepared data set (script/prepare_market1501.py makes one of Market-1501, "
            "script/prepare_photos.py of your own photos, script/make_synthetic.py draws one)"
        )
    folders = data_folders(config)
    opened = {name: open_set(config, folder) for name, folder in folders.items()}
    tests = {name: test for name, (test, _) in opened.items()}
    trains = {name: train for name, (_, train) in opened.items() if train is not None}
    if len(trains) > 1:
        return RunInput(tests, JoinedTrainImages(trains))
    return RunInput(tests, next(iter(trains.values()), None))


def data_folders(config: Config) -> dict[str, str]:
    """The folder of each data set by its name, in the order of --dataset. Raises InputError unless each has one."""
    names, folders = config.dataset_names, [config.data_path]
    # A single folder may have a + in its name.
    if len(names) > 1 or not Path(config.data_path).exists():
        parts = [part for part in config.data_path.split("+") if part]
        if len(names) > 1 or any(Path(part).exists() for part in parts):
            folders = parts
    if len(folders) != len(names):
        raise InputError(
            f"--data_path has {len(folders)} folder{'s' if len(folders) > 1 else ''} and --dataset {len(names)} "
            f"name{'s' if len(names) > 1 else ''}: give one each, as in --dataset=a+b --data_path=dirA+dirB"
        )
    return dict(zip(names, folders, strict=True))


def open_set(config: Config, folder: str) -> tuple[TestImages, TrainImages | None]:
    """The images of one data set that the run uses, each of them checked to be whole."""
    data = open_data(folder, config.partition_file or None)
    size = config.resize_h_w
    test = TestImages(data, "test", config.multi_query, size)
    train = None
    if not config.only_test:
        train = TrainImages(
            data,
            config.trainset_part,
            size,
            config.crop_prob,
            config.crop_ratio,
            pad_crop=config.pad_crop,
            erase_prob=config.erase_prob,
        )
    try:
        check_protocol(test.person_ids, test.cameras, test.marks)
    except InputError as error:
        raise InputError(f"{error} ({folder})") from error
    check_images(data, [*(train.image_names if train else []), *test.image_names])
    return test, train


def read_start_weights(config: Config, has_run_dir: bool, train: TrainImages | None) -> Any:
    """The content of the file to start or test from, None where there is none; it and --pretrained hold a ResNet-50.

    A run to resume has trained on the persons of `train`.
    """
    if config.resume and not has_run_dir:
        return None
    if config.model_weight_file and not (config.resume and train):
        return read_with_trunk(config.model_weight_file)
    if config.resume or config.only_test:
        file = config.run_dir / CHECKPOINT_NAME
        if not (file.is_file() or (config.resume and file.with_name(PREVIOUS_NAME).is_file())):
            advice = "leave out --resume true to start anew" if config.resume else "give --model_weight_file"
            flag = "--resume true" if config.resume else "--only_test true"
            raise InputError(f"{flag} needs {file}, which does not exist: give the --exp_dir of its run, or {advice}")
        if config.resume:
            last = read_last_good(config.run_dir)
            if train is not None:
                check_identities(last.content, last.path, train)
            return check_trunk(last.content, str(last.path))
        return read_with_trunk(str(file))
    if config.pretrained == "imagenet":
        load_trunk(make_trunk(), read_imagenet_weights(), "imagenet")
    elif config.pretrained != "none":
        read_with_trunk(config.pretrained)
    return None


def read_with_trunk(path: str) -> Any:
    """The content of a weight file, which holds a whole ResNet-50."""
    return check_trunk(read_weight_file(path), path)


def check_trunk(content: Any, path: str) -> Any:
    load_trunk(make_trunk(), find_state_dict(content, path), path)
    return content


def check_run_dir(config: Config) -> None:
    """The run folder can be made and written, and its checkpoints fit onto its disk."""
    folder = config.run_dir
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"--exp_dir {folder}: {existing} is a file")
    if not can_write(existing):
        raise InputError(f"--exp_dir {folder}: {existing} cannot be written to; choose another folder")
    free = shutil.disk_usage(existing).free
    here = sum((folder / name).is_file() for name in (CHECKPOINT_NAME, PREVIOUS_NAME)) if config.resume else 0
    one = config.num_models * (CHECKPOINT_BYTES + (AVERAGE_BYTES if config.ema_decay else 0))
    needed = (NUM_CHECKPOINTS - here) * one
    if not config.only_test and free < needed:
        raise InputError(
            f"--exp_dir {folder}: {free // 2**20} MB are free, checkpoints need {needed // 2**20}; "
            "make room or choose another folder"
        )


def check_save_file(file: Path) -> None:
    """A file can be written there. Raises InputError where it cannot."""
    if file.is_dir():
        raise InputError(f"--save_file {file} is a folder: name a file in it")
    if not file.absolute().parent.is_dir():
        raise InputError(f"--save_file {file}: there is no folder {file.parent}")
    if not can_write(file.absolute().parent):
        raise InputError(f"--save_file {file}: {file.parent} cannot be written to; choose another folder")


def can_write(folder: Path) -> bool:
    """Whether a file can be made there: os.access does not know of read-only mounts or, for root, of permissions."""
    probe = folder / f".write_test_{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
