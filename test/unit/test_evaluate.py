"""A run is tested with the settings stored with its weights."""

import pytest

from aligned_reid.config import Config
from aligned_reid.errors import InputError
from aligned_reid.evaluation.evaluate import settle_test


def settled(settings, **given):
    lines = []
    config = settle_test(Config.of(**given), {"config": settings}, lines.append)
    return config, lines


def test_settings_come_from_the_weights():
    config, lines = settled({"resize_h_w": [128, 64], "bnneck": True, "flip_test": True, "base_lr": 1.0})
    assert (config.resize_h_w, config.bnneck, config.flip_test) == ((128, 64), True, True)
    assert config.base_lr == Config().base_lr
    assert "--resize_h_w=128,64 --bnneck=true --flip_test=true" in lines[0]


def test_explicit_flags_win():
    config, lines = settled({"flip_test": True}, flip_test=False)
    assert (config.flip_test, lines) == (False, [])


def test_another_image_size_is_logged():
    config, lines = settled({"resize_h_w": [128, 64]}, resize_h_w=(256, 128))
    assert config.resize_h_w == (256, 128)
    assert "128,64" in lines[0] and "256,128" in lines[0]
    assert settled({"resize_h_w": [128, 64]}, resize_h_w=(128, 64))[1] == []


def test_feature_after_bn_needs_a_neck():
    config, _ = settled({"bnneck": True, "feature_after_bn": False}, feature_after_bn=True, only_test=True)
    assert (config.bnneck, config.feature_after_bn) == (True, True)
    with pytest.raises(InputError, match="--feature_after_bn"):
        settled({"bnneck": False}, feature_after_bn=True, only_test=True)
