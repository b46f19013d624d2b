"""The cache of decoded images: the same bytes as from the files, built once, never believed when it is not whole."""

import errno
import multiprocessing
import os
import pickle
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dataset import SIZE, epoch, spoil, write_data

from aligned_reid import InputError, run
from aligned_reid.config import Config
from aligned_reid.data import cache
from aligned_reid.data.dataset import ReidData, TestImages, TrainImages, open_data
from aligned_reid.data.loader import make_loader
from aligned_reid.data.sampler import SampleRequest
from aligned_reid.data.transforms import decode_image, resize_image
from aligned_reid.device.base import Accelerator
from aligned_reid.distributed import World, close_group, open_group
from aligned_reid.training.log import Log


@pytest.fixture
def data(tmp_path) -> ReidData:
    return open_data(write_data(tmp_path / "prepared"))


def open_train(data: ReidData, lines: list[str] | None = None, crop_prob: float = 0.0) -> TrainImages:
    """Training images that come from the cache in the data folder."""
    images = TrainImages(data, "trainval", SIZE, crop_prob, crop_ratio=0.6)
    images.open_cache([data.root / "cache"], [].append if lines is None else lines.append)
    return images


def cache_file(data: ReidData) -> Path:
    (file,) = (path for path in (data.root / "cache").iterdir() if not path.name.startswith("."))
    return file


def same_batches(first: list, second: list) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def no_decoding(path: str) -> np.ndarray:
    raise AssertionError(f"{path} is read again")


@pytest.mark.parametrize("crop_prob", [0.0, 0.5])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files(data, crop_prob, workers):
    live = TrainImages(data, "trainval", SIZE, crop_prob, crop_ratio=0.6)
    expected = epoch(live, workers=0, epochs=3)
    cached = open_train(data, crop_prob=crop_prob)
    for image in data.images_dir.iterdir():
        image.unlink()  # nothing is read from there any more
    assert same_batches(epoch(cached, workers, epochs=3), expected)
    kind = "original" if crop_prob else "64x32"
    assert cache_file(data).name.startswith(f"{kind}-")


def test_cached_images_are_the_decoded_ones(data):
    resized, original = open_train(data), open_train(data, crop_prob=0.5)
    for index, name in enumerate(resized.image_names):
        image = decode_image(data.images_dir / name)
        assert np.array_equal(original.read(index), image)
        assert np.array_equal(resized.read(index), resize_image(image, SIZE))
    with pytest.raises(ValueError, match="read-only"):
        original.read(0)[:] = 0


def test_test_images_may_have_one_too(data):
    images = TestImages(data, "test", size=SIZE)
    expected = list(make_loader(images, batch_size=5))
    images.open_cache([data.root / "cache"], print)
    shutil.rmtree(data.images_dir)
    assert same_batches(list(make_loader(images, batch_size=5)), expected)


def test_it_is_built_once_and_says_so(data, monkeypatch):
    lines: list[str] = []
    first = open_train(data, lines)
    monkeypatch.setattr(cache, "decode_image", no_decoding)
    second = open_train(data, lines)
    assert len(lines) == 2
    assert lines[0].startswith(f"image cache {cache_file(data)}: 24 images, 0 MB, in ")
    assert lines[1] == f"image cache {cache_file(data)} holds 24 images"
    assert np.array_equal(first.read(3), second.read(3))
    assert not list((data.root / "cache").glob(".*.tmp"))


def test_each_size_and_each_list_of_images_has_its_own(data):
    open_train(data)
    open_train(data, crop_prob=0.5)
    for images in (TrainImages(data, "train", SIZE), TrainImages(data, "trainval", (40, 24))):
        images.open_cache([data.root / "cache"], print)
    files = [path for path in (data.root / "cache").iterdir() if path.suffix == ".images"]
    assert sorted(path.name.split("-")[0] for path in files) == ["40x24", "64x32", "64x32", "original"]


