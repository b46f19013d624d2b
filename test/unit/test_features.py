"""Feature files: every format, errors in them, and resuming an interrupted extraction."""

import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.sparse
from conftest import refusal
from scipy.io import savemat

from aligned_reid.evaluation.features import FeatureWriter, check_partner, read_features

NUM = 7
MADE_BY = {"weights": "abc", "resize_h_w": [64, 32]}


def make_fields(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "global": rng.standard_normal((NUM, 5)).astype(np.float32),
        "local": rng.standard_normal((NUM, 2, 3)).astype(np.float32),
        "person_id": np.arange(NUM) % 3,
        "camera": np.arange(NUM) % 2,
        "mark": np.arange(NUM) % 2,
        "image_name": np.array([f"image_{row}.jpg" for row in range(NUM)]),
    }


def changed(**changes):
    """The fields with other values; None leaves a field out."""
    return {name: value for name, value in {**make_fields(), **changes}.items() if value is not None}


def write(path, fields):
    suffix = path.suffix.lower()
    if suffix == ".npz":
        np.savez(path.open("wb"), **fields)
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
    read = (table.global_feat, table.local_feat, table.person_ids, table.cameras, table.marks)
    for values, expected in zip(read, list(fields.values())[:5], strict=True):
        np.testing.assert_array_equal(values, expected)
        assert values.dtype == expected.dtype
    assert [name.strip() for name in table.image_names] == list(fields["image_name"])
    assert isinstance(table.global_feat, np.memmap) == (suffix.lower() == ".h5")
    assert table.made_by == (MADE_BY if suffix.lower() == ".h5" else {})


def make_pytorch_result():
    """The fields of make_fields, divided into 2 queries, 3 of the gallery and 2 of multi-query."""
    fields = make_fields()
    parts = {"query": slice(0, 2), "gallery": slice(2, 5), "mquery": slice(5, 7)}
    names = {"f": "global", "label": "person_id", "cam": "camera"}
    return {f"{part}_{ending}": fields[name][rows] for part, rows in parts.items() for ending, name in names.items()}


@pytest.mark.parametrize("suffix", [".mat", ".npz", ".h5"])
def test_pytorch_result_has_queries_and_gallery_in_separate_arrays(tmp_path, suffix):
    result, fields = make_pytorch_result(), make_fields()
    table = read_features(write(tmp_path / f"pytorch_result{suffix}", result))
    assert table.marks.tolist() == [0, 0, 1, 1, 1, 2, 2]
    np.testing.assert_array_equal(table.global_feat, fields["global"])
    np.testing.assert_array_equal(table.person_ids, fields["person_id"])
    np.testing.assert_array_equal(table.cameras, fields["camera"])
    gallery = {name: values for name, values in result.items() if name.startswith("gallery")}
    assert read_features(write(tmp_path / f"more{suffix}", gallery), default_mark=1).marks.tolist() == [1, 1, 1]


def test_parts_of_pytorch_result_that_do_not_fit(tmp_path):
    result = make_pytorch_result()
    without_cameras = {name: values for name, values in result.items() if name != "gallery_cam"}
    for fields, reason in (
        (without_cameras, "gallery_cam.* no field camera"),
        (result | {"gallery_label": np.arange(2)}, "camera"),
        (result | {"gallery_f": np.zeros((3, 4))}, "query_f.*gallery_f.* widths: 5 and 4"),
    ):
        assert re.search(reason, refusal(read_features, write(tmp_path / "pytorch_result.mat", fields)))


class RunsIfUnpickled:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was run')",)


def test_marks_may_be_booleans_and_names_objects_unless_they_are_pickled(tmp_path):
    marks, names = np.arange(NUM) % 2 == 1, make_fields()["image_name"].tolist()
    pickled = [RunsIfUnpickled()] * NUM
    for suffix, objects, expected in ((".h5", names, names), (".mat", names, names), (".npz", pickled, None)):
        fields = changed(mark=marks, image_name=np.array(objects, dtype=object))
        table = read_features(write(tmp_path / f"features{suffix}", fields))
        assert table.marks.tolist() == [0, 1] * 3 + [0]
        assert table.image_names == expected


@pytest.mark.parametrize("dtype", [">f8", "f2", "u1", "i8"])
def test_features_of_any_type_of_number_are_read(tmp_path, dtype):
    feat = np.arange(NUM * 5).reshape(NUM, 5)
    for suffix in (".h5", ".npz"):
        table = read_features(write(tmp_path / f"features{suffix}", changed(**{"global": feat.astype(dtype)})))
        np.testing.assert_array_equal(table.global_feat, feat)
        assert table.global_feat.dtype.kind == "f"


def test_a_gallery_of_distractors_needs_no_marks_and_local_features_only_if_wanted(tmp_path):
    path = write(tmp_path / "features.npz", changed(local=with_bad("local", [3], np.nan)))
    assert read_features(path, local=False).local_feat is None
    path = write(tmp_path / "more.npz", changed(local=None, mark=None, image_name=None))
    table = read_features(path, default_mark=1)
    assert table.marks.tolist() == [1] * NUM
    assert (table.local_feat, table.image_names) == (None, None)
    assert "has no field mark" in refusal(read_features, path)


