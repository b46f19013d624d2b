"""The cache of decoded images: the same bytes as from the files, built once, rebuilt if stale or damaged."""

import errno
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_disk, refusal
from test_dataset import SIZE, epoch, write_data
from torch import multiprocessing

from aligned_reid import run
from aligned_reid.config import Config
from aligned_reid.data.dataset import ReidData, TrainImages, open_data
from aligned_reid.data.loader import make_loader
from aligned_reid.data.sampler import SampleRequest
from aligned_reid.data.transforms import decode_image, resize_image
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World, process_group
from aligned_reid.launcher import free_port
from aligned_reid.training.log import Log


@pytest.fixture
def data(tmp_path) -> ReidData:
    return open_data(write_data(tmp_path / "prepared"))


def open_train(data: ReidData, lines: list[str] | None = None, crop_prob: float = 0.0) -> TrainImages:
    """Training images from the cache in the data folder."""
    images = TrainImages(data, "trainval", SIZE, crop_prob, crop_ratio=0.6)
    images.open_cache([data.root / "cache"], [].append if lines is None else lines.append)
    return images


def cache_file(data: ReidData) -> Path:
    (file,) = (data.root / "cache").glob("*.npy")
    return file


@pytest.mark.parametrize("crop_prob", [0.0, 0.5])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files(data, crop_prob, workers):
    live = TrainImages(data, "trainval", SIZE, crop_prob, crop_ratio=0.6)
    expected = epoch(live, workers=0, epochs=3)
    cached = open_train(data, crop_prob=crop_prob)
    for image in data.images_dir.iterdir():
        image.unlink()  # nothing is read from there any more
    for batch, other in zip(epoch(cached, workers, epochs=3), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    assert not cached.read(0).flags.writeable


def test_it_is_built_once_for_each_size_and_list_of_images_and_logged(data):
    lines: list[str] = []
    first, second = open_train(data, lines), open_train(data, lines)
    assert f"{cache_file(data)}: 24 images" in lines[0] and f"{cache_file(data)} holds 24" in lines[1]
    assert np.array_equal(first.read(3), second.read(3))
    open_train(data, crop_prob=0.5)
    for images in (TrainImages(data, "train", SIZE), TrainImages(data, "trainval", (40, 24))):
        images.open_cache([data.root / "cache"], print)
    names = sorted(path.name.split("-")[0] for path in (data.root / "cache").glob("*.npy"))
    assert names == ["40x24", "64x32", "64x32", "original"]


@pytest.mark.parametrize("change", ["date", "content", "library"])
def test_a_stale_one_is_rebuilt(data, monkeypatch, change):
    open_train(data)
    first, second = (data.images_dir / name for name in data.partitions.trainval_im_names[:2])
    if change == "content":
        shutil.copyfile(second, first)
    elif change == "date":
        os.utime(first, ns=(1, 1))
    else:
        monkeypatch.setattr("simplejpeg.__version__", "0")
    lines: list[str] = []
    again = open_train(data, lines)
    assert "rebuilding" in lines[0] and len(lines) == 2
    assert np.array_equal(again.read(0), resize_image(decode_image(first), SIZE))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in the header": lambda path: os.truncate(path, 100),
    "another array": lambda path: np.save(path.open("wb"), np.zeros(5, dtype=np.uint8)),
    "another file": lambda path: path.write_bytes(b"\xff" * 10_000),
    "a list": lambda path: path.write_bytes(b"[]"),
}


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_rebuilt(data, damage, suffix):
    before = open_train(data).read(5).copy()
    DAMAGES[damage](cache_file(data).with_suffix(suffix))
    lines: list[str] = []
    for _ in range(2):
        assert np.array_equal(open_train(data, lines).read(5), before)
    assert "rebuilding" in lines[0] and lines[-1].endswith("holds 24 images")


