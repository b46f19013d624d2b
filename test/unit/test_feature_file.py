"""Feature files: anybody's formats, what is wrong with them, and a file that survives its writer."""

import json
import shutil

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from aligned_reid import InputError
from aligned_reid.evaluation import feature_file
from aligned_reid.evaluation.feature_file import FeatureWriter, check_partner, read_features

NUM = 7
MADE_BY = {"weights": "abc", "resize_h_w": [64, 32]}


def make_fields(seed=0, local=True):
    rng = np.random.default_rng(seed)
    fields = {"global": rng.standard_normal((NUM, 5)).astype(np.float32)}
    if local:
        fields["local"] = rng.standard_normal((NUM, 2, 3)).astype(np.float32)
    fields |= {"person_id": np.arange(NUM) % 3, "camera": np.arange(NUM) % 2, "mark": np.arange(NUM) % 2}
    return fields | {"image_name": np.array([f"image_{row}.jpg" for row in range(NUM)])}


def write(path, fields):
    if path.suffix == ".npz":
        np.savez(path, **fields)
    elif path.suffix == ".mat":
        savemat(path, fields)
    else:
        with h5py.File(path, "w") as file:
            for name, values in fields.items():
                file[name] = values.astype("S") if values.dtype.kind == "U" else values
            file.attrs["made_by"] = json.dumps(MADE_BY)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat"])
def test_every_format_holds_the_same(tmp_path, suffix):
    fields = make_fields()
    table = read_features(write(tmp_path / f"features{suffix}", fields))
    np.testing.assert_array_equal(table.global_feat, fields["global"])
    np.testing.assert_array_equal(table.local_feat, fields["local"])
    for name in ("person_id", "camera", "mark"):
        values = getattr(table, f"{name}s")
        np.testing.assert_array_equal(values, fields[name])
        assert values.dtype == np.int64
    assert [name.strip() for name in table.image_names] == list(fields["image_name"])
    assert isinstance(table.global_feat, np.memmap) == (suffix == ".h5")
    assert table.made_by == (MADE_BY if suffix == ".h5" else {})


def test_matlabs_newer_format_has_its_axes_turned(tmp_path):
    fields = make_fields()
    with h5py.File(tmp_path / "features.mat", "w") as file:
        for name in ("global", "local", "person_id", "camera", "mark"):
            file[name] = np.atleast_2d(fields[name]).T
    table = read_features(tmp_path / "features.mat")
    np.testing.assert_array_equal(table.global_feat, fields["global"])
    np.testing.assert_array_equal(table.local_feat, fields["local"])
    np.testing.assert_array_equal(table.person_ids, fields["person_id"])


def test_a_gallery_of_distractors_needs_no_marks(tmp_path):
    fields = make_fields(local=False)
    del fields["mark"], fields["image_name"]
    path = write(tmp_path / "more.npz", fields)
    table = read_features(path, default_mark=1)
    assert table.marks.tolist() == [1] * NUM
    assert (table.local_feat, table.image_names) == (None, None)
    with pytest.raises(InputError, match="has no field mark"):
        read_features(path)


def changed(**changes):
    return {name: value for name, value in {**make_fields(), **changes}.items() if value is not None}


def with_bad(name, rows, value):
    feat = make_fields()[name]
    feat[rows] = value
    return {name: feat}


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"person_id": None}, "has no field person_id; it has camera, global, image_name, local, mark"),
        ({"camera": np.arange(3)}, r"camera has to be \[7\], as global is, and is \[3\]"),
        ({"person_id": np.arange(9)}, r"person_id has to be \[7\]"),
        ({"camera": np.full(NUM, 0.5)}, "camera has to hold whole numbers"),
        ({"global": np.zeros((NUM, 2, 2), np.float32)}, r"global has to be \[N, D\]"),
        ({"local": np.zeros((4, 2, 3), np.float32)}, r"local has to be \[7, H, d\]"),
        (with_bad("global", [2], np.nan), "global features of image_2.jpg hold NaN or infinity"),
        (with_bad("local", [3, 5], np.inf), "local features of image_3.jpg and 1 more hold NaN or infinity"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, suffix, changes, reason):
    with pytest.raises(InputError, match=reason) as error:
        read_features(write(tmp_path / f"features{suffix}", changed(**changes)))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_file_that_is_cut_off(tmp_path, suffix, share):
    path = write(tmp_path / f"features{suffix}", make_fields())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="cut off"):
        read_features(path)


