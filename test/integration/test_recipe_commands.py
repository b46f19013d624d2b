"""Recipes and several models through script/train.py, as a user runs them."""

import json

import pytest

STRONG = ("--recipe=strong", "--last_stride=2")  # the small trunk has no last stage


@pytest.fixture
def train(command, tiny_flags, small_trunk):
    def run(folder, *flags):
        return command("train.py", *tiny_flags, "--total_epochs=1", "--seed=3", f"--exp_dir={folder}", *flags)

    return run


def score_lines(text):
    return [line for line in text.splitlines() if line.startswith("[mAP")]


def test_a_strong_run_is_tested_again_as_it_was_trained(command, train, tiny_data, tmp_path):
    folder = tmp_path / "run"
    done = train(folder, *STRONG, "--pooling=gem", "--test_distance=cosine")
    assert done.status == 0, done.err
    (said,) = [line for line in done.out.splitlines() if line.startswith("recipe strong")]
    assert "bnneck: False -> True" in said
    assert "lr_decay_type: exp -> cosine" in said
    again = command(
        "train.py",
        f"--data_path={tiny_data}",
        "--only_test=true",
        f"--model_weight_file={folder}",
        "--workers=0",
        f"--exp_dir={tmp_path / 'again'}",
    )
    assert again.status == 0, again.err
    (said,) = [line for line in again.out.splitlines() if line.startswith("as the weights were trained: ")]
    assert "--resize_h_w=64,32" in said
    assert "--test_distance=cosine" in said
    assert "--flip_test=true" in said
    assert score_lines(again.out) == score_lines(done.out)


@pytest.mark.parametrize("flag", ["--flip_test=false", "--test_distance=cosine", "--feature_after_bn=true"])
def test_flags_of_the_test_change_its_features(command, train, tiny_data, tmp_path, flag):
    folder = tmp_path / "run"
    assert train(folder, *STRONG).status == 0
    written = []
    for number, flags in enumerate([(), (flag,)]):
        done = command(
            "extract.py",
            f"--data_path={tiny_data}",
            f"--model_weight_file={folder}",
            "--workers=0",
            f"--save_file={tmp_path / f'{number}.h5'}",
            *flags,
        )
        assert done.status == 0, done.err
        evaluated = command("evaluate.py", f"--features={tmp_path / f'{number}.h5'}")
        assert evaluated.status == 0, evaluated.err
        written.append((tmp_path / f"{number}.results.json").read_text())
    assert written[0] != written[1]


def test_each_of_two_models_is_evaluated_and_saved(train, tmp_path):
    folder = tmp_path / "run"
    done = train(folder, "--num_models=2", "-gdmlw", "1", "-idlw", "1", "-pmlw", "1")
    assert done.status == 0, done.err
    assert done.out.index("Model 2 of 2") < done.out.index("Model 1 of 2")
    results = json.loads((folder / "results.json").read_text())
    assert len(results["models"]) == 2
    assert results["global"] == results["models"][0]["global"]
    assert results["models"][0]["global"] != results["models"][1]["global"]


def test_models_that_start_alike_are_noticed(train, tmp_path):
    assert train(tmp_path / "first").status == 0
    mutual = ("--num_models=2", "-gdmlw", "1", f"--pretrained={tmp_path / 'first' / 'model.safetensors'}")
    alike = train(tmp_path / "alike", *mutual)
    assert "stay equal" in alike.out
    results = json.loads((tmp_path / "alike" / "results.json").read_text())
    assert results["models"][0]["global"] == results["models"][1]["global"]
    assert "stay equal" not in train(tmp_path / "apart", *mutual, "-idlw", "1").out


def test_several_devices_are_refused_on_a_cpu_before_anything_is_renamed(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pth").write_bytes(b"an earlier run's")
    done = train(tmp_path / "run", "--num_models=2", "--npu=0,1", "-gdmlw", "1", "--device=cpu")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ckpt.pth"]
    assert done.status == 2
    assert "--npu" in done.err and done.err.count("\n") == 1