def test_a_cache_that_is_damaged_after_it_was_opened_is_one_line(data):
    images = open_train(data)
    cache_file(data).write_bytes(b"")
    assert "image cache" in refusal(list, make_loader(images, [[SampleRequest(0, 0)]]))
    images = open_train(data)
    expected = images.read(1).copy()
    cache_file(data).unlink()
    assert np.array_equal(images.read(1), expected)  # a mapped file stays readable


def test_a_full_disk_is_one_line_and_keeps_the_old_one(data, monkeypatch):
    open_train(data)
    old = cache_file(data).read_bytes()
    os.utime(data.images_dir / data.partitions.trainval_im_names[0], ns=(1, 1))
    monkeypatch.setattr(Path, "replace", full_disk)
    lines: list[str] = []
    assert "cannot write" in refusal(open_train, data, lines)
    assert os.strerror(errno.ENOSPC) in lines[-1]
    assert cache_file(data).read_bytes() == old
    assert not list((data.root / "cache").glob(".*.tmp"))


def test_files_of_a_killed_process_are_removed(data):
    open_train(data)
    path = cache_file(data)
    path.with_suffix(".json").unlink()  # it was killed before the last step
    path.with_name(f".{path.name}.tmp").write_bytes(b"half")
    open_train(data)
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".npy"]


def test_the_next_folder_is_used_if_one_is_not_writable(data, tmp_path):
    (data.root / "cache").write_text("a file where the folder should be")
    lines: list[str] = []
    images = TrainImages(data, "trainval", SIZE)
    images.open_cache([data.root / "cache", tmp_path / "run" / "cache"], lines.append)
    assert str(data.root / "cache") in lines[0] and f"{tmp_path / 'run' / 'cache'}/64x32-" in lines[1]
    assert "cannot write" in refusal(images.open_cache, [Path("/proc/cache"), data.root / "cache"], print)


def test_one_process_builds_and_the_others_wait(data):
    lines: list[str] = []
    with ThreadPoolExecutor(4) as pool:  # locks belong to open files, so threads exclude each other as processes do
        opened = list(pool.map(lambda _: open_train(data, lines).read(7).tobytes(), range(4)))
    assert sum("24 images, " in line for line in lines) == 1
    assert len(set(opened)) == 1


def test_a_bad_image_is_named(data):
    image = data.images_dir / data.partitions.trainval_im_names[5]
    image.write_bytes(b"")
    for crop_prob in (0.0, 0.5):
        assert image.name in refusal(open_train, data, crop_prob=crop_prob)
    image.unlink()
    assert image.name in refusal(open_train, data)


def test_workers_get_its_name_only_and_none_is_started_if_images_are_only_copied(data):
    images = open_train(data)
    assert len(pickle.dumps(images.cache)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(images)).read(0), images.read(0))
    assert make_loader(images, [[]], workers=1).num_workers == 0
    assert make_loader(open_train(data, crop_prob=0.5), [[]], workers=1).num_workers == 1


def open_as_rank(rank: int, port: int, data: ReidData, folder: Path) -> None:
    os.environ["MASTER_PORT"] = str(port)
    world = World(rank, 2, rank)
    images = TrainImages(data, "trainval", SIZE)
    log = Log(folder if rank == 0 else None, is_main=rank == 0)
    with process_group(world, "gloo"):
        run.open_image_cache(Config(exp_dir=str(folder)), world, Accelerator(Config(amp="O0")), images, log)
    np.save(folder / f"rank{rank}.npy", np.stack([images.read(index) for index in range(len(images))]))


@pytest.mark.slow
def test_of_several_ranks_the_first_builds_it(data, tmp_path):
    multiprocessing.set_forkserver_preload(["aligned_reid.run"])
    multiprocessing.start_processes(open_as_rank, (free_port(), data, tmp_path), nprocs=2, start_method="forkserver")
    assert (tmp_path / "log.txt").read_text().startswith(f"image cache {cache_file(data)}: 24 images, ")
    assert np.array_equal(*(np.load(tmp_path / f"rank{rank}.npy") for rank in range(2)))
