"""Recipes and several models through script/train.py, as a user runs them."""

import json

import h5py
from conftest import assert_refused, score_lines

STRONG = ("--recipe=strong", "--last_stride=2")  # the small trunk has no last stage


def test_a_strong_run_is_tested_again_as_it_was_trained(command, train, tiny_data, tmp_path):
    done = train(*STRONG, "--pooling=gem", "--test_distance=cosine")
    (said,) = [line for line in done.out.splitlines() if line.startswith("recipe strong")]
    assert "bnneck: False -> True" in said
    assert "lr_decay_type: exp -> cosine" in said
    flags = ("--only_test=true", f"--model_weight_file={tmp_path / 'run'}", f"--exp_dir={tmp_path / 'again'}")
    again = command("train.py", f"--data_path={tiny_data}", "--workers=0", *flags)
    assert again.status == 0, again.err
    (said,) = [line for line in again.out.splitlines() if line.startswith("as the weights were trained: ")]
    assert all(flag in said for flag in ("--resize_h_w=64,32", "--test_distance=cosine", "--flip_test=true"))
    assert score_lines(again.out) == score_lines(done.out)


def test_flags_of_the_test_change_its_features_or_scores(command, train, tiny_data, tmp_path):
    train(*STRONG)
    found = []
    for flag in ("--workers=0", "--flip_test=false", "--test_distance=cosine", "--feature_after_bn=true"):
        weights = (f"--data_path={tiny_data}", f"--model_weight_file={tmp_path / 'run'}", "--workers=0")
        done = command("extract.py", *weights, f"--save_file={tmp_path / 'a.h5'}", flag)
        assert done.status == 0, done.err
        evaluated = command("evaluate.py", f"--features={tmp_path / 'a.h5'}")
        assert evaluated.status == 0, evaluated.err
        with h5py.File(tmp_path / "a.h5") as file:
            found.append((file["global"][()].tobytes(), score_lines(evaluated.out)))
    assert found[0] not in found[1:]


def test_each_of_two_models_is_evaluated_and_saved(train, tmp_path):
    done = train("--num_models=2", "-gdmlw", "1", "-idlw", "1", "-pmlw", "1")
    assert done.out.index("Model 2 of 2") < done.out.index("Model 1 of 2")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["models"]) == 2
    assert results["global"] == results["models"][0]["global"]
    assert results["models"][0]["global"] != results["models"][1]["global"]


def test_models_that_start_alike_are_noticed(train, tmp_path):
    train(folder="first")
    mutual = ("--num_models=2", "-gdmlw", "1", f"--pretrained={tmp_path / 'first' / 'model.safetensors'}")
    assert "stay equal" in train(*mutual, folder="alike").out
    results = json.loads((tmp_path / "alike" / "results.json").read_text())
    assert results["models"][0]["global"] == results["models"][1]["global"]
    assert "stay equal" not in train(*mutual, "-idlw", "1", folder="apart").out


def test_several_devices_are_refused_on_a_cpu_before_anything_is_renamed(train, tmp_path):
    (tmp_path / "ckpt.pth").write_bytes(b"an earlier run's")
    assert_refused(train("--num_models=2", "--npu=0,1", "-gdmlw", "1", folder="", status=2), "--npu")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pth"]
