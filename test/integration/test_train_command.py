"""script/train.py as a user runs it: what it writes, what it prints, and how it reports mistakes."""

import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script

from aligned_reid.config import Config
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


def assert_refused(finished, *reasons):
    """One line on stderr that holds all `reasons`, and exit status 2."""
    assert finished.status == 2
    assert finished.err.count("\n") == 1, finished.err
    for reason in reasons:
        assert reason in finished.err


# ---- a whole run


def test_a_run_writes_its_folder_and_prints_the_lines_that_tools_read(command, tiny_flags, tmp_path, small_trunk):
    folder = tmp_path / "run"
    done = command("train.py", *tiny_flags, "--total_epochs=2", "--seed=3", f"--exp_dir={folder}", "-llw", "1")
    assert done.status == 0
    epochs = [line for line in done.out.splitlines() if "Ep" in line]
    assert len(epochs) == 2
    for line in epochs:
        assert float(line.split()[4].rstrip(",")) > 0
        assert math.isfinite(float(line.split("loss")[1]))
    assert [line for line in done.out.splitlines() if "FPS" in line] == epochs
    ranks = [line for line in done.out.splitlines() if "cmc1" in line]
    assert len(ranks) == 6
    results = json.loads((folder / "results.json").read_text())
    assert ranks[-1].split()[3] == f"{results['global']['cmc1']:.2%}],"  # the plain global distance comes last
    for name in ("global", "global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked"):
        assert set(results[name]) == SCORES
        assert 0 <= results[name]["mAP"] <= 1
    assert results["FPS"] == pytest.approx(2 * results["ids_per_second"])
    assert results["config"] == json.loads((folder / "config.json").read_text())
    assert results["config"]["seed"] == 3
    assert (folder / "log.txt").read_text() == done.out
    assert {path.name for path in folder.iterdir()} == {
        "ckpt.pth",
        "ckpt.previous.pth",
        "config.json",
        "log.txt",
        "model.md",
        "model.safetensors",
        "results.json",
        "tensorboard",
    }


def test_a_profile_is_in_the_run_folder_and_in_the_results(command, tiny_flags, tmp_path, small_trunk):
    folder = tmp_path / "run"
    done = command("train.py", *tiny_flags, "--total_epochs=2", "--profile=1", f"--exp_dir={folder}")
    assert done.status == 0, done.err
    profile = json.loads((folder / "results.json").read_text())["profile"]
    images, positions, first, second = 8, 2 * 1, 16 * 3 * 32 * 32, 2048 * 16  # convolutions: places, weights
    forward = images * positions * (first + second + 2048 * 128) + images * 2048 * 12  # the heads too; 12 identities
    backward = images * positions * (first + 2 * second)  # by weight, and by input where it is not the image
    distances = 3 * images * images * 2048  # features with themselves, and a gradient for either side
    assert profile["flops_per_step"] == 2 * (forward + backward + distances)  # a multiplication and an addition
    assert sorted(path.name for path in (folder / "profile").iterdir()) == ["operators.txt", "trace.json.gz"]


def figures_of(done):
    """The figures of the epochs' lines, without times."""
    assert done.status == 0, done.err
    return [line.split(", gp ")[1] for line in done.out.splitlines() if line.startswith("Ep ")]


@pytest.mark.parametrize("crop_prob", ["0", "0.5"])
def test_the_image_cache_does_not_change_the_run(command, own_data, tiny_flags, tmp_path, small_trunk, crop_prob):
    flags = (f"--data_path={own_data}", *tiny_flags[1:], "--total_epochs=2", "--seed=1", "--crop_ratio=0.7")
    flags = (*flags, f"--crop_prob={crop_prob}")
    live = command("train.py", *flags, f"--exp_dir={tmp_path / 'live'}")
    assert not (own_data / "cache").exists()
    for run in ("built", "found", "workers"):
        workers = "--workers=1" if run == "workers" else "--workers=0"
        done = command("train.py", *flags, workers, "--cache=true", f"--exp_dir={tmp_path / run}")
        assert figures_of(done) == figures_of(live)
        (line,) = (line for line in done.out.splitlines() if line.startswith("image cache "))
        assert str(own_data / "cache") in line and "72 images" in line


