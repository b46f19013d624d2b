"""Everything that can be found wrong before a run takes processes, devices or hours."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligned_reid.cli import command_line
from aligned_reid.config import Config
from aligned_reid.data.checks import check_images, check_protocol
from aligned_reid.data.dataset import TestImages, TrainImages, open_data
from aligned_reid.data.identities import check_identities
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import check_device_name
from aligned_reid.distributed import World
from aligned_reid.errors import InputError
from aligned_reid.files import can_write
from aligned_reid.model import AlignedReID, make_trunk
from aligned_reid.training.checkpoint import read_last_good
from aligned_reid.weights import CHECKPOINT_NAME, PREVIOUS_NAME, find_state_dict, load_trunk, read_weight_file


@dataclass(frozen=True)
class RunInput:
    """What a run starts from."""

    test: TestImages
    train: TrainImages | None  # None if nothing is trained
    weights: Any  # content of the weight file to start or test from


def check_input(config: Config, world: World) -> RunInput:
    """Check all that a process reads and writes, without a device, and return what it starts from.

    Only rank 0 needs the run folder: it reads the checkpoint to resume from, and writes. Raises InputError.
    """
    check_device_name(config.device)
    test, train = open_images(config, world)
    weights = read_start_weights(config, train) if world.is_main or not config.resume else None
    if world.is_main:
        check_run_dir(config.run_dir)
    return RunInput(test, train, weights)


def open_images(config: Config, world: World) -> tuple[TestImages, TrainImages | None]:
    """The images to test and to train on. One process of a machine decodes each of them once, to find damaged ones."""
    if not config.data_path:
        raise InputError(
            f"no --data_path: give a prepared data set ({command_line('prepare market1501')} prepares Market-1501, "
            f"{command_line('prepare photos')} your own photos)"
        )
    data = open_data(config.data_path, config.partition_file or None)
    test = TestImages(data, "test", config.multi_query, config.resize_h_w)
    train = None
    if not config.only_test:
        train = TrainImages(
            data,
            config.trainset_part,
            config.resize_h_w,
            config.crop_prob,
            config.crop_ratio,
            pad_crop=config.pad_crop,
            erase_prob=config.erase_prob,
        )
        IdentityBatchSampler(
            train.person_ids, config.ids_per_batch, config.ims_per_id, config.train_final_batch, seed=0
        )
    try:
        check_protocol(test.person_ids, test.cameras, test.marks)
    except InputError as error:
        raise InputError(f"{error} ({config.data_path})") from error
    if world.local_rank == 0:
        check_images(data, [*(train.image_names if train else []), *test.image_names])
    return test, train


def read_start_weights(config: Config, train: TrainImages | None) -> Any:
    """The content of the file to start, resume or test from; None if there is none. --pretrained is checked only.

    train: whom a resumed run has to have been trained on.
    """
    if config.resume and train is not None:
        last = read_last_good(find_run(config, "--resume true", "leave out --resume true to start anew").parent)
        check_identities(last.content, last.path, train)
        content, path = last.content, str(last.path)
    elif config.model_weight_file or config.only_test:
        path = config.model_weight_file
        path = path or str(find_run(config, "--only_test true", "give --model_weight_file"))
        content = read_weight_file(path)
    else:
        if config.pretrained != "none":
            AlignedReID(None, pretrained=config.pretrained)  # which refuses a file without a trunk
        return None
    load_trunk(make_trunk(), find_state_dict(content, path), path)  # which refuses another network
    return content


def find_run(config: Config, flag: str, advice: str) -> Path:
    """The run folder's checkpoint. Raises InputError if neither it nor the one before it exists."""
    path = config.run_dir / CHECKPOINT_NAME
    if path.is_file() or path.with_name(PREVIOUS_NAME).is_file():
        return path
    raise InputError(f"{flag} needs {path}, which does not exist: give the --exp_dir of its run, or {advice}")


def check_run_dir(folder: Path) -> None:
    """Raise InputError unless the run folder can be made and written to."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not can_write(existing):
        raise InputError(f"--exp_dir {folder}: {existing} is not a folder that can be written to; choose another one")


def make_empty(folder: Path, flag: str, ours: str = "") -> None:
    """Make a folder. Raises InputError if it cannot be made or holds files, unless one of them is `ours`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}; give a new folder") from error
    if present and ours not in present:
        raise InputError(f"{flag} {folder} holds other files; give a new folder")


def check_save_file(file: Path, flag: str, *endings: str) -> None:
    """Raise InputError unless a file can be written there. The ending keeps weights and photos from being replaced."""
    if file.is_dir():
        raise InputError(f"{flag} {file} is a folder: name a file in it")
    if file.suffix.lower() not in endings:
        raise InputError(f"{flag} {file}: the name has to end in {' or '.join(endings)}")
    if not can_write(folder := file.absolute().parent):
        raise InputError(f"{flag} {file}: the folder {folder} does not exist or cannot be written to")