def test_no_file_and_no_format(tmp_path):
    with pytest.raises(InputError, match="no feature file at"):
        read_features(tmp_path / "none.h5")
    with pytest.raises(InputError, match=r"features are read from \.h5, \.hdf5, \.npz, \.mat files"):
        read_features(tmp_path / "features.txt")


def test_partners_have_one_width_and_one_model(tmp_path):
    first = read_features(write(tmp_path / "first.h5", make_fields()))
    check_partner(first, read_features(write(tmp_path / "same.h5", make_fields(seed=1))))
    check_partner(first, read_features(write(tmp_path / "unknown.npz", make_fields(seed=1))))
    for changes, reason in (
        ({"global": np.zeros((NUM, 6))}, "different widths: 5 and 6"),
        ({"local": np.zeros((NUM, 2, 4))}, r"different shapes: \[\[2, 3\], \[2, 4\]\]"),
    ):
        with pytest.raises(InputError, match=reason):
            check_partner(first, read_features(write(tmp_path / "other.npz", changed(**changes))))
    other = shutil.copy(tmp_path / "same.h5", tmp_path / "other.h5")
    with h5py.File(other, "r+") as file:
        file.attrs["made_by"] = json.dumps(MADE_BY | {"weights": "def"})
    with pytest.raises(InputError, match=r"made in different ways \(weights: abc and def\): extract both alike"):
        check_partner(first, read_features(other))


SHAPES = {"global": (5,), "local": (2, 3)}


def make_writer(path, made_by=None, names=None):
    fields = make_fields()
    labels = {name: fields[name] for name in ("person_id", "camera", "mark")}
    return FeatureWriter(
        path, list(fields["image_name"] if names is None else names), labels, made_by or MADE_BY, SHAPES
    )


def blocks(fields, first, last):
    return {name: fields[name][first:last] for name in SHAPES}


def test_a_writer_that_was_stopped_goes_on(tmp_path):
    fields, path = make_fields(), tmp_path / "features.h5"
    path.write_text("the former one")
    make_writer(path).write(0, blocks(fields, 0, 3))
    assert path.read_text() == "the former one"
    with pytest.raises(InputError, match="interrupted after 3 images: run it again"):
        read_features(shutil.copy(tmp_path / "features.h5.part", tmp_path / "copy.h5"))
    again = make_writer(path)
    assert again.num_done == 3
    again.write(3, blocks(fields, 3, NUM))
    again.finish()
    table = read_features(path)
    np.testing.assert_array_equal(table.global_feat, fields["global"])
    np.testing.assert_array_equal(table.local_feat, fields["local"])
    assert isinstance(table.local_feat, np.memmap)
    assert table.image_names == list(fields["image_name"])
    assert not (tmp_path / "features.h5.part").exists()


@pytest.mark.parametrize(
    "change", [{"made_by": {"weights": "def"}}, {"names": [f"other_{row}.jpg" for row in range(NUM)]}]
)
def test_what_another_model_or_data_set_left_is_not_gone_on_with(tmp_path, change):
    make_writer(tmp_path / "features.h5").write(0, blocks(make_fields(), 0, 3))
    assert make_writer(tmp_path / "features.h5", **change).num_done == 0


def test_a_part_that_is_cut_off_is_begun_again(tmp_path):
    make_writer(tmp_path / "features.h5").write(0, blocks(make_fields(), 0, 3))
    part = tmp_path / "features.h5.part"
    part.write_bytes(part.read_bytes()[:700])
    assert make_writer(tmp_path / "features.h5").num_done == 0


def test_no_room_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "features.h5").write_text("the former one")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_file.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(InputError, match=r"0\.00 GB are needed and 0\.00 free; make room"):
        make_writer(tmp_path / "features.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["features.h5"]
    assert (tmp_path / "features.h5").read_text() == "the former one"
