"""script/export.py as a user runs it."""

import json
import re

import h5py
import pytest
import torch
from conftest import run_script

from aligned_reid.export import OnnxFeatures
from aligned_reid.weights import read_weight_file


@pytest.fixture
def trained(command, tiny_flags, tmp_path, small_trunk):
    """The folder of a short run, in the graph's precision on every CPU."""
    folder = tmp_path / "run"
    flags = (*tiny_flags, "--total_epochs=1", "--seed=1", "-llw=1", "--amp=O0")
    done = command("train.py", *flags, f"--exp_dir={folder}")
    assert done.status == 0, done.err
    return folder


def scores_in(output):
    return [line for line in output.splitlines() if "cmc1" in line or "Market-1501 benchmark" in line]


def mean_aps_in(output):
    """mAP in percent by title."""
    found = re.findall(r"^(.*distance.*)\n\[mAP: *([0-9.]+)%\]", output, flags=re.MULTILINE)
    return {title: float(score) for title, score in found}


@pytest.mark.parametrize("features", ["global", "global_local"])
def test_the_graph_has_the_models_scores(command, tiny_data, trained, tmp_path, features):
    graph = tmp_path / "model.onnx"
    flags = (f"--model_weight_file={trained}", f"--save_file={graph}", f"--features={features}")
    done = command("export.py", *flags, f"--data_path={tiny_data}", "--workers=0")
    assert (done.status, done.err) == (0, "")
    assert f"{graph} (" in done.out
    assert "opset 17, images uint8 [N, 64, 32, 3] -> global_feat float32 [N, 2048]" in done.out
    trained_scores = scores_in((trained / "log.txt").read_text())
    assert scores_in(done.out) == (trained_scores if features == "global_local" else trained_scores[-4:])


def test_safetensors_hold_what_export_needs(command, tiny_flags, tmp_path, small_trunk):
    flags = (*tiny_flags, "--total_epochs=1", "--normalize_feature=true", f"--exp_dir={tmp_path / 'run'}")
    assert command("train.py", *flags).status == 0
    weights, graph = tmp_path / "run" / "model.safetensors", tmp_path / "model.onnx"
    done = command("export.py", f"--model_weight_file={weights}", f"--save_file={graph}")
    assert (done.status, done.err) == (0, "")
    assert "images uint8 [N, 64, 32, 3]" in done.out  # the size is in the file's settings
    metadata = OnnxFeatures(graph).session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["config"])["normalize_feature"] is True
    assert json.loads(metadata["verification"]) == read_weight_file(weights)["verification"]
    features = [tmp_path / "from_safetensors.h5", tmp_path / "from_checkpoint.h5"]
    for source, target in zip((weights, tmp_path / "run"), features, strict=True):
        done = command("extract.py", *tiny_flags, f"--model_weight_file={source}", f"--save_file={target}")
        assert (done.status, done.err) == (0, "")
    with h5py.File(features[0]) as first, h5py.File(features[1]) as second:
        assert (first["global"][:] == second["global"][:]).all()
        assert first.attrs.keys() == second.attrs.keys()
    weights.write_bytes(weights.read_bytes()[:-1])
    for name in ("export.py", "extract.py", "train.py"):
        save = (f"--save_file={tmp_path / 'new'}",) if name != "train.py" else ("--only_test=true",)
        own = () if name == "export.py" else tiny_flags
        done = command(name, *own, f"--model_weight_file={weights}", *save)
        assert done.status == 2
        assert done.err.count("\n") == 1 and f"{weights} is a damaged or cut off" in done.err


def test_flip_test_is_left_to_the_caller(command, tiny_flags, tmp_path, small_trunk):
    flags = (*tiny_flags, "--total_epochs=1", "--flip_test=true", f"--exp_dir={tmp_path / 'run'}")
    assert command("train.py", *flags).status == 0
    done = command("export.py", f"--model_weight_file={tmp_path / 'run'}", f"--save_file={tmp_path / 'model.onnx'}")
    assert (done.status, done.err) == (0, "")
    assert "--flip_test" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, 18])
def test_a_whole_resnet50(tiny_data, tmp_path, opset):
    flags = (f"--data_path={tiny_data}", "--pretrained=none", "--resize_h_w=64,32", "--ids_per_batch=4")
    flags = (*flags, "--ims_per_id=2", "--total_epochs=1", "--seed=1", "-llw=1", "--amp=O0")
    run = run_script("train.py", *flags, f"--exp_dir={tmp_path}")
    graph = (f"--save_file={tmp_path}/model.onnx", f"--opset={opset}", "--features=global_local")
    done = run_script("export.py", f"--model_weight_file={tmp_path}", *graph, f"--data_path={tiny_data}")
    assert (done.status, done.err) == (0, "")
    assert len(mean_aps_in(run.out)) == 6
    # Random weights of this depth leave images nearly as far from each other: rounding may swap them.
    assert mean_aps_in(done.out) == pytest.approx(mean_aps_in(run.out), abs=1)


def test_mistakes_are_one_line(command, tmp_path, small_trunk):
    weights = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, weights)
    target = tmp_path / "model.onnx"
    for flags, reason in (
        ((), "required: --model_weight_file, --save_file"),
        ((f"--model_weight_file={tmp_path}/none.pth", f"--save_file={target}"), "no weight file"),
        ((f"--model_weight_file={weights}", f"--save_file={target}"), "conv1.weight"),
        ((f"--model_weight_file={weights}", f"--save_file={target}", "--opset=12"), "choose one of 13 to 18"),
        ((f"--model_weight_file={weights}", f"--save_file={target}", "--to=om"), "invalid choice: 'om'"),
        ((f"--model_weight_file={weights}", f"--save_file={target}", "--batch_size=0"), "neither a number"),
        ((f"--model_weight_file={weights}", f"--save_file={tmp_path}"), "is a folder"),
        ((f"--model_weight_file={weights}", f"--save_file={tmp_path}/none/model.onnx"), "does not exist"),
        ((f"--model_weight_file={weights}", f"--save_file={target}", "--data_path=/none"), "/none"),
    ):
        done = command("export.py", *flags)
        assert done.status == 2, flags
        assert done.err.count("\n") == 1, done.err
        assert reason in done.err
    assert not target.exists()
