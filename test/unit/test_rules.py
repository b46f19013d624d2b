"""Rules of the settings: each is broken by some settings, and by no recipe."""

import pytest

from aligned_reid.config import Config
from aligned_reid.recipes import RECIPES
from aligned_reid.rules import batch_rules, broken_rule, data_rules, loss_rules, run_rules, schedule_rules

BREAKS = {
    data_rules: [
        {"dataset": "a+a"},
        {"dataset": "a+"},
        {"dataset": "a+b", "partition_file": "x.pkl"},
        {"resize_h_w": (31, 64)},
        {"crop_prob": 1.5},
        {"crop_ratio": 0.0},
        {"pad_crop": 128},
        {"erase_prob": -0.1},
        {"workers": -1},
        {"max_bad_images": -1},
    ],
    batch_rules: [{"ids_per_batch": 1}, {"ims_per_id": 1}, {"accumulate": 0}, {"last_stride": 3}],
    loss_rules: [
        {"center_loss_weight": -1.0},
        {"g_loss_weight": 0.0},
        {"local_margin": -1.0},
        {"label_smoothing": 1.0},
        {"num_models": 0},
        {"gdm_loss_weight": 1.0},
        {"models_apart": True},
        {"num_models": 2, "models_apart": True, "sync_bn": True},
        {"num_models": 2, "pm_loss_weight": 1.0},
        {"num_models": 2, "ldm_loss_weight": 1.0},
    ],
    schedule_rules: [
        {"total_epochs": 0},
        {"base_lr": 0.0},
        {"weight_decay": -1.0},
        {"warmup_epochs": -1},
        {"exp_decay_at_epoch": 0},
        {"staircase_decay_at_epochs": (0, 5)},
        {"staircase_decay_multiply_factor": 0.0},
        {"freeze_trunk_epochs": -1},
        {"freeze_trunk_epochs": 1},
        {"freeze_stages": 4},
        {"freeze_stages_from": 0},
        {"ema_decay": 1.0},
    ],
    run_rules: [
        {"feature_after_bn": True},
        {"eval_every": -1},
        {"npu": -1},
        {"amp": "O0", "amp_backend": "apex"},
        {"amp_backend": "apex", "accumulate": 2},
        {"timeout": 0},
        {"run": 0},
        {"checkpoint_every_steps": -1},
        {"repeat": 0},
        {"repeat": 2, "only_test": True},
        {"seed": 2**31},
        {"profile": -1},
    ],
}


@pytest.mark.parametrize("rules", BREAKS, ids=lambda rules: rules.__name__)
def test_settings_that_break_a_rule_are_told_so(rules):
    of_defaults = rules(Config())
    assert len(of_defaults) == len(BREAKS[rules])
    for number, settings in enumerate(BREAKS[rules]):
        config = Config(**settings)
        holds, line = rules(config)[number]
        assert not holds, line
        assert broken_rule(config) == line


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_break_none(recipe):
    assert broken_rule(Config.of(recipe=recipe)) == ""
