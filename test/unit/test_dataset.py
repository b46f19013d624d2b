"""A prepared data set: opening, checking, reproducible samples, and loaders with and without worker processes."""

import dataclasses
import os
import shlex
import shutil
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import refusal

from aligned_reid import InputError
from aligned_reid.data.checks import check_images, check_protocol
from aligned_reid.data.dataset import ReidData, TestImages, TrainImages, open_data
from aligned_reid.data.loader import WorkerDied, fit_workers, make_loader
from aligned_reid.data.partitions import build_partitions, format_image_name, read_partitions, write_partitions
from aligned_reid.data.sampler import IdentityBatchSampler, SampleRequest
from aligned_reid.data.transforms import decode_image, random_crop, resize_image

SIZE = (64, 32)


def write_data(root: Path) -> Path:
    """Six training and three test identities under two cameras; the images are noise, so no two are alike."""

    def names(persons, cameras=(1, 2), indices=(0, 1)) -> list[str]:
        return [format_image_name(person, camera, i) for person in persons for camera in cameras for i in indices]

    query, gallery = names((20, 21, 22), indices=(0,)), names((0, 20, 21, 22), indices=(2, 3))
    partitions = build_partitions(names(range(2, 8)), query, gallery, names((20,), indices=(1,)), num_val_ids=2)
    (root / "images").mkdir(parents=True)
    random = np.random.RandomState(0)
    for name in partitions.trainval_im_names + partitions.test_im_names:
        image = random.randint(0, 256, (int(random.randint(30, 70)), 24, 3)).astype(np.uint8)
        (root / "images" / name).write_bytes(simplejpeg.encode_jpeg(image, quality=80))
    write_partitions(root / "partitions.pkl", partitions)
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> ReidData:
    """A data set that no test modifies."""
    return open_data(write_data(tmp_path_factory.mktemp("data") / "prepared"))


@pytest.fixture
def data(tmp_path) -> ReidData:
    """A data set that a test may damage."""
    return open_data(write_data(tmp_path / "prepared"))


def test_opening_reads_the_partitions_and_another_file_replaces_them(data, tmp_path):
    assert data.images_dir == data.root / "images"
    assert data.partitions == read_partitions(data.root / "partitions.pkl")
    other = build_partitions(data.partitions.trainval_im_names[:8], [], [], num_val_ids=0)
    write_partitions(tmp_path / "other.pkl", other)
    assert open_data(data.root, tmp_path / "other.pkl").partitions == other
    for wrong in (tmp_path / "none.pkl", tmp_path):
        assert "not a file" in refusal(open_data, data.root, wrong)
    (data.root / "Market-1501-v15.09.15" / "bounding_box_train").mkdir(parents=True)  # raw data beside it
    assert open_data(data.root).partitions == data.partitions
    (data.root / "partitions.pkl").unlink()
    assert open_data(str(data.root), str(tmp_path / "other.pkl")).partitions == other


def test_unprepared_paths_are_refused(data, tmp_path):
    for name in ("none", "n" * 300):
        assert f"{tmp_path / name} does not exist" in refusal(open_data, tmp_path / name)
    assert "not a file" in refusal(open_data, data.root, tmp_path / ("n" * 300))
    assert "does not exist" in refusal(open_data, "~nobody_of_this_name/set")
    for path in (data.root / "partitions.pkl", tmp_path):
        assert "has no images/" in refusal(open_data, path)
    (data.root / "partitions.pkl").write_bytes(b"")
    assert "cut off" in refusal(open_data, data.root)
    (data.root / "partitions.pkl").unlink()
    assert "has no partitions.pkl" in refusal(open_data, data.root)


def test_raw_data_sets_are_refused_with_the_command_to_prepare_them(tmp_path):
    market = [f"market/Market-1501/{folder}/x" for folder in ("bounding_box_train", "bounding_box_test", "query")]
    files = [
        "msmt17/train/x",
        "msmt17/list_train.txt",
        "cuhk03/cuhk-03.mat",
        "photos/anna/c1.jpg",
        "photos/bert/c1.jpg",
    ]
    for file in [*market, *files]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "photos.csv").write_text("path,person,camera\n")
    shutil.make_archive(str(tmp_path / "market"), "zip", tmp_path / "market")
    for given, source, script in (
        ("market", "market/Market-1501", "prepare_market1501.py"),
        ("market/Market-1501", "market/Market-1501", "prepare_market1501.py"),
        ("market.zip", "market.zip", "prepare_market1501.py"),
        ("msmt17", "msmt17", "prepare_msmt17.py"),
        ("cuhk03", "cuhk03", "prepare_cuhk03.py"),
        ("photos", "photos", "prepare_photos.py"),
        ("photos.csv", "photos.csv", "prepare_photos.py"),
    ):
        command = f"python script/{script} --source {shlex.quote(str(tmp_path / source))} "
        assert command in refusal(open_data, tmp_path / given)