def test_a_cache_beside_read_only_data_is_in_the_run_folder(command, own_data, tiny_flags, tmp_path, small_trunk):
    (own_data / "cache").touch()  # a folder cannot be made there
    flags = (f"--data_path={own_data}", *tiny_flags[1:], "--total_epochs=1", f"--exp_dir={tmp_path / 'run'}")
    done = command("train.py", *flags, "--cache=true")
    assert done.status == 0, done.err
    assert f"no image cache in {own_data / 'cache'}: " in done.out
    assert list((tmp_path / "run" / "cache").glob("64x32-*.npy"))


@pytest.mark.parametrize(
    ("flags", "status"), [(("--workers=0",), 2), (("--workers=1",), 2), (("--workers=0", "--cache=true"), 0)]
)
def test_an_image_that_turns_bad_ends_a_run_without_cache(
    command, own_data, tiny_flags, tmp_path, small_trunk, monkeypatch, flags, status
):
    names = read_partitions(own_data / "partitions.pkl").trainval_im_names
    save = torch.save

    def save_and_spoil(*given):  # after the first epoch: all images but one of a person
        for name in [name for name in names if name[:8] == names[0][:8]][1:]:
            (own_data / "images" / name).write_bytes(b"")
        save(*given)

    monkeypatch.setattr(torch, "save", save_and_spoil)
    flags = (*flags, f"--data_path={own_data}", f"--exp_dir={tmp_path / 'run'}", "--total_epochs=3")
    done = command("train.py", *tiny_flags[1:], *flags)
    assert done.status == status, done.err
    if status:
        assert_refused(done, ".jpg is empty")
        assert torch.load(tmp_path / "run" / "ckpt.pth", weights_only=True)["epoch"] == 1


def test_only_test_repeats_the_scores_of_the_training(command, tiny_flags, tmp_path, small_trunk):
    folder = tmp_path / "run"
    command("train.py", *tiny_flags, "--total_epochs=1", f"--exp_dir={folder}", "-llw", "1", "--seed=1")
    trained = json.loads((folder / "results.json").read_text())
    for source, exp_dir in ((f"--model_weight_file={folder}", tmp_path / "test"), ("--seed=2", folder)):
        done = command("train.py", *tiny_flags, "--only_test=true", source, f"--exp_dir={exp_dir}")
        assert done.status == 0
        tested = json.loads((exp_dir / "results.json").read_text())
        for name in ("global", "global_re_ranked", "local_re_ranked", "global_local"):
            assert tested[name] == trained[name]
        assert tested["FPS"] is None
    assert json.loads((folder / "results.old1.json").read_text())["FPS"] == trained["FPS"]
    assert "Ep 1" in (folder / "log.txt").read_text()


def test_a_resumed_run_ends_as_an_uninterrupted_one(command, tiny_flags, tmp_path, small_trunk):
    flags = (*tiny_flags, "--seed=5", "--exp_decay_at_epoch=151")
    command("train.py", *flags, "--total_epochs=3", f"--exp_dir={tmp_path / 'whole'}")
    command("train.py", *flags, "--total_epochs=2", f"--exp_dir={tmp_path / 'part'}")
    flags = (*tiny_flags, "--exp_decay_at_epoch=151", "--total_epochs=3", "--resume=true")  # takes the stored seed
    done = command("train.py", *flags, f"--exp_dir={tmp_path / 'part'}")
    assert done.status == 0
    assert "after epoch 2" in done.out
    assert "total_epochs: 2 -> 3" in done.out
    whole, part = (torch.load(tmp_path / name / "ckpt.pth", weights_only=True) for name in ("whole", "part"))
    assert part["config"]["seed"] == 5
    assert all(torch.equal(value, part["model"][name]) for name, value in whole["model"].items())
    whole, part = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "part"))
    assert whole["global"] == part["global"]
    assert whole["local"] is whole["global_local_re_ranked"] is None  # the local branch was not trained


