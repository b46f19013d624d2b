"""Several data sets in one run: their training images together, their folders, their names, their scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aligned_reid import InputError
from aligned_reid.config import Config
from aligned_reid.data import IdentityBatchSampler, SampleRequest, make_loader, make_synthetic, open_data
from aligned_reid.data.dataset import JoinedTrainImages, TrainImages
from aligned_reid.evaluation import protocol
from aligned_reid.evaluation.evaluate import evaluate_sets
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.protocol import Measures
from aligned_reid.preflight import data_folders, open_images

SIZE = (64, 32)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Another drawn set: the persons' numbers are those of the first one, the persons are not."""
    return make_synthetic(tmp_path_factory.mktemp("data") / "other", 8, 3, 2, seed=2)


@pytest.fixture
def parts(tiny_data, other_data):
    return {name: TrainImages(open_data(path), size=SIZE) for name, path in (("a", tiny_data), ("b", other_data))}


def test_identities_and_cameras_are_kept_apart(parts):
    joined, a, b = JoinedTrainImages(parts), parts["a"], parts["b"]
    assert set(a.person_ids) & set(b.person_ids) and set(a.cameras) & set(b.cameras)
    assert len(joined) == len(a) + len(b)
    assert joined.num_classes == a.num_classes + b.num_classes == 12 + 6
    for name in ("person_ids", "cameras", "labels"):
        both, first, second = (getattr(images, name) for images in (joined, a, b))
        np.testing.assert_array_equal(both[: len(a)], first)
        (raised,) = set(both[len(a) :] - second)
        assert raised == first.max() + 1
    assert sorted(set(joined.labels)) == list(range(18))
    assert joined.image_names[0] == f"a/{a.image_names[0]}"
    assert joined.image_names[len(a)] == f"b/{b.image_names[0]}"


def test_images_are_those_of_their_set(parts):
    joined, a, b = JoinedTrainImages(parts), parts["a"], parts["b"]
    for index, part, inside in (
        (0, a, 0),
        (len(a) - 1, a, len(a) - 1),
        (len(a), b, 0),
        (len(joined) - 1, b, len(b) - 1),
    ):
        image, label, returned = joined[SampleRequest(index, 5)]
        np.testing.assert_array_equal(image, part[SampleRequest(inside, 5)][0])
        np.testing.assert_array_equal(joined.decode(index), part.decode(inside))
        assert (label, returned) == (joined.labels[index], index)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_persons_of_both(parts, workers):
    joined = JoinedTrainImages(parts)
    sampler = IdentityBatchSampler(joined.person_ids, 6, 2, final_batch=False, seed=1)
    batches = list(make_loader(joined, sampler, workers=workers))
    assert len(batches) == 3
    labels = torch.cat([batch.labels for batch in batches])
    assert sorted(set(labels.tolist())) == list(range(18))
    for batch in batches:
        np.testing.assert_array_equal(batch.labels, joined.labels[batch.indices])
        np.testing.assert_array_equal(
            batch.labels.reshape(6, 2)[:, 0], batch.labels.reshape(6, 2)[:, 1]
        )  # two images a person


def test_a_damaged_image_is_named(other_data, parts, monkeypatch):
    joined = JoinedTrainImages(parts)
    monkeypatch.setattr(parts["b"], "images_dir", "/none")
    with pytest.raises(InputError, match=f"/none/{parts['b'].image_names[0]} is missing"):
        list(make_loader(joined, [[SampleRequest(len(parts["a"]), 0)]]))


def test_a_folder_for_each_name(tmp_path):
    def folders(dataset, data_path):
        return data_folders(Config(dataset=dataset, data_path=data_path).checked())

    assert folders("a+b", "x+y") == {"a": "x", "b": "y"}
    assert folders("c+a+b", "x+y+x") == {"c": "x", "a": "y", "b": "x"}
    assert folders("a", "x") == {"a": "x"}
    (tmp_path / "c++").mkdir()
    assert folders("a", f"{tmp_path}/c++") == {"a": f"{tmp_path}/c++"}
    for dataset, data_path, reason in (
        ("a+b", "x", "--data_path has 1 folder and --dataset 2 names"),
        ("a+b", "x+", "--data_path has 1 folder and --dataset 2 names"),
        ("a+b", "x+y+z", "--data_path has 3 folders and --dataset 2 names"),
        ("a", f"{tmp_path}+{tmp_path}", "--data_path has 2 folders and --dataset 1 name: give one each"),
        ("a+a", "x+y", "--dataset a+a names a data set twice"),
        ("a+", "x+y", "has an empty name"),
    ):
        with pytest.raises(InputError) as caught:
            folders(dataset, data_path)
        assert reason in str(caught.value)
    with pytest.raises(InputError, match="--partition_file is for one data set"):
        Config(dataset="a+b", partition_file="x.pkl").checked()


def test_a_run_opens_them_in_order(tiny_data, other_data):
    config = Config(dataset="b+a", data_path=f"{other_data}+{tiny_data}", resize_h_w=SIZE)
    given = open_images(config)
    assert list(given.tests) == ["b", "a"]
    assert given.test is given.tests["b"]
    assert {name: len(set(images.person_ids)) for name, images in given.tests.items()} == {"b": 2 + 1, "a": 4 + 1}
    assert isinstance(given.train, JoinedTrainImages) and given.train.num_classes == 18
    assert open_images(replace(config, only_test=True)).train is None
    alone = open_images(replace(config, dataset="a", data_path=str(tiny_data)))
    assert type(alone.train) is TrainImages and list(alone.tests) == ["a"]


def test_each_set_is_measured_by_itself(tiny_data, other_data):
    tests = open_images(
        Config(dataset="a+b", data_path=f"{tiny_data}+{other_data}", only_test=True, resize_h_w=SIZE)
    ).tests
    generator = torch.Generator().manual_seed(1)
    features = {name: FeatureSet(torch.randn(len(test), 8, generator=generator), None) for name, test in tests.items()}
    measures = Measures(re_ranked=False)
    lines: list[str] = []
    scores = evaluate_sets(features, tests, lines.append, measures)
    alone = {name: protocol.evaluate_features(features[name], tests[name], lambda _: None, measures) for name in tests}
    assert list(scores) == ["a", "b"]
    assert scores["a"]["global"] != scores["b"]["global"]
    for name in tests:
        assert scores[name]["global"] == alone[name]["global"]
        assert scores[name]["local"] is None
    assert [line for line in lines if not line.startswith("[")] == [
        "Data set b",
        "Global distance",
        "Data set a",
        "Global distance",
    ]
    assert f"[cmc1: {scores['a']['global']['cmc1']:5.2%}]" in lines[-1]  # the first set's comes last
