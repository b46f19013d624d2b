"""Learning rate schedules: the reference's, cosine and warm-up."""

import json
from dataclasses import replace

import pytest
from conftest import GOLDEN

from aligned_reid.config import Config
from aligned_reid.training.schedule import exp_decay, learning_rate, staircase

CASES = json.loads((GOLDEN / "lr_schedules.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['type']}-{case['total_epochs']}")
def test_rates_match_the_reference(case):
    for epoch, expected in enumerate(case["lr_per_epoch"], start=1):
        if case["type"] == "exp":
            rate = exp_decay(epoch, case["base_lr"], case["total_epochs"], case["exp_decay_at_epoch"])
        else:
            rate = staircase(epoch, case["base_lr"], case["decay_at_epochs"], case["factor"])
        assert rate == pytest.approx(expected, rel=1e-12)


def test_settings_choose_the_schedule_and_cosine_falls_to_a_thousandth():
    config = Config(base_lr=1e-3, total_epochs=10, exp_decay_at_epoch=6, staircase_decay_at_epochs=(3, 5))
    assert learning_rate(5, config) == 1e-3
    assert learning_rate(10, config) == pytest.approx(1e-6)
    config = Config(base_lr=1e-3, lr_decay_type="staircase", staircase_decay_at_epochs=(3, 5))
    assert [learning_rate(epoch, config) for epoch in (2, 3, 5)] == pytest.approx([1e-3, 1e-4, 1e-5])
    config = Config(base_lr=1e-3, total_epochs=10, lr_decay_type="cosine")
    assert learning_rate(1, config) == pytest.approx(1e-3)
    assert learning_rate(6, config) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(5, config, share_done=1.0) == pytest.approx(learning_rate(6, config))
    assert learning_rate(10, config, share_done=1.0) == pytest.approx(1e-6)


@pytest.mark.parametrize("decay", ["exp", "staircase", "cosine"])
def test_the_rate_warms_up_step_by_step(decay):
    settled = Config(base_lr=1e-3, total_epochs=10, lr_decay_type=decay)
    config = replace(settled, warmup_epochs=2)
    factors = [
        learning_rate(epoch, config, share_done=share) / learning_rate(epoch, settled, share_done=share)
        for epoch, share in ((1, 0.0), (1, 0.5), (2, 0.0), (3, 0.0), (9, 0.5))
    ]
    assert factors == pytest.approx([0.01, 0.2575, 0.505, 1, 1])
