"""Data sets as a user prepares them and trains on them: script/prepare_*.py."""

import json
import shutil

import pytest
from conftest import TINY

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


def test_own_photos_are_prepared_and_trained_on(command, photos, tmp_path, small_trunk):
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


def test_resume_is_refused_after_another_division(command, photos, tmp_path, small_trunk):
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
    for flags, reason in (
        (("--source", photos), "required: --save_dir"),
        (("--source", tmp_path / "none", *new), "does not exist"),
        (("--source", photos, *new, "--test_share=2"), "--test_share"),
        (("--source", photos, *new, "--test_share=half"), "--test_share"),
        (("--source", photos, *new, "--cameras=some"), "invalid choice"),
        (("--source", photos, *new, "--seeds=2"), "did you mean --seed?"),
    ):
        assert_refused(command("prepare_photos.py", *flags), reason)
    assert not (tmp_path / "new").exists()
    (photos / "person 2" / "c1_9.jpg").write_bytes(b"\xff\xd8")
    done = command("prepare_photos.py", "--source", photos, *new)
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("prepare_photos.py: error: image ") and "c1_9.jpg" in done.err
    assert not (tmp_path / "new" / "partitions.pkl").exists()