def test_a_second_run_in_the_folder_draws_another_seed_and_keeps_the_first(command, tiny_flags, tmp_path, small_trunk):
    for _ in range(2):
        done = command("train.py", *tiny_flags, "--total_epochs=1", f"--exp_dir={tmp_path}")
    assert "ckpt.old1.pth" in done.out
    assert {"ckpt.pth", "ckpt.old1.pth", "log.old1.txt", "results.old1.json"} <= set(os.listdir(tmp_path))
    old, new = (json.loads((tmp_path / name).read_text())["seed"] for name in ("config.old1.json", "config.json"))
    assert old != new
    assert f"seed {new}" in done.out


def test_fine_tuning_loads_all_but_the_classifier(command, tiny_flags, tmp_path, small_trunk):
    model = AlignedReID(99, pretrained="none")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    flags = (f"--model_weight_file={tmp_path / 'weights.pth'}", f"--exp_dir={tmp_path / 'run'}", "--base_lr=1e-9")
    done = command("train.py", *tiny_flags, "--total_epochs=1", *flags)
    assert done.status == 0
    assert "classifier not loaded" in done.out
    tuned = torch.load(tmp_path / "run" / "ckpt.pth", weights_only=True)["model"]
    assert torch.allclose(tuned["base.conv1.weight"], model.base.conv1.weight, atol=1e-6)
    assert len(tuned["fc.weight"]) == 12


def test_an_identity_with_one_image_is_logged_once(command, own_data, tiny_flags, tmp_path, small_trunk):
    partitions = read_partitions(own_data / "partitions.pkl")
    first = partitions.trainval_im_names[0][:8]
    left = [name for name in partitions.trainval_im_names if not name.startswith(first)]
    edit_partitions(own_data, trainval_im_names=[partitions.trainval_im_names[0], *left])
    flags = (f"--data_path={own_data}", *tiny_flags[1:])
    done = command("train.py", *flags, "--total_epochs=2", f"--exp_dir={tmp_path / 'run'}")
    assert done.status == 0
    assert done.out.count(f"fewer than 2 images (the first is {int(first)})") == 1


def test_resnet50_in_a_process_of_its_own(tiny_flags, tmp_path):
    done = run_script("train.py", *tiny_flags, "--total_epochs=1", "-idlw", "1", "--workers=1", cwd=tmp_path)
    assert done.status == 0, done.err
    (checkpoint,) = tmp_path.glob("exp/train/market1501/*/run1/ckpt.pth")
    assert "idlw_1" in str(checkpoint)
    assert "trunk: random start" in done.out
    assert "Traceback" not in done.err


# ---- mistakes


def test_no_data_path(command):
    assert_refused(command("train.py"), "no --data_path", "prepare_market1501.py")


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--total_epoch=1", "did you mean --total_epochs?"),
        ("--resume=maybe", "neither true nor false"),
        ("--pretrained=missing.pth", "no weight file at missing.pth"),
        ("--model_weight_file=missing", "no weight file at missing"),
        ("--ids_per_batch=13", "--ids_per_batch 13 is more than the 12 identities"),
        ("--npu=9", "--npu 9"),
        ("--only_test=true", "needs"),
        ("--resume=true", "give the --exp_dir"),
        ("--partition_file=missing.pkl", "missing.pkl does not exist"),
    ],
)
def test_a_mistaken_flag_is_one_line_and_writes_nothing(command, tiny_flags, tmp_path, monkeypatch, flag, reason):
    monkeypatch.chdir(tmp_path)
    assert_refused(command("train.py", *tiny_flags, f"--exp_dir={tmp_path / 'run'}", flag), reason)
    assert not (tmp_path / "run").exists()


