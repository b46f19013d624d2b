"""Feature files: every format, errors in them, and resuming an interrupted extraction."""

import json
import re
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import scipy.sparse
from conftest import refusal
from scipy.io import savemat

from aligned_reid.evaluation.features import FeatureWriter, check_partner, read_features

NUM = 7
MADE_BY = {"weights": "abc", "resize_h_w": [64, 32]}


def make_fields(seed=0, local=True):
    rng = np.random.default_rng(seed)
    fields = {"global": rng.standard_normal((NUM, 5)).astype(np.float32)}
    if local:
        fields["local"] = rng.standard_normal((NUM, 2, 3)).astype(np.float32)
    fields |= {"person_id": np.arange(NUM) % 3, "camera": np.arange(NUM) % 2, "mark": np.arange(NUM) % 2}
    return fields | {"image_name": np.array([f"image_{row}.jpg" for row in range(NUM)])}


def changed(**changes):
    """The fields with other values; None leaves a field out."""
    return {name: value for name, value in {**make_fields(), **changes}.items() if value is not None}


def write(path, fields):
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with open(path, "wb") as file:
            np.savez(file, **fields)
    elif suffix == ".mat":
        savemat(path, fields)
    else:
        with h5py.File(path, "w") as file:
            for name, values in fields.items():
                file[name] = values.astype("S") if values.dtype.kind == "U" else values
            file.attrs["made_by"] = json.dumps(MADE_BY)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat", ".H5", ".NPZ", ".MAT"])
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
    assert isinstance(table.global_feat, np.memmap) == (suffix.lower() == ".h5")
    assert table.made_by == (MADE_BY if suffix.lower() == ".h5" else {})


def make_pytorch_result(parts=("query", "gallery", "mquery")):
    fields = make_fields(local=False)
    result = {}
    for mark, part in enumerate(("query", "gallery", "mquery")):
        if part in parts:
            rows = slice(2 * mark, 2 * mark + 2 + mark % 2)  # 2, 3, 2
            for ending, name in (("f", "global"), ("label", "person_id"), ("cam", "camera")):
                result[f"{part}_{ending}"] = fields[name][rows]
    return result


@pytest.mark.parametrize("suffix", [".mat", ".npz", ".h5"])
def test_pytorch_result_has_queries_and_gallery_in_separate_arrays(tmp_path, suffix):
    fields = make_pytorch_result()
    table = read_features(write(tmp_path / f"pytorch_result{suffix}", fields))
    assert table.marks.tolist() == [0, 0, 1, 1, 1, 2, 2]
    for ending, values in (("f", table.global_feat), ("label", table.person_ids), ("cam", table.cameras)):
        expected = np.concatenate([fields[f"{part}_{ending}"] for part in ("query", "gallery", "mquery")])
        np.testing.assert_array_equal(values, expected)
    gallery = read_features(write(tmp_path / f"more{suffix}", make_pytorch_result(["gallery"])), default_mark=1)
    assert gallery.marks.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gallery_cam": None}, "gallery_cam.* no field camera"),
        ({"gallery_label": np.arange(2)}, "camera"),
        ({"gallery_f": np.zeros((3, 4))}, "query_f.*gallery_f.* widths: 5 and 4"),
    ],
)
def test_parts_of_pytorch_result_that_do_not_fit(tmp_path, changes, reason):
    fields = {name: value for name, value in {**make_pytorch_result(), **changes}.items() if value is not None}
    assert re.search(reason, refusal(read_features, write(tmp_path / "pytorch_result.mat", fields)))


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat"])
def test_marks_may_be_booleans_and_names_objects(tmp_path, suffix):
    marks, names = np.arange(NUM) % 2 == 1, make_fields()["image_name"].tolist()
    table = read_features(write(tmp_path / f"features{suffix}", changed(mark=marks)))
    assert table.marks.tolist() == [0, 1] * 3 + [0]
    if suffix != ".npz":
        path = write(tmp_path / f"features{suffix}", changed(image_name=np.array(names, dtype=object)))
        assert read_features(path).image_names == names