def test_train_images_have_labels_of_their_part_which_must_not_be_empty(shared):
    trainval, train = TrainImages(shared, "trainval", SIZE), TrainImages(shared, "train", SIZE)
    assert (len(trainval), trainval.num_classes) == (24, 6)
    assert trainval.image_names == shared.partitions.trainval_im_names
    assert trainval.labels.tolist() == [person - 2 for person in trainval.person_ids]
    assert train.num_classes == 4 and set(train.labels) == {0, 1, 2, 3}
    assert train[SampleRequest(5, 0)][1:] == (train.labels[5], 5)
    empty = dict.fromkeys(("train_im_names", "val_im_names", "val_marks"), []) | {"train_ids2labels": {}}
    data = dataclasses.replace(shared, partitions=dataclasses.replace(shared.partitions, **empty))
    assert "no train images" in refusal(TrainImages, data, "train")
    assert "no val images" in refusal(TestImages, data, "val")


def test_test_images_exclude_multi_query_by_default(shared):
    images = TestImages(shared, "test", size=SIZE)
    assert set(images.marks) == {0, 1} and len(images) == 6 + 16
    everything = TestImages(shared, "test", include_multi_query=True, size=SIZE)
    assert everything.image_names == shared.partitions.test_im_names
    assert everything.marks.tolist() == shared.partitions.test_marks
    kept = zip(shared.partitions.test_im_names, shared.partitions.test_marks, strict=True)
    assert images.image_names == [name for name, mark in kept if mark != 2]
    assert images.person_ids.tolist() == [int(name[:8]) for name in images.image_names]
    assert images.cameras.tolist() == [int(name[9:13]) for name in images.image_names]
    assert TestImages(shared, "val").marks.tolist() == shared.partitions.val_marks


def test_half_of_the_samples_are_mirrored_and_a_share_of_crop_prob_is_cropped(shared):
    plain = TrainImages(shared, "trainval", SIZE, mirror=False)[SampleRequest(0, 0)][0]

    def share_equal(expected: np.ndarray, crop_prob: float = 0.0, crop_ratio: float = 0.8, mirror=False) -> float:
        images = TrainImages(shared, "trainval", SIZE, crop_prob, crop_ratio, mirror=mirror)
        return np.mean([np.array_equal(images[SampleRequest(0, seed)][0], expected) for seed in range(400)])

    mirrored = share_equal(plain[:, ::-1], mirror=True)
    assert 0.4 < mirrored < 0.6 and mirrored + share_equal(plain, mirror=True) == 1
    assert share_equal(plain, 0.0, 0.8) == share_equal(plain, 1.0, 1.0) == 1
    assert share_equal(plain, 1.0, 0.8) < 0.05
    assert 0.62 < share_equal(plain, 0.3, 0.8) < 0.78


def test_a_sample_is_a_function_of_its_seed(shared):
    plain = TrainImages(shared, "trainval", SIZE)
    for settings in ({"crop_prob": 1.0, "crop_ratio": 0.7}, {"pad_crop": 4}, {"erase_prob": 1.0}):
        images, again = (TrainImages(shared, "trainval", SIZE, **settings) for _ in range(2))
        samples = [images[SampleRequest(1, seed)][0].tobytes() for seed in range(20)]
        assert samples == [again[SampleRequest(1, seed)][0].tobytes() for seed in range(20)]
        assert samples[0] != plain[SampleRequest(1, 0)][0].tobytes() and len(set(samples)) > 8
    requests = [SampleRequest(index, 100 + index) for index in range(8)] * 8
    half = TrainImages(shared, "trainval", SIZE, erase_prob=0.5).load(requests).images
    share = (half != plain.load(requests).images).flatten(1).any(1).float().mean().item()
    assert 0.1 < share < 0.9


def epoch(images: TrainImages, workers: int, epochs: int = 1) -> list:
    sampler = IdentityBatchSampler(images.person_ids, 4, 4, final_batch=True, seed=1)
    loader = make_loader(images, sampler, workers=workers)
    batches = []
    for number in range(epochs):
        sampler.set_epoch(number)
        batches += list(loader)
    return batches


def test_batches_are_uint8_and_the_same_from_workers(shared):
    images = TrainImages(shared, "trainval", SIZE, crop_prob=0.5, crop_ratio=0.7)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    here, workers = epoch(images, workers=0, epochs=2), epoch(images, workers=2, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch.images) for batch in here] == [16, 8, 16, 8]
    for batch, other in zip(here, workers, strict=True):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (*SIZE, 3)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.labels.tolist() == images.labels[batch.indices].tolist()
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
        assert other.images.is_shared()
    assert here[0].indices.tolist() != here[2].indices.tolist()


