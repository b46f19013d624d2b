"""Flags: parsed, never evaluated; one line and status 2 for a mistake."""

import json
import re

import pytest

from aligned_reid import InputError
from aligned_reid.config import OPTIONS, WITHOUT_EFFECT, Config, flags_of, make_parser, markdown_table


def parse(text):
    return Config.from_arguments(text.split(" ") if text else [])


def refused(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(text)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_defaults_are_the_references_recipe():
    config = parse("")
    assert (config.ids_per_batch, config.ims_per_id, config.base_lr) == (32, 4, 2e-4)
    assert (config.total_epochs, config.lr_decay_type, config.exp_decay_at_epoch) == (300, "exp", 151)
    assert config.loss_weights == (1.0, 0.0, 0.0)
    assert (config.normalize_feature, config.local_dist_own_hard_sample, config.train_final_batch) == (False,) * 3
    assert (config.global_margin, config.local_margin, config.seed, config.resize_h_w) == (0.3, 0.3, None, (256, 128))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("--data_pth=/d", "data_path", "/d"),
        ("--pkl p.pkl", "partition_file", "p.pkl"),
        ("--resize_h_w 256,128", "resize_h_w", (256, 128)),
        ("--resize_h_w=(128,64)", "resize_h_w", (128, 64)),
        ("--staircase_decay_at_epochs 11,21,31", "staircase_decay_at_epochs", (11, 21, 31)),
        ("-gm none", "global_margin", None),
        ("--local_margin 0.5", "local_margin", 0.5),
        ("-glw 0.5", "g_loss_weight", 0.5),
        ("-llw 1", "l_loss_weight", 1.0),
        ("-idlw 2", "id_loss_weight", 2.0),
        ("--train_final_batch TRUE", "train_final_batch", True),
        ("--resume false", "resume", False),
        ("--set_seed true", "seed", 1),
        ("--set_seed true --seed 5", "seed", 5),
        ("--loss_scale dynamic", "loss_scale", None),
        ("--loss_scale 1024", "loss_scale", 1024.0),
        ("--npu 3", "npu", 3),
        ("-r 2", "run", 2),
        ("--use_local_distance true", "use_local_distance", True),
        ("--use_local_distance auto", "use_local_distance", None),
    ],
)
def test_flags(text, name, value):
    assert getattr(parse(text), name) == value


def test_a_tuple_may_have_blanks():
    assert Config.from_arguments(["--resize_h_w", "(256, 128)"]).resize_h_w == (256, 128)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--total_epoch=3", "did you mean --total_epochs?"),
        ("--resume yes", "neither true nor false"),
        ("--resume 1", "neither true nor false"),
        ("--resize_h_w __import__('os').system('true')", "not a list of whole numbers"),
        ("--resize_h_w 256", "not height,width"),
        ("--resize_h_w 16,16", "at least 32,32"),
        ("--ids_per_batch 1", "an anchor needs a negative"),
        ("--ims_per_id 1", "an anchor needs a positive"),
        ("--ids_per_batch many", "is not a whole number"),
        ("--lr_decay_type linear", "invalid choice"),
        ("--loss_scale -3", "neither a positive number nor dynamic"),
        ("-gm wide", "neither a number nor none"),
        ("-glw 0", "has to be above 0"),
        ("-llw -1", "0 or more"),
        ("--crop_prob 1.5", "a probability"),
        ("--crop_ratio 0", "above 0"),
        ("--staircase_decay_multiply_factor -1", "above 0"),
        ("--staircase_decay_at_epochs 0,5", "1 or more"),
        ("-lm -1", "0 or more"),
        ("--freeze_trunk_epochs 1", "there is no head to train"),
        ("--freeze_stages 4", "0 to 3: of 4 the last one learns"),
        ("--freeze_stages 1 --freeze_stages_from 0", "an epoch, 1 or more"),
        ("--timeout 99999999999", "from 1 to 31536000"),
        ("--seed -1", "whole number from 0"),
        ("--timeout 0", "from 1 to 31536000"),
        ("--eval_every -1", "0 or more"),
        ("--npu -1", "device index"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_mistakes_are_one_line(text, reason, capsys):
    assert reason in refused(text, capsys)


def test_config_survives_json_and_shows_differences():
    config = parse("--seed 1 --resize_h_w 128,64")
    stored = json.loads(json.dumps(config.to_dict()))
    assert config.differences(stored) == []
    assert parse("--seed 1 --resize_h_w 128,64 --base_lr 1e-3").differences(stored) == ["base_lr: 0.0002 -> 0.001"]


def test_the_command_line_can_be_had_back():
    for text in ("", "-gm none --loss_scale dynamic --npu 1 --seed 4 --use_local_distance true --resize_h_w 128,64"):
        config = parse(text)
        assert Config.from_arguments(config.to_flags()) == config


def test_run_folder_tells_the_settings_apart():
    assert str(parse("--exp_dir=here").run_dir) == "here"
    plain, local = parse("").run_dir, parse("-llw 1 --lr_decay_type staircase -r 2").run_dir
    assert plain.parts[:3] == ("exp", "train", "market1501")
    assert plain.name == "run1"
    assert local.name == "run2"
    assert "llw_1" in str(local)
    assert "staircase_decay_at_101_201_factor_0.1" in str(local)


def test_checked_raises_for_library_callers():
    with pytest.raises(InputError, match="ids_per_batch"):
        Config(ids_per_batch=0).checked()


def test_every_field_is_a_flag_in_help_and_table():
    text, table = make_parser().format_help(), markdown_table()
    for field in OPTIONS:
        for flag in flags_of(field):
            assert flag in text
            assert f"`{flag}`" in table


def test_what_has_no_effect_on_a_resumed_training_is_named():
    names = {one.name for one in OPTIONS}
    assert names >= WITHOUT_EFFECT
    before = Config(base_lr=0.1, workers=1, resume=True).to_dict()
    assert Config().differences_by_effect(before) == (["base_lr: 0.1 -> 0.0002"], ["workers: 1 -> 4"])


NUMBERS = [one.name for one in OPTIONS if one.type in ("int", "int | None", "float", "float | None")]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e30", "1" + 30 * "0", "-1e30"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_with_the_bound(name, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        Config.from_arguments([f"--{name}={value}"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err.replace(value, "")
    assert re.search(r"\d|not a whole number|neither a positive number", message), message
