"""Data sets as a user prepares them and trains on them: script/prepare_*.py."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from aligned_reid.data import parse_image_name, read_partitions

SCORES = {"mAP", "mAP_step", "mINP", "cmc1", "cmc5", "cmc10"}


@pytest.fixture
def photos(tiny_data, tmp_path):
    """The drawn people as somebody's own photos."""
    for file in (tiny_data / "images").iterdir():
        image = parse_image_name(file.name)
        place = tmp_path / "photos" / f"person {image.person_id}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"c{image.camera}_{image.index}.jpg")
    return tmp_path / "photos"


def assert_refused(finished, *reasons):
    assert finished.status == 2
    assert finished.err.count("\n") == 1, finished.err
    for reason in reasons:
        assert reason in finished.err


def test_own_photos_from_folder_to_scores(command, photos, tmp_path, small_trunk):
    refused = command("train.py", f"--data_path={photos}", *TINY)
    assert_refused(refused, "looks like photos of persons", f"prepare_photos.py --source {photos} --save_dir ")
    prepared = tmp_path / "photos_prepared"
    done = command("prepare_photos.py", "--source", photos, "--save_dir", prepared, "--test_share=0.25", "--seed=4")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["trainval", "78", "images,", "13", "identities"]  # 17 with the distractors' "person"
    assert lines[-1] == f"next: python script/train.py --data_path={prepared}"
    partitions = read_partitions(prepared / "partitions.pkl")
    assert len({name[:8] for name in partitions.test_im_names}) == 4
    flags = (f"--data_path={prepared}", *TINY, "--total_epochs=1", f"--exp_dir={tmp_path / 'run'}")
    done = command("train.py", *flags)
    assert done.status == 0, done.err
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["global"]) == SCORES


def test_photos_divided_anew_are_not_trained_on_under_old_labels(command, photos, tmp_path, small_trunk):
    prepare = ("prepare_photos.py", "--source", photos, "--save_dir", tmp_path / "data")
    train = ("train.py", f"--data_path={tmp_path / 'data'}", *TINY, "--total_epochs=1", "--eval_every=1")
    assert command(*prepare).status == command(*train, f"--exp_dir={tmp_path / 'run'}").status == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    trained = set(read_partitions(tmp_path / "data" / "partitions.pkl").trainval_ids2labels)
    assert command(*prepare, "--seed=2").status == 0
    tested = {int(name[:8]) for name in read_partitions(tmp_path / "data" / "partitions.pkl").test_im_names}
    refused = command(*train, f"--exp_dir={tmp_path / 'run'}", "--resume=true")
    assert_refused(refused, "other persons", "--seed", "--model_weight_file")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    for weights in ("ckpt.pth", "best.pth", "model.safetensors"):
        test = (
            "--only_test=true",
            f"--model_weight_file={tmp_path / 'run' / weights}",
            f"--exp_dir={tmp_path / 'test'}",
        )
        assert f"trained on {len(trained & tested)} of the {len(tested)} persons" in command(*train, *test).out
    assert command(*prepare).status == 0  # as before
    assert command(*train, f"--exp_dir={tmp_path / 'run'}", "--resume=true").status == 0