def with_bad(name, rows, value):
    feat = make_fields()[name]
    feat[rows] = value
    return feat


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
        ({"global": with_bad("global", [2], np.nan)}, "global features of image_2.jpg hold NaN or infinity"),
        ({"local": with_bad("local", [3, 5], np.inf)}, "local features of image_3.jpg hold NaN or infinity"),
    ],
)
def test_wrong_fields_are_refused(tmp_path, suffix, changes, reason):
    message = refusal(read_features, write(tmp_path / f"features{suffix}", changed(**changes)))
    assert re.search(reason, message) and str(tmp_path) in message


@pytest.mark.parametrize("name", ["global", "local", "person_id"])
def test_sparse_arrays_cells_structs_and_groups_are_refused(tmp_path, name):
    for value in (scipy.sparse.eye(NUM).tocsc(), np.array(["a"] * NUM, dtype=object), {"a": 1}):
        assert name in refusal(read_features, write(tmp_path / "features.mat", changed(**{name: value})))
    path = write(tmp_path / "features.h5", changed(**{name: None}))
    with h5py.File(path, "r+") as file:
        file.create_group(name)
    assert name in refusal(read_features, path)


def test_a_group_in_place_of_names_is_ignored(tmp_path):
    path = write(tmp_path / "features.h5", changed(image_name=None))
    with h5py.File(path, "r+") as file:
        file.create_group("image_name")
    assert read_features(path).image_names is None


@pytest.mark.parametrize(
    ("name", "sound", "damaged", "reason"),
    [
        ("features.h5", b"TREE", b"TR\0\0", "damaged"),
        ("features.h5", b"person_id\0", b"pe\xf2son_id\0", r"no field person_id.* pe\\xf2son_id"),
        # These crash scipy's reader: the type of numbers, the length of flags, and complex without imaginary parts.
        ("features.mat", b"local\0\0\0\7", b"local\0\0\0\x87", "damaged"),
        ("features.mat", b"\6\0\0\0\x08\0\0\0\7\0", b"\6\0\0\0\x08\2\0\0\7\0", "damaged"),
        ("features.mat", b"\6\0\0\0\x08\0\0\0\7\0", b"\6\0\0\0\x08\0\0\0\7\x08", "damaged"),
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


FIELDS = make_fields()
FEATS = {name: FIELDS[name] for name in ("global", "local")}
LABELS = {name: FIELDS[name] for name in ("person_id", "camera", "mark")}


def make_writer(path, made_by=MADE_BY, names=FIELDS["image_name"], labels=LABELS, feats=FEATS):
    return FeatureWriter(path, list(names), labels, made_by, {name: feat.shape[1:] for name, feat in feats.items()})


def test_an_interrupted_writer_resumes(tmp_path):
    path = tmp_path / "features.h5"
    path.write_text("the former one")
    make_writer(path).write(0, {name: feat[:3] for name, feat in FEATS.items()})
    assert path.read_text() == "the former one"
    part = shutil.copy(tmp_path / "features.h5.part", tmp_path / "copy.h5")
    assert "interrupted after 3 images" in refusal(read_features, part)
    again = make_writer(path)
    assert again.num_done == 3
    again.write(3, {name: feat[3:] for name, feat in FEATS.items()})
    again.finish()
    table = read_features(path)
    np.testing.assert_array_equal(table.global_feat, FEATS["global"])
    np.testing.assert_array_equal(table.local_feat, FEATS["local"])
    assert isinstance(table.local_feat, np.memmap)
    assert table.image_names == list(FIELDS["image_name"])
    assert not (tmp_path / "features.h5.part").exists()


def test_an_interrupted_writer_resumes_with_names_that_are_not_utf_8(tmp_path):
    names = [f"image_{row}\udcff.jpg" for row in range(NUM)]
    make_writer(tmp_path / "features.h5", names=names).write(0, {name: feat[:3] for name, feat in FEATS.items()})
    assert make_writer(tmp_path / "features.h5", names=names).num_done == 3


def test_a_part_of_another_model_or_data_set_and_a_cut_one_are_replaced(tmp_path):
    part = tmp_path / "features.h5.part"
    for change in (
        {"made_by": {"weights": "def"}},
        {"names": [f"other_{row}.jpg" for row in range(NUM)]},
        {"labels": LABELS | {"mark": 1 - LABELS["mark"]}},
        {"labels": {name: LABELS[name] for name in ("person_id", "camera")}},
        {"feats": {"global": FEATS["global"]}},  # its local features would stay without the images to come
        {},
    ):
        make_writer(tmp_path / "features.h5").write(0, FEATS)
        if not change:
            part.write_bytes(part.read_bytes()[:700])
        assert make_writer(tmp_path / "features.h5", **change).num_done == 0
        part.unlink()


def test_an_extraction_without_room_on_the_disk_ends_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="f.h5"):
        make_writer(tmp_path / "f.h5")
    monkeypatch.undo()
    assert make_writer(tmp_path / "f.h5").num_done == 0
