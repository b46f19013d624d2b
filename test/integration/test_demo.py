"""make demo, with fewer people and epochs: from drawing to the picture of matches."""

import sys

import cv2

from aligned_reid.commands import demo


def test_the_demo_prints_its_scores_and_draws_its_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "DATA", {"num_ids": 24, "num_cameras": 2, "images_per_camera": 3, "seed": 1})
    monkeypatch.setattr(demo, "RECIPE", [*demo.RECIPE, "--total_epochs=1", "--exp_decay_at_epoch=1"])
    monkeypatch.setattr(demo, "SHOWN", [0, 1])
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--folder={tmp_path}"])
    demo.main()
    raw, trained, files = capsys.readouterr().out.splitlines()[-3:]
    assert "rank@1" in raw and "FPS" in trained and str(tmp_path) in files
    assert cv2.imread(str(tmp_path / "matches.png")) is not None