@pytest.mark.parametrize("change", ["date", "content", "OpenCV", "simplejpeg"])
def test_a_stale_one_is_built_anew(data, monkeypatch, change):
    open_train(data)
    images = [data.images_dir / name for name in data.partitions.trainval_im_names]
    if change == "date":
        os.utime(images[0], ns=(1, 1))
    elif change == "content":
        shutil.copyfile(images[1], images[0])
    else:
        monkeypatch.setattr(cache.cv2 if change == "OpenCV" else cache.simplejpeg, "__version__", "0")
    lines: list[str] = []
    again = open_train(data, lines)
    assert len(lines) == 2
    assert lines[0] == (
        f"image cache {cache_file(data)} is of other images, or was made by other versions of the decoding libraries: "
        "it is built anew"
    )
    assert np.array_equal(again.read(0), resize_image(decode_image(images[0]), SIZE))


def flip_a_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in the index": lambda path: os.truncate(path, 100),
    "other file": lambda path: path.write_bytes(b"\xff" * 10_000),
    "bit of the key": lambda path: flip_a_bit(path, 12),
    "bit of the number": lambda path: flip_a_bit(path, 40),
    "high bit of the number": lambda path: flip_a_bit(path, 47),
    "bit of the index": lambda path: flip_a_bit(path, cache.HEADER.size + 30),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_built_anew(data, damage):
    before = open_train(data).read(5).copy()
    DAMAGES[damage](cache_file(data))
    lines: list[str] = []
    assert np.array_equal(open_train(data, lines).read(5), before)
    assert lines[0] == f"image cache {cache_file(data)} is damaged: it is built anew"
    open_train(data, lines)
    assert lines[-1].endswith("holds 24 images")


def test_a_cache_that_changed_after_it_was_opened_is_one_line(data):
    images = open_train(data)
    cache_file(data).write_bytes(b"")
    with pytest.raises(InputError, match="is damaged; start again to build it anew"):
        list(make_loader(images, [[SampleRequest(0, 0)]]))
    images = open_train(data)
    images.read(0)
    expected = images.read(1).copy()
    cache_file(data).unlink()
    assert np.array_equal(images.read(1), expected)  # what is mapped stays


def test_no_room_is_said_before_anything_is_written(data, monkeypatch):
    usage = shutil.disk_usage(data.root)
    need = 4096 + 24 * 64 * 32 * 3
    for free in (need, need - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free == need:
            open_train(data)
            cache_file(data).unlink()
            continue
        with pytest.raises(InputError) as caught:
            open_train(data)
        assert str(caught.value).startswith(
            f"--cache true needs 0.2 MB in {data.root / 'cache'}, where 0.2 MB are free"
        )
    originals = sum(decode_image(data.images_dir / name).nbytes for name in data.partitions.trainval_im_names)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096 + originals - 1))
    with pytest.raises(InputError, match="make room"):
        open_train(data, crop_prob=0.5)
    assert all(path.suffix == ".lock" for path in (data.root / "cache").iterdir())


