"""The test of a run: with the settings that its weights were trained with."""

import pytest

from aligned_reid.config import Config
from aligned_reid.errors import InputError
from aligned_reid.evaluation.evaluate import settle_test


def settled(settings, **given):
    lines = []
    config = settle_test(Config.of(**given), {"config": settings}, lines.append)
    return config, lines


def test_what_belongs_to_the_weights_is_taken_from_their_file():
    config, lines = settled({"resize_h_w": [128, 64], "bnneck": True, "flip_test": True, "base_lr": 1.0})
    assert (config.resize_h_w, config.bnneck, config.flip_test) == ((128, 64), True, True)
    assert config.base_lr == Config().base_lr
    assert lines == ["as the weights were trained: --resize_h_w=128,64 --bnneck=true --flip_test=true"]


def test_a_given_flag_stays():
    config, lines = settled({"flip_test": True}, flip_test=False)
    assert (config.flip_test, lines) == (False, [])


def test_another_size_of_the_images_is_said():
    config, lines = settled({"resize_h_w": [128, 64]}, resize_h_w=(256, 128))
    assert config.resize_h_w == (256, 128)
    assert lines == ["the weights were trained at --resize_h_w=128,64 and are tested at 256,128"]
    assert settled({"resize_h_w": [128, 64]}, resize_h_w=(128, 64))[1] == []


def test_a_feature_after_the_neck_needs_a_neck():
    config, _ = settled({"bnneck": True, "feature_after_bn": False}, feature_after_bn=True, only_test=True)
    assert (config.bnneck, config.feature_after_bn) == (True, True)
    with pytest.raises(InputError, match="--feature_after_bn needs weights with a neck"):
        settled({"bnneck": False}, feature_after_bn=True, only_test=True)