def test_mistakes_in_preparing_photos_are_one_line(command, photos, tmp_path):
    new = ("--save_dir", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    table = tmp_path / "table.csv"
    table.write_text("path,person,camera\nphotos/person 1/c1_0.jpg,1,1\nphotos/none.jpg,1,2\n")
    for flags, reasons in (
        (("--source", photos), ("required: --save_dir",)),
        (("--source", tmp_path / "none", *new), ("does not exist",)),
        (("--source", tmp_path / "empty", *new), ("has no photos",)),
        (("--source", table, *new), ("table.csv, row 3: there is no file", "none.jpg")),
        (("--source", photos, *new, "--test_share=2"), ("--test_share",)),
        (("--source", photos, *new, "--test_share=half"), ("--test_share",)),
        (("--source", photos, *new, "--cameras=some"), ("invalid choice",)),
        (("--source", photos, "--save_dir", photos / "new"), ("inside the source",)),
        (("--source", photos, *new, "--seeds=2"), ("did you mean --seed?",)),
    ):
        assert_refused(command("prepare_photos.py", *flags), *reasons)
    (photos / "person 2" / "holiday.jpg").write_bytes(b"\xff\xd8")
    assert_refused(command("prepare_photos.py", "--source", photos, *new), "no camera", "holiday.jpg")
    assert not (tmp_path / "new").exists()
    (photos / "person 2" / "holiday.jpg").rename(photos / "person 2" / "c1_9.jpg")
    done = command("prepare_photos.py", "--source", photos, *new)
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("prepare_photos.py: error: image ") and "c1_9.jpg" in done.err
    assert not (tmp_path / "new" / "partitions.pkl").exists()


def test_msmt17_from_lists_to_scores(command, tiny_data, tmp_path, small_trunk):
    raw = tmp_path / "MSMT17_V1"
    partitions = read_partitions(tiny_data / "partitions.pkl")
    test = list(zip(partitions.test_im_names, partitions.test_marks, strict=True))
    lists = {
        "list_train.txt": partitions.trainval_im_names[::2],
        "list_val.txt": partitions.trainval_im_names[1::2],
        "list_query.txt": [name for name, mark in test if mark == 0],
        "list_gallery.txt": [name for name, mark in test if mark == 1],
    }
    for list_name, names in lists.items():
        folder = raw / ("train" if list_name in ("list_train.txt", "list_val.txt") else "test")
        lines = []
        for name in names:
            person, camera, index = parse_image_name(name)
            path = f"{person:04d}/{person:04d}_{index:03d}_{camera:02d}_0303morning_0015_{index}.jpg"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny_data / "images" / name, folder / path)
            lines.append(f"{path} {person}\n")
        (raw / list_name).write_text("".join(lines))
    assert_refused(command("train.py", f"--data_path={raw}", *TINY), "is the original MSMT17", "prepare_msmt17.py")
    done = command("prepare_msmt17.py", "--source", raw, "--save_dir", tmp_path / "msmt17")
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].split()[:2] == ["trainval", str(len(partitions.trainval_im_names))]
    assert f"--dataset=msmt17 --data_path={tmp_path / 'msmt17'}" in done.out
    flags = (f"--data_path={tmp_path / 'msmt17'}", *TINY, "--total_epochs=1", f"--exp_dir={tmp_path / 'run'}")
    done = command("train.py", *flags)
    assert done.status == 0, done.err
    assert_refused(command("prepare_msmt17.py", "--source", tmp_path / "run", "--save_dir", "x"), "list_train")


def test_cuhk03_from_extracted_images(command, tmp_path):
    from scipy.io import savemat

    names = [
        f"1_{person:03d}_{camera}_{5 * camera - i:02d}.png" for person in (1, 2) for camera in (1, 2) for i in (0, 1)
    ]
    (tmp_path / "raw" / "images_labeled").mkdir(parents=True)
    for seed, name in enumerate(names):
        noise = np.random.RandomState(seed).randint(0, 256, (40, 20, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "raw" / "images_labeled" / name)
    savemat(
        tmp_path / "raw" / "cuhk03_new_protocol_config_labeled.mat",
        {
            "filelist": np.array([[np.array([name])] for name in names], dtype=object),
            "labels": np.array([[int(name[2:5])] for name in names]),
            "camId": np.array([[int(name[6])] for name in names]),
            "train_idx": [[1, 2, 3, 4]],
            "query_idx": [[5, 7]],
            "gallery_idx": [[6, 8]],
        },
    )
    source = ("--source", tmp_path / "raw", "--save_dir", tmp_path / "cuhk03")
    done = command("prepare_cuhk03.py", *source, "--kind=labeled")
    assert done.status == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines()[3:5]] == [["query", "2"], ["gallery", "2"]]
    assert f"--dataset=cuhk03_labeled --data_path={tmp_path / 'cuhk03'}" in done.out
    assert_refused(command("prepare_cuhk03.py", *source), "required: --kind")
    assert_refused(command("prepare_cuhk03.py", *source, "--kind=both"), "invalid choice")
    assert_refused(command("prepare_cuhk03.py", *source, "--kind=detected"), "cuhk03_new_protocol_config_detected")
