"""The registry of options: values from the command line, rules, and what derives from the registry."""

import json
import re
import shlex

import pytest
from conftest import ROOT, assert_done, assert_refused, refusal

from aligned_reid.config import OPTIONS, REMOVED, Config, names_affecting
from aligned_reid.flags import ARCHITECTURE, TEST, TRAINING, flags_of, flags_page
from aligned_reid.recipes import RECIPES


def parse(text=""):
    return Config.from_arguments(shlex.split(text))


@pytest.fixture
def refused(finish):
    """The one line that a mistake prints."""

    def parse_mistake(text):
        done = finish(Config.from_arguments, "train.py", *shlex.split(text))
        assert_refused(done)
        assert done.out == ""
        return done.err

    return parse_mistake


def test_the_flags_are_at_most_seventy_and_listed_in_the_docs():
    assert len(OPTIONS) <= 70
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags_page(OPTIONS)


def test_defaults_are_the_reference_recipe():
    config = parse()
    assert (config.ids_per_batch, config.ims_per_id, config.base_lr) == (32, 4, 2e-4)
    assert (config.total_epochs, config.lr_decay_type, config.exp_decay_at_epoch) == (300, "exp", 151)
    assert (config.g_loss_weight, config.l_loss_weight, config.id_loss_weight) == (1.0, 0.0, 0.0)
    assert (config.normalize_feature, config.local_dist_own_hard_sample, config.train_final_batch) == (False,) * 3
    assert (config.global_margin, config.local_margin, config.seed, config.resize_h_w) == (0.3, 0.3, None, (256, 128))


VALUES = {
    "--data_pth=/d --pkl p.pkl -r 2": {"data_path": "/d", "partition_file": "p.pkl", "run": 2},
    "--resize_h_w 256,128 --npu 3": {"resize_h_w": (256, 128), "npu": (3,)},
    "--resize_h_w=(128,64) --npu 0,1 --num_models 2": {"resize_h_w": (128, 64), "npu": (0, 1)},
    "--resize_h_w '(256, 128)' --staircase_decay_at_epochs 11,21": {"staircase_decay_at_epochs": (11, 21)},
    "-gm none --local_margin 0.5 -glw 0.5": {"global_margin": None, "local_margin": 0.5, "g_loss_weight": 0.5},
    "--train_final_batch TRUE --set_seed true --seed 5": {"train_final_batch": True, "seed": 5},
    "--loss_scale dynamic --use_local_distance true": {"loss_scale": None, "use_local_distance": True},
    "--loss_scale 1024 --use_local_distance auto": {"loss_scale": 1024.0, "use_local_distance": None},
    "--set_seed true": {"seed": 1},
}


@pytest.mark.parametrize("text", VALUES)
def test_flags_give_values(text):
    config = parse(text)
    assert {name: getattr(config, name) for name in VALUES[text]} == VALUES[text]


@pytest.mark.parametrize(
    ("text", "key_word"),
    [
        ("--total_epoch=3", "--total_epochs"),
        ("--resume yes", "true"),
        ("--resize_h_w __import__('os').system('true')", "whole numbers"),
        ("--resize_h_w 256", "height,width"),
        ("--resize_h_w 16,16", "32 or more"),
        ("--resize_h_w 256000,128", "at most"),
        ("--ids_per_batch 1", "2 or more"),
        ("--ids_per_batch many", "whole number"),
        ("--lr_decay_type linear", "staircase"),
        ("--loss_scale -3", "above 0"),
        ("--loss_scale large", "number"),
        ("-gm wide", "number"),
        ("-lm -1", "0 or more"),
        ("-glw 0", "-idlw"),
        ("--pad_crop 128", "--pad_crop"),
        ("--crop_prob 1.5", "at most 1"),
        ("--crop_ratio 0", "above 0"),
        ("--label_smoothing 1", "at most 0.999"),
        ("--last_stride 3", "at most 2"),
        ("--staircase_decay_at_epochs 0,5", "1 or more"),
        ("--base_lr 0", "above 0"),
        ("--timeout 99999999999", "31536000"),
        ("--npu -1", "0 or more"),
        ("--npu 0,1", "--num_models"),
        ("-gdmlw 1", "--num_models"),
        ("--num_models 2 -pmlw 1", "-idlw"),
        ("--num_models 2 -ldmlw 1", "-llw"),
        ("--feature_after_bn true", "--bnneck"),
        ("--amp apex --accumulate 2", "--amp O1"),
        ("--dataset a+b", "prepare_joined.py"),
        ("stray", "stray"),
        ("''", "unrecognized"),
        *((f"--{name}=1", "was removed") for name in REMOVED),
    ],
)
def test_mistakes_are_one_line(text, key_word, refused):
    assert key_word in refused(text)