class Anything:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was run')",)


def test_pickled_names_are_ignored_and_not_run(tmp_path):
    path = write(tmp_path / "features.npz", changed(image_name=np.array([Anything()] * NUM, dtype=object)))
    assert read_features(path).image_names is None


@pytest.mark.parametrize("dtype", [">f8", "f2", "u1", "i8"])
def test_features_of_any_type_of_number_are_read(tmp_path, dtype):
    feat = np.arange(NUM * 5).reshape(NUM, 5)
    for suffix in (".h5", ".npz"):
        table = read_features(write(tmp_path / f"features{suffix}", changed(**{"global": feat.astype(dtype)})))
        np.testing.assert_array_equal(table.global_feat, feat)
        assert table.global_feat.dtype.kind == "f"


def test_a_gallery_of_distractors_needs_no_marks_and_local_features_only_if_wanted(tmp_path):
    path = write(tmp_path / "features.npz", changed(**with_bad("local", [3], np.nan)))
    assert read_features(path, local=False).local_feat is None
    path = write(tmp_path / "more.npz", changed(local=None, mark=None, image_name=None))
    table = read_features(path, default_mark=1)
    assert table.marks.tolist() == [1] * NUM
    assert (table.local_feat, table.image_names) == (None, None)
    assert "has no field mark" in refusal(read_features, path)


def with_bad(name, rows, value):
    feat = make_fields()[name]
    feat[rows] = value
    return {name: feat}


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"person_id": None}, "no field person_id.* it has camera, global, image_name, local, mark"),
        ({"camera": np.arange(3)}, "camera"),
        ({"camera": np.full(NUM, 0.5)}, "camera"),
        ({"camera": np.full(NUM, np.inf)}, "camera"),
        ({"person_id": np.array(["0002"] * NUM)}, "person_id"),
        ({"global": np.zeros((NUM, 2, 2), np.float32)}, r"global.* \[7, D\]"),
        ({"local": np.zeros((4, 2, 3), np.float32)}, r"local.* \[7, H, d\]"),
        ({"global": np.array([["a", "b"]] * NUM, dtype="S")}, "global"),
        ({"global": np.full((NUM, 5), 1j)}, "global|complex"),
        (with_bad("global", [2], np.nan), "global features of image_2.jpg hold NaN or infinity"),
        (with_bad("local", [3, 5], np.inf), "local features of image_3.jpg hold NaN or infinity"),
    ],
)
def test_wrong_fields_are_refused(tmp_path, suffix, changes, reason):
    message = refusal(read_features, write(tmp_path / f"features{suffix}", changed(**changes)))
    assert re.search(reason, message) and str(tmp_path) in message


@pytest.mark.parametrize("value", [scipy.sparse.eye(NUM).tocsc(), np.array(["a"] * NUM, dtype=object), {"a": 1}])
@pytest.mark.parametrize("name", ["global", "local", "person_id"])
def test_sparse_arrays_cells_and_structs_are_refused(tmp_path, name, value):
    assert name in refusal(read_features, write(tmp_path / "features.mat", changed(**{name: value})))


@pytest.mark.parametrize("name", ["global", "local", "person_id", "image_name"])
def test_groups_are_refused_except_for_names(tmp_path, name):
    path = write(tmp_path / "features.h5", changed(**{name: None}))
    with h5py.File(path, "r+") as file:
        file.create_group(name)
    if name == "image_name":
        assert read_features(path).image_names is None
    else:
        assert name in refusal(read_features, path)


@pytest.mark.parametrize(
    ("name", "sound", "damaged", "reason"),
    [
        ("features.h5", b"TREE", b"TR\0\0", "damaged"),
        ("features.h5", b"person_id\0", b"pe\xf2son_id\0", r"no field person_id.* pe\\xf2son_id"),
        # These crash scipy's reader: the type of numbers, and the length of flags.
        ("features.mat", b"local\0\0\0\7", b"local\0\0\0\x87", "damaged"),
        ("features.mat", b"\6\0\0\0\x08\0\0\0\7\0", b"\6\0\0\0\x08\2\0\0\7\0", "damaged"),
    ],
)
def test_a_damaged_structure_is_refused(tmp_path, name, sound, damaged, reason):
    path = write(tmp_path / name, make_fields())
    content = path.read_bytes()
    assert sound in content
    path.write_bytes(content.replace(sound, damaged))
    assert re.search(reason, refusal(read_features, path))


