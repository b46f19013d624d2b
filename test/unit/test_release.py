"""The model card, and what a failing evaluation leaves."""

import dataclasses
import re

import pytest
from conftest import tiny_config

from aligned_reid import run as run_module
from aligned_reid.config import Config
from aligned_reid.data import TestImages, TrainImages, open_data
from aligned_reid.release import model_card
from aligned_reid.run import run
from aligned_reid.weights import read_weight_file

SCORES = {"mAP": 0.25, "mAP_step": 0.26, "mINP": 0.1, "cmc1": 0.5, "cmc5": 0.75, "cmc10": None}
RATES = {"0.01": {"threshold": 0.75, "tmr": 0.625}, "0.001": None, "0.0001": None}
CURVE = {"eer": 0.125, "eer_threshold": 0.9, "at_fmr": RATES}


def card_of(data, measured_on, **settings):
    record = {"measured_on": measured_on, "num_same": 1234, "num_different": 98765}
    results = dict.fromkeys(("global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked"))
    results |= {"global": SCORES, "verification": {**record, "global": CURVE, "global_local": None}}
    images = open_data(data)
    config = Config.of(data_path=str(data), **settings)
    return model_card("model.safetensors", config, results, TrainImages(images), TestImages(images))


def test_the_card_has_scores_thresholds_and_recipe(tiny_data):
    card = card_of(tiny_data, "drawn", recipe="strong", base_lr=0.001, pretrained="none")
    assert "| Global distance | 50.00 | 75.00 |  | 25.00 | 26.00 | 10.00 |" in card
    assert "| Global distance | 12.50% (equal error rate) | 0.9 | 87.50% |" in card
    assert "| Global distance | 1.00% | 0.75 | 62.50% |" in card
    assert "0.10%" not in card  # too few pairs
    assert "1,234 pairs" in card and "98,765 pairs" in card
    assert "`--recipe=strong`" in card and "base_lr: 0.0007 -> 0.001" in card
    assert 'from_pretrained("model.safetensors")' in card
    assert str(tiny_data.parent) not in card


@pytest.mark.parametrize(
    ("name", "words"), [("market1501", "research only"), ("cuhk03", "research only"), ("my photos", "not known")]
)
def test_the_card_names_the_licence_of_the_data_if_it_is_known(tiny_data, name, words):
    licences = card_of(tiny_data, name).split("## Data and licences")[1].split("##")[0]
    assert words in licences
    assert "ImageNet" in licences
    other = card_of(tiny_data, name, pretrained="/home/me/moco.pth")
    assert re.search(r"`moco\.pth`.*not known", other) and "/home/me" not in other


@pytest.mark.usefixtures("small_trunk")
def test_a_failing_evaluation_does_not_cost_the_weights(tiny_data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    config = tiny_config(tiny_data, tmp_path, total_epochs=1, seed=None)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(run_module, "evaluate_models", fail)
        run(config)
    results = run(dataclasses.replace(config, resume=True))
    assert read_weight_file(tmp_path / "model.safetensors")["verification"] == results["verification"]
    assert (tmp_path / "model.md").exists() and (tmp_path / "log.txt").read_text().count("Ep 1,") == 1
