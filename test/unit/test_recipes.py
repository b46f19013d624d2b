"""Recipes: real options, flags on top, the wrappers' settings."""

import re
from pathlib import Path

import pytest

from aligned_reid.config import OPTIONS, Config
from aligned_reid.recipes import RECIPES

COMMON = Path(__file__).parents[1] / "common.sh"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_options_that_differ_from_the_reference(name):
    defaults = {one.name: one.default for one in OPTIONS}
    config = Config.of(recipe=name).checked()
    for option, value in RECIPES[name].items():
        assert getattr(config, option) == value
    if name == "strong":
        unchanged = [option for option, value in RECIPES[name].items() if defaults[option] == value]
        assert unchanged == []
    assert RECIPES["reference"] == {}


def test_flags_win_over_the_recipe():
    config = Config.from_arguments(["--base_lr=1e-3", "--recipe=strong", "--bnneck=true", "-idlw", "0.5"])
    assert (config.base_lr, config.id_loss_weight) == (1e-3, 0.5)
    assert config.label_smoothing == RECIPES["strong"]["label_smoothing"]
    assert config.given == {"base_lr", "recipe", "bnneck", "id_loss_weight"}


def test_settings_written_as_flags_give_the_same_settings():
    config = Config.from_arguments(["--recipe=strong", "--total_epochs=7"])
    assert Config.from_arguments(config.to_flags()) == config


def test_ascend_is_what_the_wrappers_set():
    text = COMMON.read_text() + (COMMON.parent / "train_full_8p.sh").read_text()
    for name, value in RECIPES["ascend"].items():
        (written,) = re.findall(rf"--{name}=(\S+?)[ )\n]", text)
        assert str(value).lower() == written or float(value) == float(written)