def test_more_features_declared_than_fit_into_memory_or_are_there_are_refused(tmp_path):
    """A file of a few kB may declare any number of features."""
    for options in ({}, {"chunks": (1, 1024)}):
        path = write(tmp_path / "features.h5", changed(**{"global": None}))
        with h5py.File(path, "r+") as file:
            file.create_dataset("global", (NUM, 2**40), np.float32, **options)
        assert "GB of memory" in refusal(read_features, path)
    path = write(tmp_path / "features.npz", changed(**{"global": None}))
    with zipfile.ZipFile(path, "a") as archive, archive.open("global.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (NUM, 2**40)})
        file.write(b"some")
    assert "damaged" in refusal(read_features, path)


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".mat"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_file_that_is_cut_off(tmp_path, suffix, share):
    path = write(tmp_path / f"features{suffix}", make_fields())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cut off" in refusal(read_features, path)


def test_no_file_and_other_formats_are_refused(tmp_path):
    assert "no feature file at" in refusal(read_features, tmp_path / "none.h5")
    assert ".h5, .hdf5, .npz, .mat" in refusal(read_features, tmp_path / "features.txt")
    with h5py.File(tmp_path / "features.mat", "w") as file:
        file["global"] = np.zeros((5, NUM))
    assert "7.3" in refusal(read_features, tmp_path / "features.mat")


def test_partners_have_one_width_and_one_model(tmp_path):
    first = read_features(write(tmp_path / "first.h5", make_fields()))
    check_partner(first, read_features(write(tmp_path / "same.h5", make_fields(seed=1))))
    check_partner(first, read_features(write(tmp_path / "unknown.npz", make_fields(seed=1))))
    for changes, reason in (
        ({"global": np.zeros((NUM, 6))}, "different widths: 5 and 6"),
        ({"local": np.zeros((NUM, 2, 4))}, "different shapes: [[2, 3], [2, 4]]"),
    ):
        other = read_features(write(tmp_path / "other.npz", changed(**changes)))
        assert reason in refusal(check_partner, first, other)
    with h5py.File(tmp_path / "same.h5", "r+") as file:
        file.attrs["made_by"] = json.dumps(MADE_BY | {"weights": "def"})
    assert "(weights: abc and def)" in refusal(check_partner, first, read_features(tmp_path / "same.h5"))


SHAPES = {"global": (5,), "local": (2, 3)}


def make_writer(path, made_by=MADE_BY, names=None):
    fields = make_fields()
    labels = {name: fields[name] for name in ("person_id", "camera", "mark")}
    return FeatureWriter(path, list(names or fields["image_name"]), labels, made_by, SHAPES)


def blocks(fields, first, last):
    return {name: fields[name][first:last] for name in SHAPES}


def test_an_interrupted_writer_resumes(tmp_path):
    fields, path = make_fields(), tmp_path / "features.h5"
    path.write_text("the former one")
    make_writer(path).write(0, blocks(fields, 0, 3))
    assert path.read_text() == "the former one"
    part = shutil.copy(tmp_path / "features.h5.part", tmp_path / "copy.h5")
    assert "interrupted after 3 images" in refusal(read_features, part)
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


def test_a_part_of_another_model_or_data_set_and_a_cut_one_are_replaced(tmp_path):
    part = tmp_path / "features.h5.part"
    for change in ({"made_by": {"weights": "def"}}, {"names": [f"other_{row}.jpg" for row in range(NUM)]}, {}):
        make_writer(tmp_path / "features.h5").write(0, blocks(make_fields(), 0, 3))
        if not change:
            part.write_bytes(part.read_bytes()[:700])
        assert make_writer(tmp_path / "features.h5", **change).num_done == 0
        part.unlink()
