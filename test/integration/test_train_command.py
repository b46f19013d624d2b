"""script/train.py as a user runs it: what it writes, what it prints, and how it reports mistakes."""

import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_refused, run_script, same

from aligned_reid.data import Partitions, read_partitions, write_partitions
from aligned_reid.lock import hold
from aligned_reid.model import AlignedReID

SCORES = {"mAP", "mAP_step", "mINP", "cmc1", "cmc5", "cmc10"}


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the data set that a test may damage."""
    return shutil.copytree(tiny_data, tmp_path / "own_data")


def edit_partitions(data, **changes):
    path = data / "partitions.pkl"
    write_partitions(path, Partitions(**{**vars(read_partitions(path)), **changes}))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# ---- a whole run


def test_a_run_writes_its_folder_and_prints_the_lines_that_tools_read(train, tmp_path):
    done = train("--total_epochs=2", "--seed=3", "-llw", "1")
    folder = tmp_path / "run"
    epochs = [line for line in done.out.splitlines() if "Ep" in line]
    assert len(epochs) == 2
    for line in epochs:
        assert float(line.split()[4].rstrip(",")) > 0
        assert math.isfinite(float(line.split("loss")[1]))
    assert [line for line in done.out.splitlines() if "FPS" in line] == epochs
    ranks = [line for line in done.out.splitlines() if "cmc1" in line]
    assert len(ranks) == 6
    results = results_of(folder)
    assert ranks[-1].split()[3] == f"{results['global']['cmc1']:.2%}],"  # the plain global distance comes last
    for name in ("global", "global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked"):
        assert set(results[name]) == SCORES
        assert 0 <= results[name]["mAP"] <= 1
    assert results["FPS"] == pytest.approx(2 * results["ids_per_second"])
    assert results["config"] == json.loads((folder / "config.json").read_text())
    assert results["config"]["seed"] == 3
    assert (folder / "log.txt").read_text() == done.out
    files = "ckpt.pth ckpt.previous.pth config.json log.txt model.md model.safetensors results.json tensorboard"
    assert set(os.listdir(folder)) == set(files.split())


def test_a_profile_is_in_the_run_folder_and_in_the_results(train, tmp_path):
    train("--total_epochs=2", "--profile=1")
    profile = results_of(tmp_path / "run")["profile"]
    images, positions, first, second = 8, 2 * 1, 16 * 3 * 32 * 32, 2048 * 16  # convolutions: places, weights
    forward = images * positions * (first + second + 2048 * 128) + images * 2048 * 12  # the heads too; 12 identities
    backward = images * positions * (first + 2 * second)  # by weight, and by input where it is not the image
    distances = 3 * images * images * 2048  # features with themselves, and a gradient for either side
    assert profile["flops_per_step"] == 2 * (forward + backward + distances)  # a multiplication and an addition
    assert sorted(os.listdir(tmp_path / "run" / "profile")) == ["operators.txt", "trace.json.gz"]


def test_the_image_cache_does_not_change_the_run(train, own_data):
    """Built beside the images, then found there and read by a worker."""
    flags = (f"--data_path={own_data}", "--total_epochs=2", "--seed=1", "--crop_ratio=0.7", "--crop_prob=0.5")

    def figures_of(done):
        return [line.split(", gp ")[1] for line in done.out.splitlines() if line.startswith("Ep ")]

    without = figures_of(train(*flags, folder="without"))
    assert not (own_data / "cache").exists()
    for workers in (0, 1):
        done = train(*flags, f"--workers={workers}", "--cache=true")
        assert figures_of(done) == without
        (line,) = (line for line in done.out.splitlines() if line.startswith("image cache "))
        assert str(own_data / "cache") in line and "72 images" in line


def test_a_cache_beside_read_only_data_is_in_the_run_folder(train, own_data, tmp_path):
    (own_data / "cache").touch()  # a folder cannot be made there
    done = train(f"--data_path={own_data}", "--cache=true")
    assert f"no image cache in {own_data / 'cache'}: " in done.out
    assert list((tmp_path / "run" / "cache").glob("64x32-*.npy"))


@pytest.mark.parametrize(
    ("flags", "status"), [(("--workers=0",), 2), (("--workers=1",), 2), (("--workers=0", "--cache=true"), 0)]
)
def test_an_image_that_turns_bad_ends_a_run_without_cache(train, own_data, tmp_path, monkeypatch, flags, status):
    names = read_partitions(own_data / "partitions.pkl").trainval_im_names
    save = torch.save

    def save_and_spoil(*given):  # after the first epoch: all images but one of a person
        for name in [name for name in names if name[:8] == names[0][:8]][1:]:
            (own_data / "images" / name).write_bytes(b"")
        save(*given)

    monkeypatch.setattr(torch, "save", save_and_spoil)
    done = train(*flags, f"--data_path={own_data}", "--total_epochs=3", status=status)
    if status:
        assert_refused(done, ".jpg is empty")
        assert torch.load(tmp_path / "run" / "ckpt.pth", weights_only=True)["epoch"] == 1


def test_only_test_repeats_the_scores_of_the_training(train, tmp_path):
    train("-llw", "1", "--seed=1")
    folder = tmp_path / "run"
    trained = results_of(folder)
    for source, place in ((f"--model_weight_file={folder}", "test"), ("--seed=2", "run")):
        train("--only_test=true", source, folder=place)
        tested = results_of(tmp_path / place)
        for name in ("global", "global_re_ranked", "local_re_ranked", "global_local"):
            assert tested[name] == trained[name]
        assert tested["FPS"] is None
    assert json.loads((folder / "results.old1.json").read_text())["FPS"] == trained["FPS"]
    train("--only_test=true", "--resume=true")  # a test continues nothing
    assert (folder / "results.old2.json").exists()
    assert "Ep 1" in (folder / "log.txt").read_text()


def test_a_resumed_run_ends_as_an_uninterrupted_one(train, tmp_path):
    flags = ("--seed=5", "--exp_decay_at_epoch=151")
    train(*flags, "--total_epochs=3", folder="whole")
    train(*flags, "--total_epochs=2", folder="part")
    done = train(flags[1], "--total_epochs=3", "--resume=true", folder="part")  # takes the stored seed
    assert "after epoch 2" in done.out
    assert "total_epochs: 2 -> 3" in done.out
    whole, part = (torch.load(tmp_path / name / "ckpt.pth", weights_only=True) for name in ("whole", "part"))
    assert part["config"]["seed"] == 5
    assert same(part["model"], whole["model"])
    whole, part = results_of(tmp_path / "whole"), results_of(tmp_path / "part")
    assert whole["global"] == part["global"]
    assert whole["local"] is whole["global_local_re_ranked"] is None  # the local branch was not trained


def test_a_second_run_in_the_folder_draws_another_seed_and_keeps_the_first(train, tmp_path):
    train()
    done = train()
    assert "ckpt.old1.pth" in done.out
    assert {"ckpt.pth", "ckpt.old1.pth", "log.old1.txt", "results.old1.json"} <= set(os.listdir(tmp_path / "run"))
    files = (tmp_path / "run" / name for name in ("config.old1.json", "config.json"))
    old, new = (json.loads(file.read_text())["seed"] for file in files)
    assert old != new
    assert f"seed {new}" in done.out


def test_fine_tuning_loads_all_but_the_classifier(train, tmp_path):
    model = AlignedReID(99, pretrained="none")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    done = train(f"--model_weight_file={tmp_path / 'weights.pth'}", "--base_lr=1e-9")
    assert "classifier not loaded" in done.out
    tuned = torch.load(tmp_path / "run" / "ckpt.pth", weights_only=True)["model"]
    assert torch.allclose(tuned["base.conv1.weight"], model.base.conv1.weight, atol=1e-6)
    assert len(tuned["fc.weight"]) == 12


def test_an_identity_with_one_image_is_logged_once(train, own_data):
    names = read_partitions(own_data / "partitions.pkl").trainval_im_names
    edit_partitions(
        own_data, trainval_im_names=[name for name in names if name[:8] != names[0][:8] or name == names[0]]
    )
    done = train(f"--data_path={own_data}", "--total_epochs=2")
    assert done.out.count(f"fewer than 2 images (the first is {int(names[0][:8])})") == 1


def test_resnet50_in_a_process_of_its_own(tiny_flags, tmp_path):
    done = run_script("train.py", *tiny_flags, "--total_epochs=1", "-idlw", "1", "--workers=1", cwd=tmp_path)
    assert done.status == 0, done.err
    (checkpoint,) = tmp_path.glob("exp/train/market1501/*/run1/ckpt.pth")
    assert "idlw_1" in str(checkpoint)
    assert "trunk: random start" in done.out
    assert "Traceback" not in done.err


# ---- mistakes


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--data_path=", "empty"),
        ("--resume=maybe", "neither"),
        ("--device=npu", "torch_npu is not installed"),
        ("--device=tpu", "auto, npu, cuda, cpu"),
        ("--npu=9", "--npu 9"),
        ("--ids_per_batch=13", "12 identities"),
        ("--pretrained=missing.pth", "missing.pth"),
        ("--pretrained=other.pth", "no model weights"),
        ("--model_weight_file=missing", "missing"),
        ("--model_weight_file=other.pth", "no model weights"),
        ("--only_test=true", "needs"),
        ("--resume=true", "needs"),
        ("--partition_file=missing.pkl", "missing.pkl"),
        ("--exp_dir=/proc/run", "--exp_dir"),
        ("--exp_dir=other.pth/run", "--exp_dir"),
    ],
)
def test_a_mistaken_flag_is_one_line_and_writes_nothing(train, tmp_path, monkeypatch, flag, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    torch.save({"lr": 0.1}, "other.pth")
    assert_refused(train(flag, status=2), word)
    assert os.listdir(tmp_path) == ["other.pth"]


def write_pickle_that_runs_code(data):
    (data / "partitions.pkl").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")


def cut_off_an_image(data):
    image = data / "images" / read_partitions(data / "partitions.pkl").trainval_im_names[0]
    image.write_bytes(image.read_bytes()[:-200])


def keep_one_camera(data):
    partitions = read_partitions(data / "partitions.pkl")
    pairs = zip(partitions.test_im_names, partitions.test_marks, strict=True)
    names, marks = zip(*[(name, mark) for name, mark in pairs if name[9:13] == "0001"], strict=True)
    edit_partitions(data, test_im_names=list(names), test_marks=list(marks))


@pytest.mark.parametrize(
    ("damage", "word"),
    [(write_pickle_that_runs_code, "partitions.pkl"), (cut_off_an_image, "cut off"), (keep_one_camera, "one camera")],
)
def test_damaged_data_is_one_line_and_writes_nothing(train, own_data, tmp_path, monkeypatch, damage, word):
    damage(own_data)
    monkeypatch.chdir(tmp_path)
    assert_refused(train(f"--data_path={own_data}", status=2), word, str(own_data))
    assert os.listdir(tmp_path) == ["own_data"]


def test_a_refused_resume_keeps_the_settings_of_the_run(train, tmp_path):
    config = tmp_path / "run" / "config.json"
    train("--seed=3")
    before = config.read_text()
    refused = train("--total_epochs=2", "--resume=true", "--num_models=2", "-gdmlw=1", status=2)
    assert_refused(refused, "num_models: 1 -> 2")
    assert config.read_text() == before
    train("--seed=3", "--total_epochs=2", "--resume=true")
    assert json.loads(config.read_text())["total_epochs"] == 2


def test_a_loss_that_is_not_finite_has_status_1(train, tmp_path):
    state = AlignedReID(12, pretrained="none").state_dict()
    state["base.conv2.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "weights.pth")
    done = train(f"--model_weight_file={tmp_path / 'weights.pth'}", "-idlw=1", status=1)
    assert done.err.count("\n") == 1
    assert "nan at step 1 of epoch 1" in done.err and ".jpg" in done.err
    assert not (tmp_path / "run" / "ckpt.pth").exists()


# ---- folders and paths of every command


def commands_at(place, tiny_data):
    """Each command that writes, as (script, flags), with `place` as the folder or file that it writes."""
    train = (f"--data_path={tiny_data}", *TINY, "--total_epochs=1", f"--exp_dir={place}")
    return {
        "train": ("train.py", *train),
        "resume": ("train.py", *train, "--resume=true"),
        "only_test": ("train.py", *train, "--only_test=true"),
        "launch": ("launch.py", "--nproc=2", f"--log_dir={place}/logs", ROOT / "script" / "train.py", *train),
        "prepare": ("prepare_photos.py", f"--source={tiny_data}/photos.csv", f"--save_dir={place}"),
        "draw": ("make_synthetic.py", f"--save_dir={place}"),
        "extract": ("extract.py", *train[:-1], f"--model_weight_file={place}", f"--save_file={place}/a.h5"),
        "evaluate": ("evaluate.py", f"--features={place}/b.npz", f"--save_file={place}/a.json"),
        "export": ("export.py", f"--model_weight_file={place}", f"--save_file={place}/a.onnx"),
    }


@pytest.mark.parametrize("name", list(commands_at("", "")))
def test_a_folder_that_another_process_writes_is_refused_unchanged(command, own_data, tmp_path, small_trunk, name):
    place = tmp_path / "place"
    if name in ("resume", "only_test", "extract", "export"):
        assert command(*commands_at(place, own_data)["train"]).status == 0
    place.mkdir(exist_ok=True)
    (place / "ckpt.old1.pth").touch()
    images = sorted(os.listdir(own_data / "images"))
    rows = "".join(f"images/{image},{image[:8]},{image[9:13]}\n" for image in images)
    (own_data / "photos.csv").write_text(f"path,person,camera\n{rows}")

    def times():
        return {path.name: path.stat().st_mtime_ns for path in place.iterdir() if path.is_file()}

    files = {"extract": "a.h5", "evaluate": "a.json", "export": "a.onnx"}
    flags = {"prepare": "--save_dir", "draw": "--save_dir"} | dict.fromkeys(files, "--save_file")
    with hold(place / files.get(name, ""), "--exp_dir"):
        before = times()
        done = command(*commands_at(place, own_data)[name])
        assert_refused(done, flags.get(name, "--exp_dir"), f"process {os.getpid()}")
        assert times() == before


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "script").glob("*.py")])
def test_a_tilde_is_never_a_folder(command, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    names = r"[a-z_]*(?:path|dir|folder)|(?:save|model_weight|partition)_file|source|features|gallery|pretrained"
    flags = re.findall(rf"^ +(--(?:{names})) ", command(script, "--help").out, re.MULTILINE)
    assert flags
    for flag in flags:
        assert_refused(command(script, f"{flag}=~nosuchuser/x"), "~nosuchuser", flag)
    assert os.listdir(tmp_path) == []


def test_a_run_in_the_home_folder(train, own_data, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = (f"--data_path=~/{own_data.name}", "--exp_dir=~/runs/a")
    train(*flags)
    train(*flags, "--only_test=true", "--pretrained=~/none")
    assert os.listdir() == [] and (tmp_path / "runs" / "a" / "ckpt.pth").is_file()
