"""Images that turn bad during a run: each named once, and only so many borne."""

import pytest
import torch
from test_dataset import SIZE, spoil, write_data

from aligned_reid import InputError
from aligned_reid.data import TrainImages, open_data
from aligned_reid.distributed import World
from aligned_reid.training.bad_images import BadImages


@pytest.fixture
def images(tmp_path):
    return TrainImages(open_data(write_data(tmp_path / "data")), size=SIZE)


def last_checkpoint():
    return "the last good checkpoint is here"


def test_each_is_named_once_and_the_one_beyond_the_limit_ends_the_run(images):
    lines = []
    bad_images = BadImages(images, 2, World(), lines.append)
    bad_images.note(torch.empty(0, 2, dtype=torch.int64), last_checkpoint)
    for index in (5, 9, 13):
        spoil(images, index)
    for replaced in ([[5, 4], [5, 6]], [[9, 8]], [[5, 7], [9, 10]]):
        bad_images.note(torch.tensor(replaced), last_checkpoint)
    assert lines == [
        f"bad image 1 of at most 2: image {images.images_dir}/{images.image_names[5]} is empty; "
        f"{images.image_names[4]} in its place",
        f"bad image 2 of at most 2: image {images.images_dir}/{images.image_names[9]} is empty; "
        f"{images.image_names[8]} in its place",
    ]
    with pytest.raises(InputError) as error:
        bad_images.note(torch.tensor([[9, 8], [13, 12]]), last_checkpoint)
    assert str(error.value) == (
        f"image {images.images_dir}/{images.image_names[13]} is empty; 3 different training images turned bad "
        "since they were checked, and --max_bad_images is 2: prepare the data again; the last good checkpoint is here"
    )


def test_one_that_is_whole_again_is_named_too(images):
    lines = []
    BadImages(images, 1, World(), lines.append).note(torch.tensor([[3, 2]]), last_checkpoint)
    assert f"{images.image_names[3]} could not be read for a time" in lines[0]


def test_other_processes_say_it_on_their_own_standard_error(images, capsys):
    spoil(images, 5)
    BadImages(images, 1, World(2, 4), pytest.fail).note(torch.tensor([[5, 4]]), last_checkpoint)
    assert capsys.readouterr().err.startswith("process 2: bad image 1 of at most 1: image ")
