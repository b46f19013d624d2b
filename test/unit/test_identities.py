"""Trained identities are recognised by photos, whatever number or part another preparation gives a person."""

import os
import shutil

import pytest
from conftest import refusal

from aligned_reid.data import Partitions, TestImages, TrainImages, open_data, read_partitions, write_partitions
from aligned_reid.data.identities import check_identities, describe_overlap, identities_of, identity_record


@pytest.fixture
def data(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


def renumber(data, shift):
    """Add `shift` to every person's number, as a preparation with more persons does."""
    new_name = {name: f"{int(name[:8]) + shift:08d}{name[8:]}" for name in os.listdir(data / "images")}
    for old in sorted(new_name, reverse=True):
        (data / "images" / old).rename(data / "images" / new_name[old])
    path = data / "partitions.pkl"
    fields = vars(read_partitions(path))
    for key, value in fields.items():
        if key.endswith("names"):
            fields[key] = [new_name[name] for name in value]
        elif key.endswith("labels"):
            fields[key] = {person + shift: label for person, label in value.items()}
    write_partitions(path, Partitions(**fields))


def swap_labels(data, first, second):
    """Exchange the labels of two persons."""
    path = data / "partitions.pkl"
    fields = vars(read_partitions(path))
    persons = {label: person for person, label in fields["trainval_ids2labels"].items()}
    fields["trainval_ids2labels"] |= {persons[first]: second, persons[second]: first}
    write_partitions(path, Partitions(**fields))


def test_identities_follow_the_labels_and_not_the_numbers(data):
    before = identities_of(TrainImages(open_data(data)))
    assert len(set(before)) == len(before) == 12
    renumber(data, 3)
    assert identities_of(TrainImages(open_data(data))) == before
    swap_labels(data, 0, 5)
    after = identities_of(TrainImages(open_data(data)))
    assert (after[0], after[5], after[1:5]) == (before[5], before[0], before[1:5])


def test_resuming_with_other_persons_under_the_labels_is_refused(data):
    content = {"trained_on": identity_record(TrainImages(open_data(data)), None)}
    check_identities(content, data / "ckpt.pth", TrainImages(open_data(data)))
    swap_labels(data, 0, 5)
    message = refusal(check_identities, content, data / "ckpt.pth", TrainImages(open_data(data)))
    assert "2 of the 12 " in message and "ckpt.pth" in message and "--model_weight_file" in message
    part = TrainImages(open_data(data), "train")
    refusal(check_identities, content, data / "ckpt.pth", part)
    check_identities({}, data / "ckpt.pth", part)  # a checkpoint of an older version


def test_test_persons_who_were_trained_on_are_counted(data, tiny_data):
    own = {"trained_on": identity_record(TrainImages(open_data(tiny_data)), None)}
    record = identity_record(TrainImages(open_data(data), "train"), own)  # includes the persons of the start weights
    assert {*record["identities"], *record["before"]} == set(own["trained_on"]["identities"])
    assert not set(record["identities"]) & set(record["before"])
    test = TestImages(open_data(data))
    assert describe_overlap(test, None) == describe_overlap(test, {"config": {}}) == ""
    assert "on 0 of the 4 persons" in describe_overlap(test, own)
    renumber(data, 3)
    path = data / "partitions.pkl"
    fields = vars(read_partitions(path))
    tested = fields["trainval_im_names"][:6] + fields["test_im_names"]  # one person of the training in the test
    write_partitions(path, Partitions(**{**fields, "test_im_names": tested, "test_marks": [0] * len(tested)}))
    assert "on 1 of the" in describe_overlap(TestImages(open_data(data)), own)