def test_a_missing_npu_is_refused(command, tiny_flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    done = command("train.py", *tiny_flags, "--device=npu", f"--exp_dir={tmp_path / 'run'}")
    assert_refused(done, "--device npu", "torch_npu is not installed")
    assert not (tmp_path / "run").exists()


def raw_market(data):
    for name in ("bounding_box_train", "bounding_box_test", "query"):
        (data / name).mkdir()
    shutil.rmtree(data / "images")
    (data / "partitions.pkl").unlink()


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def first_image(data):
    return data / "images" / read_partitions(data / "partitions.pkl").trainval_im_names[0]


def one_camera(data):
    partitions = read_partitions(data / "partitions.pkl")
    kept = [i for i, name in enumerate(partitions.test_im_names) if name[9:13] == "0001"]
    names, marks = ([values[i] for i in kept] for values in (partitions.test_im_names, partitions.test_marks))
    edit_partitions(data, test_im_names=names, test_marks=marks)


def no_match(data):
    partitions = read_partitions(data / "partitions.pkl")
    queried = {n[:8] for n, mark in zip(partitions.test_im_names, partitions.test_marks, strict=True) if mark == 0}
    person = sorted(queried)[0]
    pairs = zip(partitions.test_im_names, partitions.test_marks, strict=True)
    kept = [(name, mark) for name, mark in pairs if (mark == 0) == (name[:8] == person) and mark != 2]
    edit_partitions(data, test_im_names=[name for name, _ in kept], test_marks=[mark for _, mark in kept])


def hostile(data):
    (data / "partitions.pkl").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")


DAMAGES = {
    "not there": (shutil.rmtree, ("does not exist",)),
    "raw Market-1501": (raw_market, ("original Market-1501", "script/prepare_market1501.py --source")),
    "no partitions": (lambda data: (data / "partitions.pkl").unlink(), ("has no partitions.pkl",)),
    "cut-off partitions": (lambda data: cut(data / "partitions.pkl"), ("partitions.pkl",)),
    "hostile partitions": (hostile, ("partitions.pkl",)),
    "missing image": (lambda data: first_image(data).unlink(), (".jpg is missing",)),
    "empty image": (lambda data: first_image(data).write_bytes(b""), (".jpg is empty",)),
    "cut-off image": (lambda data: cut(first_image(data)), (".jpg is cut off",)),
    "name that does not parse": (
        lambda data: edit_partitions(data, test_im_names=["me.jpg"], test_marks=[0]),
        ("me.jpg",),
    ),
    "one camera": (one_camera, ("all test images come from one camera",)),
    "no match": (no_match, ("no query has a match",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_is_one_line_and_writes_nothing(command, own_data, tiny_flags, tmp_path, monkeypatch, damage):
    spoil, reasons = DAMAGES[damage]
    spoil(own_data)
    monkeypatch.chdir(tmp_path)
    done = command("train.py", f"--data_path={own_data}", *tiny_flags[1:], f"--exp_dir={tmp_path / 'run'}")
    assert_refused(done, *reasons)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"), [({"lr": 0.1}, "no model weights"), ({"weight": torch.zeros(3)}, "ResNet-50")]
)
@pytest.mark.parametrize("flag", ["--model_weight_file", "--pretrained"])
def test_a_file_without_weights_is_refused(command, tiny_flags, tmp_path, small_trunk, content, reason, flag):
    torch.save(content, tmp_path / "weights.pth")
    flags = (f"{flag}={tmp_path / 'weights.pth'}", f"--exp_dir={tmp_path / 'run'}")
    assert_refused(command("train.py", *tiny_flags, *flags), reason)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_refused(command, tiny_flags, tmp_path, small_trunk):
    state = AlignedReID(8, pretrained="none").state_dict()
    state["base.conv1.weight"] = torch.zeros(16, 3, 7, 7)
    torch.save(state, tmp_path / "weights.pth")
    flags = (f"--model_weight_file={tmp_path / 'weights.pth'}", "--only_test=true", f"--exp_dir={tmp_path / 'run'}")
    assert_refused(command("train.py", *tiny_flags, *flags), "base.conv1.weight has shape (16, 3, 7, 7)")


def test_a_refused_resume_keeps_the_settings_of_the_run(command, tiny_flags, tmp_path, small_trunk):
    folder = tmp_path / "run"
    flags = (*tiny_flags, "--seed=3", f"--exp_dir={folder}")
    assert command("train.py", *flags, "--total_epochs=1").status == 0
    before = (folder / "config.json").read_text()
    refused = command("train.py", *flags, "--total_epochs=2", "--resume=true", "--num_models=2", "-gdmlw=1")
    assert_refused(refused, "num_models: 1 -> 2")
    assert (folder / "config.json").read_text() == before
    assert command("train.py", *flags, "--total_epochs=2", "--resume=true").status == 0
    assert json.loads((folder / "config.json").read_text())["total_epochs"] == 2


def test_resume_refuses_bare_weights(command, tiny_flags, tmp_path, small_trunk):
    torch.save(AlignedReID(8, pretrained="none").state_dict(), tmp_path / "ckpt.pth")
    done = command("train.py", *tiny_flags, "--resume=true", f"--exp_dir={tmp_path}")
    assert_refused(done, "--model_weight_file")


def test_a_folder_that_cannot_be_written_is_refused(command, tiny_flags, tmp_path):
    assert_refused(command("train.py", *tiny_flags, "--exp_dir=/proc/run"), "--exp_dir /proc/run", "cannot be written")
    (tmp_path / "file").touch()
    assert_refused(command("train.py", *tiny_flags, f"--exp_dir={tmp_path / 'file' / 'run'}"), "is a file")


def test_a_loss_that_is_not_finite_has_status_1(command, tiny_flags, tmp_path, small_trunk):
    state = AlignedReID(12, pretrained="none").state_dict()
    state["base.conv2.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "weights.pth")
    flags = (f"--model_weight_file={tmp_path / 'weights.pth'}", f"--exp_dir={tmp_path / 'run'}", "-idlw=1")
    done = command("train.py", *tiny_flags, *flags)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "nan at step 1 of epoch 1" in done.err
    assert ".jpg" in done.err
    assert not (tmp_path / "run" / "ckpt.pth").exists()


def test_help_lists_the_common_flags_or_all(command):
    plain, all_flags = command("train.py", "--help"), command("train.py", "--help", "all")
    assert plain.status == all_flags.status == 0
    assert "--total_epochs" in plain.out
    assert "--deterministic" not in plain.out
    assert all(f"--{name}" in all_flags.out for name in Config().to_dict())


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
    write_photo_table(own_data)
    files = {"extract": "a.h5", "evaluate": "a.json", "export": "a.onnx"}
    with hold(place / files.get(name, ""), "--exp_dir"):
        before = {path.name: path.stat().st_mtime_ns for path in place.iterdir() if path.is_file()}
        flag = {"prepare": "--save_dir", "draw": "--save_dir"} | dict.fromkeys(files, "--save_file")
        assert_refused(
            command(*commands_at(place, own_data)[name]), flag.get(name, "--exp_dir"), f"process {os.getpid()}"
        )
        assert {path.name: path.stat().st_mtime_ns for path in place.iterdir() if path.is_file()} == before


def write_photo_table(data):
    """The images of a data set as somebody's photos."""
    rows = [f"images/{name},{name[:8]},{name[9:13]}" for name in sorted(os.listdir(data / "images"))]
    (data / "photos.csv").write_text("\n".join(["path,person,camera", *rows]) + "\n")


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "script").glob("*.py")])
def test_a_tilde_is_never_a_folder(command, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    names = r"[a-z_]*(?:path|dir|folder)|(?:save|model_weight|partition)_file|source|features|gallery|pretrained"
    flags = re.findall(rf"^ +(--(?:{names})) ", command(script, "--help").out, re.MULTILINE)
    assert flags
    for flag in flags:
        assert_refused(command(script, f"{flag}=~nosuchuser/x"), "~nosuchuser", flag)
    assert os.listdir(tmp_path) == []


def test_a_run_in_the_home_folder(command, tiny_data, tmp_path, small_trunk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    shutil.copytree(tiny_data, tmp_path / "home" / "data")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = command("train.py", "--data_path=~/data", *TINY, "--total_epochs=1", "--exp_dir=~/runs/a")
    assert done.status == 0, done.err
    done = command(
        "train.py", "--data_path=~/data", *TINY, "--only_test=true", "--exp_dir=~/runs/a", "--pretrained=~/none"
    )
    assert done.status == 0, done.err
    assert os.listdir(tmp_path) == ["home"] and (tmp_path / "home" / "runs" / "a" / "ckpt.pth").is_file()
