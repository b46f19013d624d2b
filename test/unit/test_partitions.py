"""partitions.pkl: image names, the split, round trips, and hostile or damaged files."""

import collections
import dataclasses
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, refusal

from aligned_reid.data.partitions import (
    Partitions,
    build_partitions,
    format_image_name,
    parse_image_name,
    read_partitions,
    split_train_val,
    write_partitions,
)
from aligned_reid.data.plain_pickle import MAX_BYTES, load_plain

NAME = "00000002_0001_00000000.jpg"


def small_partitions() -> Partitions:
    """Four identities under two cameras to train on, two to test with."""
    trainval = [format_image_name(person, camera, i) for person in (2, 7, 9, 11) for camera in (1, 2) for i in (0, 1)]
    query = ["00000020_0001_00000000.jpg", "00000021_0002_00000000.jpg"]
    gallery = ["00000000_0003_00000000.jpg", "00000020_0002_00000000.jpg"]
    return build_partitions(trainval, query, gallery, multi_query=["00000020_0001_00000001.jpg"], num_val_ids=2)


def unreadable(tmp_path: Path, content: bytes) -> str:
    """The message with which a file of this content is refused."""
    path = tmp_path / "partitions.pkl"
    path.write_bytes(content)
    message = refusal(read_partitions, path)
    assert str(path) in message
    return message


def test_image_name_parses_and_formats():
    name = parse_image_name(NAME)
    assert (name.person_id, name.camera, name.index) == name == (2, 1, 0)
    assert format_image_name(2, 1, 0) == NAME
    assert format_image_name(*parse_image_name("12345678_9012_34567890.jpg")) == "12345678_9012_34567890.jpg"


def test_invalid_image_names_and_numbers_are_refused():
    for name in (f"{NAME[:-4]}.png", f"{NAME}\n", f"../{NAME[3:]}", f"-{NAME[1:]}", f"٠{NAME[1:]}", ""):
        assert ascii(name) in refusal(parse_image_name, name)
    for numbers in ((-1, 1, 0), (10**8, 1, 0), (1, 10**4, 0), (1, 1, 10**8)):
        refusal(format_image_name, *numbers)


def test_split_is_the_reference_implementations():
    golden = json.loads((GOLDEN / "partition.json").read_text())
    before = np.random.get_state()[1].copy()
    train, query, gallery = split_train_val(golden["trainval_im_names"], golden["num_val_ids"], golden["seed"])
    assert [train, query, gallery] == [golden[f"{part}_im_names"] for part in ("train", "val_query", "val_gallery")]
    assert all(type(name) is str for name in train + query + gallery)
    assert np.array_equal(np.random.get_state()[1], before)  # the global generator is left alone


def test_split_keeps_identities_without_a_match_in_train():
    one_camera = [format_image_name(1, 1, index) for index in range(4)]
    two_cameras = [format_image_name(2, camera, 0) for camera in (1, 2)]
    train, query, gallery = split_train_val(one_camera + two_cameras, num_val_ids=2)
    assert sorted(train) == one_camera
    # One image per camera: the first query has no match in the gallery and becomes the match of the other one.
    assert (query, gallery) == ([two_cameras[1]], [two_cameras[0]])
    assert split_train_val([], 5) == ([], [], [])
    assert sorted(split_train_val(two_cameras, num_val_ids=0)[0]) == two_cameras


def test_build_partitions_orders_marks_and_labels():
    partitions = small_partitions()
    assert partitions.trainval_ids2labels == {2: 0, 7: 1, 9: 2, 11: 3}
    assert sorted(partitions.train_ids2labels.values()) == [0, 1]
    assert partitions.test_marks == [0, 0, 2, 1, 1]
    assert partitions.test_im_names[2] == "00000020_0001_00000001.jpg"
    val_ids = {parse_image_name(name).person_id for name in partitions.val_im_names}
    assert val_ids | partitions.train_ids2labels.keys() == {2, 7, 9, 11}
    assert not val_ids & partitions.train_ids2labels.keys()


