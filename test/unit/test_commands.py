"""The command aligned-reid: its list, its names in errors, and what scripts and commands have in common."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import PATIENCE, ROOT, assert_done, assert_refused
from PIL import Image

from aligned_reid import commands
from aligned_reid.cli import command_line
from aligned_reid.commands import prepare
from aligned_reid.evaluation.features import read_features


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], [], ["prepare"], ["prepare", "--help"]])
def test_the_list_of_commands_fits_a_screen(aligned_reid, arguments):
    done = aligned_reid(*arguments)
    lines = done.out.splitlines()
    assert done.status == 0 and "examples:" in lines
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    table = prepare.KINDS if "prepare" in arguments else commands.COMMANDS
    assert all(re.search(rf"^  {name} ", done.out, re.MULTILINE) for name in table)


@pytest.mark.parametrize("name", [*commands.COMMANDS, *(f"prepare {kind}" for kind in prepare.KINDS)])
def test_every_command_shows_its_help_in_both_ways(aligned_reid, name):
    asked = [aligned_reid(*name.split(), "--help"), aligned_reid("help", *name.split())]
    assert asked[0] == asked[1] and asked[0].status == 0
    assert asked[0].out.startswith(f"usage: aligned-reid {name} ")


@pytest.mark.parametrize(
    ("arguments", "name", "word"),
    [
        (["trian"], "aligned-reid", "did you mean train?"),
        (["xyz"], "aligned-reid", "unknown command xyz;"),
        (["prepare", "photo"], "aligned-reid prepare", "did you mean photos?"),
        (["train", "--worker=1"], "aligned-reid train", "--workers"),
        (["train", "--data_path=/nowhere"], "aligned-reid train", "/nowhere"),
        (["train", "--data_path=x", "--model_weight_file="], "aligned-reid train", "empty"),
        (["search", "a.jpg", "--model=x", "--gallery="], "aligned-reid search", "empty"),
        (["report", "/nowhere"], "aligned-reid report", "/nowhere"),
        (["prepare", "photos"], "aligned-reid prepare photos", "--source"),
        (["launch", "--nproc=2", "trian"], "aligned-reid launch", "trian"),
        (["launch", "--check=only", "train", "--data_path=/nowhere"], "aligned-reid train", "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_in_the_commands_name(aligned_reid, arguments, name, word):
    done = aligned_reid(*arguments)
    assert_refused(done, word)
    assert done.out == "" and done.err.startswith(f"{name}: error: ")


def test_messages_name_the_command_as_the_user_runs_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aligned-reid prepare photos"])
    assert command_line("prepare photos") == "aligned-reid prepare photos"
    monkeypatch.setattr(sys, "argv", ["script/prepare_photos.py"])
    assert command_line("prepare photos") == "python script/prepare_photos.py"


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "script").glob("*.py")))
def test_a_script_is_one_of_the_commands(script):
    main = [value for name, value in runpy.run_path(str(ROOT / "script" / f"{script}.py")).items() if name == "main"]
    name = script.removeprefix("prepare_").removeprefix("make_")
    assert main or name in prepare.KINDS
    assert not main or main[0].__module__ == f"aligned_reid.commands.{name}"


def test_python_m_is_the_command_and_does_not_wait_for_torch():
    program = [sys.executable, "-X", "importtime", "-m", "aligned_reid", "train", "--help"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.startswith("usage: aligned-reid train ")
    assert "aligned_reid.config" in done.stderr and " torch\n" not in done.stderr


def test_evaluate_prints_json_and_nothing_else(aligned_reid, tmp_path):
    rng = np.random.default_rng(0)
    labels = {"person_id": np.arange(40) % 5, "camera": np.arange(40) % 2, "mark": np.arange(40) // 10 > 0}
    np.savez(tmp_path / "f.npz", **{"global": rng.standard_normal((40, 8)).astype(np.float32)}, **labels)
    done = aligned_reid("evaluate", f"--features={tmp_path / 'f.npz'}", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == json.loads((tmp_path / "f.results.json").read_text())
    assert "mAP" in done.err
    assert aligned_reid("evaluate", f"--features={tmp_path / 'f.npz'}").out == done.err


def test_extract_takes_any_folder_of_images(aligned_reid, tiny_data, trained, tmp_path):
    photos = tmp_path / "my photos" / "door"
    photos.mkdir(parents=True)
    name = sorted(path.name for path in (tiny_data / "images").iterdir())[-1]
    (photos / "a.jpg").write_bytes((tiny_data / "images" / name).read_bytes())
    Image.new("RGBA", (30, 60), "red").save(photos.parent / "人 1.PNG")
    (photos / "cut off.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    (photos / "notes.txt").touch()
    flags = (f"--model_weight_file={trained}", "--workers=0", "--device=cpu", "--amp=O0")
    done = aligned_reid("extract", f"--images={photos.parent}", *flags, f"--save_file={tmp_path}/photos.h5")
    assert_refused(done, "1 images")
    assert "cut off.jpg is cut off" in done.out
    table = read_features(tmp_path / "photos.h5", default_mark=1)
    assert table.image_names == ["door/a.jpg", "人 1.PNG"]
    assert table.person_ids.tolist() == table.cameras.tolist() == [-1, -1]
    done = aligned_reid("extract", f"--data_path={tiny_data}", *flags, f"--save_file={tmp_path}/data.h5")
    assert shlex.split(done.out.splitlines()[-1])[-3:] == ["evaluate", "--features", f"{tmp_path}/data.h5"]
    with h5py.File(tmp_path / "data.h5") as data:
        row = data["image_name"][()].tolist().index(name.encode())
        np.testing.assert_allclose(table.global_feat[0], data["global"][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--images=/none"], "/none"),
        (["--images={empty}"], "no images"),
        (["--images={empty}", "--data_path=/data"], "not both"),
    ],
)
def test_mistakes_in_extracting_a_folder_are_one_line(aligned_reid, tmp_path, flags, word):
    flags = [flag.format(empty=tmp_path) for flag in flags]
    assert_refused(aligned_reid("extract", *flags, "--device=cpu", f"--save_file={tmp_path}/f.h5"), word)


def test_photos_are_counted_without_being_written(aligned_reid, tiny_data, tmp_path):
    image = next((tiny_data / "images").iterdir())
    for person in range(4):
        folder = tmp_path / "photos" / f"person {person}"
        folder.mkdir(parents=True)
        for camera in (1, 2):
            shutil.copy(image, folder / f"c{camera}_1.jpg")
    (tmp_path / "photos" / "Thumbs.db").touch()
    flags = ("prepare", "photos", f"--source={tmp_path}/photos", f"--save_dir={tmp_path}/mine")
    done = assert_done(aligned_reid(*flags, "--dry_run"))
    for part in ("1 .db", "8 photos of 4 persons by 2 cameras", "trainval 4 of 2", "query 2 of 2", "gallery 2 of 2"):
        assert part in done.out
    assert not (tmp_path / "mine").exists()
    done = aligned_reid(*flags)
    assert "8 photos of 4 persons by 2 cameras" in done.err
    assert done.out.splitlines()[-1] == f"next: aligned-reid train --data_path={shlex.quote(str(tmp_path / 'mine'))}"