NUMBERS = [one.name for one in OPTIONS if one.type in ("int", "int | None", "float", "float | None")]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_with_the_bound(name, refused):
    assert name in refusal(Config(**{name: float("nan")}).checked)  # for callers of the library
    for value in ("nan", "inf", "-inf", "1e30", "1" + 30 * "0", "-1e30"):
        message = refused(f"--{name}={value}").replace(value, "")
        assert any(character.isdigit() for character in message) or "number" in message


def test_settings_survive_json_and_show_differences():
    config = parse("--seed 1 --resize_h_w 128,64")
    stored = json.loads(json.dumps(config.to_dict()))
    assert config.differences(stored) == []
    assert parse("--seed 1 --resize_h_w 128,64 --base_lr 1e-3").differences(stored) == ["base_lr: 0.0002 -> 0.001"]
    earlier = Config(base_lr=0.1, workers=1, resume=True, flip_test=True).to_dict()
    assert Config().differences(earlier, TRAINING) == ["base_lr: 0.1 -> 0.0002"]


FLAGS_GIVEN = "-gm none --loss_scale dynamic --npu 1 --seed 4 --use_local_distance true --resize_h_w 128,64"


@pytest.mark.parametrize("text", ["", FLAGS_GIVEN, "--recipe=strong --total_epochs=7", "--base_lr=0.000123456789"])
def test_settings_written_as_flags_give_the_same_settings(text):
    config = parse(text)
    assert Config.from_arguments(config.to_flags()) == config


def test_the_default_run_folder_is_named_after_the_settings():
    assert str(parse("--exp_dir=here").run_dir) == "here"
    assert parse().run_dir.as_posix() == (
        "exp/train/market1501/not_nf_not_ohs_gm_0.3_lm_0.3_glw_1_llw_0_idlw_0_lr_0.0002_exp_decay_at_151_total_300/run1"
    )
    local = parse("-llw 1 --lr_decay_type staircase -r 2").run_dir
    assert local.name == "run2"
    assert "llw_1_" in str(local) and "staircase_decay_at_101_201_factor_0.1" in str(local)


def test_options_are_grouped_by_what_they_affect():
    assert names_affecting(ARCHITECTURE) == ["last_stride", "pooling", "bnneck", "feature_after_bn"]
    assert {"resize_h_w", "normalize_feature", "test_distance", "flip_test"} < {*names_affecting(TEST)}


def test_help_is_a_screen_and_help_all_lists_every_flag(finish):
    common = assert_done(finish(Config.from_arguments, "train.py", "--help")).out
    everything = assert_done(finish(Config.from_arguments, "train.py", "--help", "all")).out
    assert "--base_lr" in common and "--help all" in common and "--crop_ratio" not in common
    assert len(common.splitlines()) < 70
    assert all(flag in everything for one in OPTIONS for flag in flags_of(one))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_settings(name):
    config = Config.of(recipe=name).checked()
    assert {option: getattr(config, option) for option in RECIPES[name]} == RECIPES[name]


def test_flags_override_the_recipe():
    config = parse("--base_lr=1e-3 --recipe=strong --bnneck=true -idlw 0.5")
    assert (config.base_lr, config.id_loss_weight) == (1e-3, 0.5)
    assert config.label_smoothing == RECIPES["strong"]["label_smoothing"]
    assert config.given == {"base_lr", "recipe", "bnneck", "id_loss_weight"}


def test_the_ascend_recipe_is_what_the_wrappers_set():
    wrappers = (ROOT / "test" / "common.sh").read_text() + (ROOT / "test" / "train_full_8p.sh").read_text()
    for name, value in RECIPES["ascend"].items():
        (written,) = re.findall(rf"--{name}=(\S+?)[ )\n]", wrappers)
        assert getattr(parse(f"--{name}={written}"), name) == value


def test_the_data_set_is_named_by_the_flag_or_the_folder(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    (tmp_path / "photos").symlink_to(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    assert Config.of(data_path="photos/").dataset_name == "photos"
    assert Config.of(data_path="photos", dataset="office").dataset_name == "office"