def test_python2_partitions_are_those_built_here():
    partitions = read_partitions(GOLDEN / "partitions_python2.pkl")
    golden = json.loads((GOLDEN / "partition.json").read_text())
    built = build_partitions(golden["trainval_im_names"], [], [], num_val_ids=golden["num_val_ids"])
    for field in ("trainval_im_names", "trainval_ids2labels", "train_im_names", "val_im_names", "val_marks"):
        assert getattr(partitions, field) == getattr(built, field)
    assert all(type(number) is int for pair in partitions.trainval_ids2labels.items() for number in pair)


def test_written_partitions_read_back_and_have_protocol_2(tmp_path):
    partitions = small_partitions()
    path = tmp_path / "partitions.pkl"
    write_partitions(path, partitions)
    assert read_partitions(path) == partitions
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert [file.name for file in tmp_path.iterdir()] == ["partitions.pkl"]
    assert "cannot write" in refusal(write_partitions, path / "below", partitions)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_container_can_be_read(tmp_path, protocol):
    expected = small_partitions()
    value = collections.OrderedDict(dataclasses.asdict(expected))
    value["trainval_im_names"] = np.array(expected.trainval_im_names)
    value["train_im_names"] = np.array(expected.train_im_names, dtype="S")
    value["val_im_names"] = [np.str_(name) for name in expected.val_im_names]
    value["test_im_names"] = np.array(expected.test_im_names, dtype=object)
    value["val_marks"] = tuple(np.int8(mark) for mark in expected.val_marks)
    value["test_marks"] = np.array(expected.test_marks, dtype=">i4")
    value["train_ids2labels"] = {np.int64(key): np.uint16(label) for key, label in expected.train_ids2labels.items()}
    value["extra"] = [b"bytes", {1, 2}, frozenset("ab"), 1.5, None, True, np.float32(0.5), np.bytes_(b"x"), 2**70, ()]
    path = tmp_path / "partitions.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_partitions(path) == expected
    extra = [b"bytes", {1, 2}, frozenset("ab"), 1.5, None, True, 0.5, b"x", 2**70, []]
    assert load_plain(path)["extra"] == extra


def test_protocol_0_arrays_of_python2_can_hold_any_byte(tmp_path):
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
    array += b"cnumpy\ndtype\n(S'i2'\nI0\nI1\ntR"
    array += b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\xeb\\x02\\x00\\x80'\ntb."
    (tmp_path / "array.pkl").write_bytes(array)
    assert load_plain(tmp_path / "array.pkl") == [0x02EB, -0x8000]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_that_name_functions_or_classes_are_refused_and_not_run(tmp_path, protocol):
    call = Call(os.system, f"touch {tmp_path / 'was_run'}")
    for value, named in (
        (call, "posix.system"),
        ({"trainval_im_names": [call]}, "posix.system"),
        (np.array([call, 0], dtype=object), "posix.system"),
        (Call(eval, "0"), "eval"),
        (Call(np.ones, (1 << 40,)), "ones"),
        (Partitions, "Partitions"),
        (small_partitions(), ""),
    ):
        message = unreadable(tmp_path, pickle.dumps(value, protocol=protocol))
        assert "nothing in it was run" in message and named in message
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"cos\nsystem\n.", "os.system"),  # named, never called
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'true'\no.", "os.system"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro()\x93.", "numpy.dtype.mro"),
        (b"\x80\x04\x8c\x04o\ns\x1b\x8c\x06system\x93.", "o\\ns\\x1b.system"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", ""),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02V8\x85RU\x0800000000\x86R.", ""),
        (b"\x80\x02c_codecs\nencode\n}U\x05_makecos\nsystem\nsb.", "os.system"),
        # Opcodes that pickles of plain data do not contain: INST, NEWOBJ, OBJ, BUILD, EXT1, PERSID, NEXT_BUFFER, REDUCE
        (b"(inumpy\ndtype\n.", ""),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", ""),
        (b"\x80\x02(cnumpy\ndtype\no.", ""),
        (b"\x80\x02}}b.", ""),
        (b"\x80\x02c_codecs\nencode\n(N}U\x0c__defaults__NstNb.", ""),  # would change what it names
        (b"\x80\x02]N}U\x08__len__K\x01s\x86b.", ""),
        (b"\x80\x02\x82\x01.", ""),
        (b"Pid\n.", ""),
        (b"\x80\x05\x97.", ""),
        (b"\x80\x02U\x06systemU\x04true\x85R.", ""),
    ],
)
def test_hand_written_attacks_are_refused(tmp_path, content, named):
    message = unreadable(tmp_path, content)
    assert named in message
    assert not named or "nothing in it was run" in message


ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
TYPE = b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