def test_a_disk_that_fills_up_leaves_the_former_one(data, monkeypatch):
    open_train(data)
    former = cache_file(data).read_bytes()
    for image in data.images_dir.iterdir():
        os.utime(image, ns=(1, 1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(InputError, match="cache is full .No space left on device.; make room"):
        open_train(data)
    assert cache_file(data).read_bytes() == former
    assert not list((data.root / "cache").glob(".*.tmp"))


def test_what_a_killed_process_left_is_removed(data):
    path = (
        data.root
        / "cache"
        / cache.CacheContent(str(data.images_dir), data.partitions.trainval_im_names, SIZE).file_name
    )
    path.parent.mkdir()
    path.with_name(f".{path.name}.123.tmp").write_bytes(b"half")
    open_train(data)
    assert cache_file(data) == path
    assert not list(path.parent.glob(".*.tmp"))


def test_a_folder_that_cannot_be_written_to_gives_way_to_the_next(data, tmp_path):
    (data.root / "cache").write_text("a file where the folder should be")
    lines: list[str] = []
    images = TrainImages(data, "trainval", SIZE)
    images.open_cache([data.root / "cache", tmp_path / "run" / "cache"], lines.append)
    assert lines[0] == f"no image cache in {data.root / 'cache'}: File exists"
    assert lines[1].startswith(f"image cache {tmp_path / 'run' / 'cache'}/64x32-")
    images.open_cache([data.root / "cache", tmp_path / "run" / "cache"], lines.append)
    assert lines[2].endswith("holds 24 images")
    with pytest.raises(InputError, match="none of /proc/cache, .* can be written to"):
        images.open_cache([Path("/proc/cache"), data.root / "cache"], lines.append)


def test_who_comes_while_it_is_built_waits_for_it(data):
    lines: list[str] = []
    with ThreadPoolExecutor(4) as pool:  # locks are of open files: among threads they hold as among processes
        opened = list(pool.map(lambda _: open_train(data, lines).read(7).tobytes(), range(4)))
    assert sum("24 images, 0 MB, in " in line for line in lines) == 1
    assert len(set(opened)) == 1


@pytest.mark.parametrize("crop_prob", [0.0, 0.5])
def test_an_image_that_turned_bad_before_it_was_built_is_left_to_the_loader(data, crop_prob):
    live = TrainImages(data, "trainval", SIZE, crop_prob, crop_ratio=0.6)
    spoil(live, 5)
    lines: list[str] = []
    cached = open_train(data, lines, crop_prob)
    assert "24 images, without 1 that cannot be decoded, 0 MB" in lines[0]
    expected = epoch(live, workers=0, epochs=4)
    assert sum(len(batch.replaced) for batch in expected) > 0
    assert same_batches(epoch(cached, workers=0, epochs=4), expected)
    for index in range(len(live)):
        spoil(live, index)
    assert not open_train(data, crop_prob=crop_prob).cache[0]


def test_what_travels_to_workers_is_a_name(data):
    images = open_train(data)
    size = len(pickle.dumps(images))
    expected = images.read(0).copy()
    assert len(pickle.dumps(images)) == size < 20_000
    assert np.array_equal(pickle.loads(pickle.dumps(images)).read(0), expected)


def test_no_process_is_started_for_images_that_are_only_copied(data):
    assert make_loader(open_train(data), [[]], workers=1).num_workers == 0
    assert make_loader(open_train(data, crop_prob=0.5), [[]], workers=1).num_workers == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_goes_first(data, tmp_path, monkeypatch, rank):
    done: list[str] = []
    monkeypatch.setattr(run, "wait_for_all", lambda device: done.append("waited"))
    images = TrainImages(data, "trainval", SIZE)
    config, accelerator = Config(exp_dir=str(tmp_path)), Accelerator(mixed_precision=False)
    run.open_image_cache(config, World(rank, 2, rank), accelerator, images, done.append)
    assert ["waited" in line for line in done] == ([False, True] if rank == 0 else [True, False])
    assert images.cache.path == cache_file(data)


def open_as_rank(rank: int, port: int, data: ReidData, folder: Path) -> None:
    """One of two ranks that open their images' cache."""
    os.environ["MASTER_PORT"] = str(port)
    world = World(rank, 2, rank)
    open_group(world, "gloo")
    images = TrainImages(data, "trainval", SIZE)
    log = Log(folder if rank == 0 else None, is_main=rank == 0)
    run.open_image_cache(Config(exp_dir=str(folder)), world, Accelerator(mixed_precision=False), images, log)
    np.save(folder / f"rank{rank}.npy", np.stack([images.read(index) for index in range(len(images))]))
    close_group()


@pytest.mark.slow
def test_of_several_ranks_the_first_builds_it(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aligned_reid.run"])
    running = [context.Process(target=open_as_rank, args=(rank, port, data, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=60)
    assert [process.exitcode for process in running] == [0, 0]
    assert (tmp_path / "log.txt").read_text().startswith(f"image cache {cache_file(data)}: 24 images, ")
    pixels = [np.load(tmp_path / f"rank{rank}.npy") for rank in range(2)]
    assert np.array_equal(*pixels)