def samples_of(images: TrainImages, requests: list[SampleRequest]) -> list[np.ndarray]:
    """The sample of each request, made by the functions of transforms.py."""
    samples = []
    for index, seed in requests:
        random = Random(seed)
        image = decode_image(f"{images.images_dir}/{images.image_names[index]}")
        if random.random() < images.crop_prob:
            image = random_crop(image, images.crop_ratio, random)
        image = resize_image(image, images.size)
        samples.append(image[:, ::-1] if random.random() < 0.5 else image)
    return samples


@pytest.mark.parametrize("size", [SIZE, (40, 24)])
@pytest.mark.parametrize("crop_prob", [0.0, 0.5])
def test_a_batch_filled_in_place_is_its_samples_stacked(shared, size, crop_prob):
    images = TrainImages(shared, "trainval", size, crop_prob, crop_ratio=0.6)
    requests = [SampleRequest(number % len(images), 2**40 + number) for number in range(60)]
    batch = images.__getitems__(requests)
    samples = [image for image, _, _ in map(images.__getitem__, requests)]
    assert np.array_equal(batch.images.numpy(), np.stack(samples_of(images, requests)))
    assert np.array_equal(batch.images.numpy(), np.stack(samples))
    assert batch.indices.tolist() == [request.index for request in requests]


def test_test_images_load_in_order_or_by_index(shared):
    images = TestImages(shared, "test", size=SIZE)
    batches = list(make_loader(images, batch_size=5))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(22))
    assert [len(batch.images) for batch in batches] == [5, 5, 5, 5, 2]
    expected = resize_image(decode_image(shared.images_dir / images.image_names[7]), SIZE)
    assert np.array_equal(batches[1].images[2].numpy(), expected)
    loader = make_loader(images, [[3, 1], [7]])
    assert len(loader) == 2
    assert [batch.indices.tolist() for batch in loader] == [[3, 1], [7]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["trainval", "test"])
def test_a_bad_image_is_one_line_with_its_name(data, part, workers):
    images = TestImages(data, part, size=SIZE) if part == "test" else TrainImages(data, part, SIZE)
    bad = data.images_dir / images.image_names[7]
    bad.write_bytes(bad.read_bytes()[:-30])
    requests = [7, 3] if part == "test" else [SampleRequest(7, 0), SampleRequest(3, 0)]
    batches = iter(make_loader(images, [requests[1:], requests], workers=workers))
    next(batches)
    with pytest.raises(InputError, match="cut off") as caught:
        next(batches)
    assert str(bad) in str(caught.value)
    del caught  # it refers to this frame: the cycle would keep the workers until some later test collects it


def test_bad_images_are_named_and_counted(data):
    names = data.partitions.trainval_im_names
    bad, other = data.images_dir / names[4], data.images_dir / names[9]
    check_images(data, names + data.partitions.test_im_names)
    other.unlink()
    for content, damage in ((bad.read_bytes()[:-20], "cut off"), (b"", "empty"), (b"<html>", "not a JPEG file")):
        bad.write_bytes(content)
        message = refusal(check_images, data, names)
        assert f"{bad} is {damage}" in message and "2 of 24" in message
    bad.unlink()
    assert f"{bad} is missing" in refusal(check_images, data, names)
    assert "1 of 1" in refusal(check_images, data, [names[9], names[9]])
    check_images(data, names[:4])


def test_queries_without_a_match_are_allowed_beside_others():
    check_protocol([1, 2, 1], [1, 1, 2], [0, 0, 1])


@pytest.mark.parametrize(
    ("person_ids", "cameras", "marks", "keyword"),
    [
        ([1, 1, 2], [1, 1, 2], [0, 1, 1], "no query has a match"),
        ([1, 2], [1, 2], [0, 1], "no query has a match"),
        ([1, 1, 2], [1, 2, 2], [0, 2, 1], "no query has a match"),  # the match is a multi-query image
        ([1, 1, 2], [3, 3, 3], [0, 1, 1], "one camera"),
        ([1, 1], [1, 2], [0, 0], "no gallery images"),
        ([1, 1], [1, 2], [1, 1], "no query images"),
        ([], [], [], "no query images"),
    ],
)
def test_a_test_set_without_matches_is_refused(person_ids, cameras, marks, keyword):
    assert keyword in refusal(check_protocol, np.array(person_ids), np.array(cameras), np.array(marks))


def test_workers_are_limited_by_shared_memory():
    assert [fit_workers(4, 128 * 256 * 128 * 3, 1, mb * 2**20) for mb in (1000, 64, 20)] == [4, 1, 0]


def test_a_killed_worker_is_reported_with_its_signal(shared):
    loader = make_loader(TestImages(shared, size=SIZE), batch_size=2, workers=1)
    batches = iter(loader)
    next(batches)
    for worker in loader.processes:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL.*memory"):
        list(batches)
