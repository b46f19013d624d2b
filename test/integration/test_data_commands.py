"""Data sets as a user prepares them and trains on them: script/prepare_*.py."""

import json
import shlex
import shutil

import pytest
from conftest import assert_refused

from aligned_reid.data import parse_image_name, read_partitions


@pytest.fixture
def photos(tiny_data, tmp_path):
    """The drawn people as somebody's own photos."""
    for file in (tiny_data / "images").iterdir():
        image = parse_image_name(file.name)
        place = tmp_path / "photos" / f"person {image.person_id}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"c{image.camera}_{image.index}.jpg")
    return tmp_path / "photos"


def test_own_photos_are_prepared_and_trained_on(command, train, photos, tmp_path):
    refused = train(f"--data_path={photos}", status=2)
    assert_refused(refused, f"prepare_photos.py --source {shlex.quote(str(photos))} --save_dir ")
    prepared = tmp_path / "photos_prepared"
    done = command("prepare_photos.py", "--source", photos, "--save_dir", prepared, "--test_share=0.25", "--seed=4")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["trainval", "78", "images,", "13", "identities"]  # 17 with the distractors' "person"
    assert lines[-1] == f"next: python script/train.py --data_path={shlex.quote(str(prepared))}"
    partitions = read_partitions(prepared / "partitions.pkl")
    assert len({name[:8] for name in partitions.test_im_names}) == 4
    train(f"--data_path={prepared}")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["global"]["mAP"] > 0


def test_resume_is_refused_after_another_division(command, train, photos, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    prepare = ("prepare_photos.py", "--source", photos, "--save_dir", data)
    flags = (f"--data_path={data}", "--eval_every=1")
    assert command(*prepare).status == 0
    train(*flags)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    trained = set(read_partitions(data / "partitions.pkl").trainval_ids2labels)
    assert command(*prepare, "--seed=2").status == 0
    tested = {int(name[:8]) for name in read_partitions(data / "partitions.pkl").test_im_names}
    assert_refused(train(*flags, "--resume=true", status=2), "other persons", "--seed", "--model_weight_file")
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    for weights in ("ckpt.pth", "best.pth", "model.safetensors"):
        done = train(*flags, "--only_test=true", f"--model_weight_file={run / weights}", folder="test")
        assert f"trained on {len(trained & tested)} of the {len(tested)} persons" in done.out
    assert command(*prepare).status == 0  # as before
    train(*flags, "--resume=true")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((), "--save_dir"),
        (("--save_dir=new", "--source=none"), "does not exist"),
        (("--save_dir=new", "--test_share=2"), "--test_share"),
        (("--save_dir=new", "--test_share=half"), "--test_share"),
        (("--save_dir=new", "--cameras=some"), "--cameras"),
    ],
)
def test_mistakes_in_preparing_photos_are_one_line(command, photos, tmp_path, monkeypatch, flags, word):
    monkeypatch.chdir(tmp_path)
    assert_refused(command("prepare_photos.py", "--source", photos, *flags), word)
    assert not (tmp_path / "new").exists()


def test_a_damaged_photo_is_named(command, photos, tmp_path):
    (photos / "person 2" / "c1_9.jpg").write_bytes(b"\xff\xd8")
    done = command("prepare_photos.py", "--source", photos, "--save_dir", tmp_path / "new")
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("prepare_photos.py: error: image ") and "c1_9.jpg" in done.err
    assert not (tmp_path / "new" / "partitions.pkl").exists()
