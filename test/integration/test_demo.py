"""make demo, with fewer people and epochs: from drawing to the report."""

import sys

import cv2

from aligned_reid.commands import demo


def test_the_demo_prints_its_scores_and_uses_its_model(monkeypatch, tmp_path, capsys, small_trunk):
    monkeypatch.setattr(demo, "DATA", {"num_ids": 60, "num_cameras": 3, "images_per_camera": 3, "seed": 1})
    monkeypatch.setattr(demo, "RECIPE", [*demo.RECIPE, "--total_epochs=1", "--exp_decay_at_epoch=1", "--last_stride=2"])
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--folder={tmp_path}"])
    demo.main()
    shown = capsys.readouterr().out
    for word in ("raw pixels", "FPS", "compare ", "search ", "group ", "report "):
        assert word in shown
    assert shown.splitlines()[-1].endswith((tmp_path / "report" / "index.html").as_uri())
    for page in ("report/index.html", "search.html", "groups.html"):
        assert "<html" in (tmp_path / page).read_text(encoding="utf-8")
    assert cv2.imread(str(tmp_path / "compare.png")) is not None