@pytest.mark.parametrize(
    "content",
    [
        ARRAY + b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85U\x01b\x87R.",  # an array of 2^40 bytes that nothing fills
        ARRAY + b"K\x00\x85U\x01b\x87R(K\x01\x8a\x06\x00\x00\x00\x00\x00\x01\x85" + TYPE + b"\x89U\x0812345678tb.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n" + TYPE + b"N\x86R.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\nU\x02i8U\x0812345678\x86R.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # a memo of 2^31 entries
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 35) + b"x.",  # bytearrays, bytes and strings longer than the file
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x.",
        b"\x80\x02T\xff\xff\xff\x7fx.",
        b"\x80\x02}" + b")" + b"2\x86" * 200 + b"K\x01s.",  # a key whose hash would take 2^200 steps
        b"\x80\x04\x8f(" + b")" + b"2\x86" * 200 + b"\x90.",
        b"\x80\x04(" + b")" + b"2\x86" * 200 + b"\x91.",
        b"(" + b")" + b"2\x86" * 200 + b"K\x01d.",
        b"c__builtin__\nset\n(]" + b")" + b"2\x86" * 200 + b"atR.",
        b"\x80\x02]" + b"2\x85" * 100_000 + b".",  # deeper than any recursion
    ],
)
def test_files_that_would_take_forever_or_all_memory_are_refused(tmp_path, content):
    unreadable(tmp_path, content)


def test_files_cut_off_anywhere_noise_and_huge_files_are_refused(tmp_path):
    content = (GOLDEN / "partitions_python2.pkl").read_bytes()
    small = pickle.dumps(dataclasses.asdict(small_partitions()), protocol=4)
    lengths = (0, 1, 2, 3, 100, len(content) // 2, len(content) - 1)
    for part in [*(content[:length] for length in lengths), *(small[:length] for length in range(0, len(small), 29))]:
        assert "cut off" in unreadable(tmp_path, part)
    random = np.random.RandomState(0)
    for _ in range(50):
        unreadable(tmp_path, random.bytes(60))
    for size in (MAX_BYTES + 1, 2**42):  # the second does not fit into memory
        os.truncate(tmp_path / "partitions.pkl", size)
        assert "larger than" in refusal(read_partitions, tmp_path / "partitions.pkl")


def test_a_missing_file_or_key_and_other_pickles_are_refused(tmp_path):
    assert "No such file" in refusal(read_partitions, tmp_path / "none.pkl")
    assert "directory" in refusal(read_partitions, tmp_path)
    without_marks = dataclasses.asdict(small_partitions())
    del without_marks["val_marks"]
    for value, reason in ((without_marks, "has no val_marks"), ([], "not a dict"), (None, "not a dict")):
        assert reason in unreadable(tmp_path, pickle.dumps(value, protocol=2))


@pytest.mark.parametrize(
    ("key", "value", "keyword"),
    [
        ("trainval_im_names", "00000002_0001_00000000.jpg", "not a list of image names"),
        ("val_im_names", [1, 2], "not a list of image names"),
        ("test_im_names", ["query/0001.jpg"], "query/0001.jpg"),
        ("test_im_names", ["00000020_0001_00000000.jpg"], "5 test_marks for 1 test_im_names"),
        ("test_marks", [0, 0, 2, 1, 3], "not a list of 0"),
        ("test_marks", [False, 0, 2, 1, 1], "not a list of 0"),
        ("trainval_ids2labels", [0, 1], "not a dict"),
        ("trainval_ids2labels", {"2": 0}, "not a dict"),
        ("trainval_ids2labels", {2: 0, 7: 1, 9: 2}, "no label for person 11"),
        ("trainval_ids2labels", {2: 0, 7: 1, 9: 2, 11: 2}, "not 0 to 3"),
    ],
)
def test_wrong_values_are_refused(tmp_path, key, value, keyword):
    message = unreadable(tmp_path, pickle.dumps({**dataclasses.asdict(small_partitions()), key: value}, protocol=2))
    assert keyword in message and key.split("_")[0] in message
