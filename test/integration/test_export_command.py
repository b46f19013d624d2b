"""script/export.py as a user runs it."""

import json
import re

import h5py
import pytest
import torch
from conftest import assert_done, assert_refused, score_lines

from aligned_reid.export import OnnxFeatures
from aligned_reid.weights import read_weight_file


def mean_aps_in(output):
    """mAP in percent by title."""
    found = re.findall(r"^(.*distance.*)\n\[mAP: *([0-9.]+)%\]", output, flags=re.MULTILINE)
    return {title: float(score) for title, score in found}


@pytest.mark.parametrize("features", ["global", "global_local"])
def test_the_graph_has_the_models_scores(command, tiny_data, trained, tmp_path, features):
    graph = tmp_path / "model.onnx"
    flags = (f"--model_weight_file={trained}", f"--save_file={graph}", f"--features={features}")
    done = assert_done(command("export.py", *flags, f"--data_path={tiny_data}", "--workers=0"))
    assert f"{graph} (" in done.out
    assert "opset 17, images uint8 [N, 64, 32, 3] -> global_feat float32 [N, 2048]" in done.out
    trained_scores = score_lines((trained / "log.txt").read_text())
    assert score_lines(done.out) == (trained_scores if features == "global_local" else trained_scores[-4:])


def test_safetensors_hold_what_export_and_extract_need(command, train, tiny_flags, tmp_path):
    folder, graph = tmp_path / "run", f"--save_file={tmp_path / 'model.onnx'}"
    train("--normalize_feature=true", "--flip_test=true")
    weights = folder / "model.safetensors"
    done = assert_done(command("export.py", f"--model_weight_file={weights}", graph))
    assert "images uint8 [N, 64, 32, 3]" in done.out  # the size is in the file's settings
    metadata = OnnxFeatures(tmp_path / "model.onnx").session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["config"])["normalize_feature"] is True
    assert json.loads(metadata["verification"]) == read_weight_file(weights)["verification"]
    assert "--flip_test" in done.out  # left to the caller
    features = [tmp_path / "from_safetensors.h5", tmp_path / "from_checkpoint.h5"]
    for source, target in zip((weights, folder), features, strict=True):
        assert_done(command("extract.py", *tiny_flags, f"--model_weight_file={source}", f"--save_file={target}"))
    with h5py.File(features[0]) as first, h5py.File(features[1]) as second:
        assert (first["global"][:] == second["global"][:]).all()
        assert first.attrs.keys() == second.attrs.keys()
    weights.write_bytes(weights.read_bytes()[:-1])
    for name, *flags in (
        ("export.py", graph),
        ("extract.py", *tiny_flags, f"--save_file={tmp_path / 'new.h5'}"),
        ("train.py", *tiny_flags, "--only_test=true"),
    ):
        assert_refused(command(name, *flags, f"--model_weight_file={weights}"), f"{weights} is a damaged")


@pytest.mark.slow
def test_a_whole_resnet50(command, tiny_data, tiny_flags, tmp_path):
    flags = ("--total_epochs=1", "--seed=1", "-llw=1", "--amp=O0", f"--exp_dir={tmp_path}")
    trained = mean_aps_in(command("train.py", *tiny_flags, *flags).out)
    assert len(trained) == 6
    for opset in (13, 18):
        graph = (f"--save_file={tmp_path}/model.onnx", f"--opset={opset}", "--features=global_local")
        done = assert_done(command("export.py", f"--model_weight_file={tmp_path}", *graph, f"--data_path={tiny_data}"))
        # Random weights of this depth leave images nearly as far from each other: rounding may swap them.
        assert mean_aps_in(done.out) == pytest.approx(trained, abs=1)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--model_weight_file={}/none.pth",), "no weight file"),
        ((), "conv1.weight"),
        (("--opset=12",), "13 to 18"),
        (("--resize_h_w=0,64",), "height,width"),
        (("--to=om",), "'om'"),
        (("--batch_size=0",), "--batch_size"),
        (("--resize_h_w=0,0",), "--resize_h_w"),
        (("--save_file={}",), "is a folder"),
        (("--save_file={}/none/model.onnx",), "does not exist"),
        (("--save_file={}/weights.pth",), ".onnx"),
        (("--data_path=/none",), "/none"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, small_trunk, flags, word):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    usual = ("--model_weight_file={}/weights.pth", "--save_file={}/model.onnx")
    assert_refused(command("export.py", *(flag.format(tmp_path) for flag in (*usual, *flags))), word)
    assert not (tmp_path / "model.onnx").exists()


def test_required_flags_are_named(command):
    assert_refused(command("export.py"), "--model_weight_file, --save_file")
