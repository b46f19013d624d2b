"""Several seeds' results in one report."""

import json

import pytest

from aligned_reid.evaluation.evaluate import SCORE_NAMES
from aligned_reid.repeat import describe, read_results, summary


def results(cmc1, **more):
    scores = {"cmc1": cmc1, "mAP": cmc1 / 2, "mAP_step": cmc1 / 2}
    return {**dict.fromkeys(SCORE_NAMES), "global": scores, **more}


def test_mean_and_deviation_of_a_sample():
    report = summary([results(0.30), results(0.32), results(0.40)])
    assert list(report) == ["global"]  # what was not measured is left out
    values = report["global"]["cmc1"]
    assert values["mean"] == pytest.approx(0.34)
    assert values["deviation"] == pytest.approx(0.0529150, rel=1e-5)  # root of (16 + 4 + 36) / 2, in points
    assert values["values"] == [0.30, 0.32, 0.40]
    assert describe("cmc1", values) == "[cmc1: 34.00% +- 5.29%]"


def test_a_distance_that_one_run_lacks_is_left_out():
    local = {"cmc1": 0.2, "mAP": 0.1, "mAP_step": 0.1}
    assert list(summary([results(0.3, local=local), results(0.3)])) == ["global"]
    assert summary([results(0.3)])["global"]["cmc1"]["deviation"] == 0.0


def test_a_damaged_results_file_is_none(tmp_path):
    file = tmp_path / "results.json"
    assert read_results(file) == {}
    file.write_text("{")
    assert read_results(file) == {}
    file.write_text(json.dumps({"config": {}}))
    assert read_results(file) == {"config": {}}
