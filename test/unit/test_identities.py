"""Trained identities are recognised by photos, whatever number or part another preparation gives a person."""

import os
import shutil

import pytest
from conftest import refusal

from aligned_reid.data import TestImages, TrainImages, open_data, read_partitions, write_partitions
from aligned_reid.data.identities import check_identities, describe_overlap, identities_of, identity_record


@pytest.fixture
def data(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


def renumber(data):
    """Add 3 to every person's number, as a preparation with more persons does."""
    new_name = {name: f"{int(name[:8]) + 3:08d}{name[8:]}" for name in os.listdir(data / "images")}
    for old in sorted(new_name, reverse=True):
        (data / "images" / old).rename(data / "images" / new_name[old])
    partitions = read_partitions(data / "partitions.pkl")
    fields = vars(partitions)
    for key, value in fields.items():
        if key.endswith("names"):
            value[:] = map(new_name.get, value)
        elif key.endswith("labels"):
            fields[key] = {person + 3: label for person, label in value.items()}
    write_partitions(data / "partitions.pkl", partitions)


def swap_labels(data):
    """Exchange the labels 0 and 5."""
    partitions = read_partitions(data / "partitions.pkl")
    labels = partitions.trainval_ids2labels
    persons = {label: person for person, label in labels.items()}
    labels[persons[0]], labels[persons[5]] = 5, 0
    write_partitions(data / "partitions.pkl", partitions)


def test_identities_follow_the_labels_and_not_the_numbers(data):
    before = identities_of(TrainImages(open_data(data)))
    assert len(set(before)) == len(before) == 12
    renumber(data)
    assert identities_of(TrainImages(open_data(data))) == before
    swap_labels(data)
    after = identities_of(TrainImages(open_data(data)))
    assert (after[0], after[5], after[1:5]) == (before[5], before[0], before[1:5])


def test_resuming_with_other_persons_under_the_labels_is_refused(data):
    content = {"trained_on": identity_record(TrainImages(open_data(data)), None)}
    check_identities(content, data / "ckpt.pth", TrainImages(open_data(data)))
    fewer = {"trained_on": {"identities": content["trained_on"]["identities"][:-1]}}
    assert "1 of the 12 " in refusal(check_identities, fewer, data / "ckpt.pth", TrainImages(open_data(data)))
    swap_labels(data)
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
    renumber(data)
    partitions = read_partitions(data / "partitions.pkl")
    partitions.test_im_names[:0] = partitions.trainval_im_names[:6]  # one person of the training
    partitions.test_marks[:0] = [0] * 6
    write_partitions(data / "partitions.pkl", partitions)
    assert "on 1 of the" in describe_overlap(TestImages(open_data(data)), own)
