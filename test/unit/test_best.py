"""Evaluation during training: what it keeps, what it says, and that the training does not notice it."""

import errno
import json
import os
import sys

import pytest
import torch

from aligned_reid import run as run_module
from aligned_reid.config import Config
from aligned_reid.errors import InputError, RunStopped
from aligned_reid.evaluation import best as best_module
from aligned_reid.run import run
from aligned_reid.training.checkpoint import Checkpoints
from aligned_reid.weights import read_weight_file

pytestmark = pytest.mark.usefixtures("small_trunk")


def config_of(data, folder, **settings):
    common = {"data_path": str(data), "exp_dir": str(folder), "pretrained": "none", "resize_h_w": (64, 32), "seed": 1}
    common |= {"ids_per_batch": 4, "ims_per_id": 2, "workers": 0, "device": "cpu", "amp": "O0", "total_epochs": 4}
    return Config(**common | settings)


def same_weights(first, second):
    first, second = (torch.load(path, weights_only=True)["model"] for path in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_with_the_bits_of_one_without_it(tiny_data, tmp_path, workers):
    run(config_of(tiny_data, tmp_path / "without", workers=workers))
    results = run(config_of(tiny_data, tmp_path / "with", workers=workers, eval_every=2))
    assert same_weights(tmp_path / "without" / "ckpt.pth", tmp_path / "with" / "ckpt.pth")
    states = [torch.load(tmp_path / name / "ckpt.pth", weights_only=True)["random"] for name in ("without", "with")]
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert not (tmp_path / "without" / "best.pth").exists()
    lines = [line for line in (tmp_path / "with" / "log.txt").read_text().splitlines() if line.startswith("evaluated")]
    assert [line.split(":")[0] for line in lines] == ["evaluated after epoch 2", "evaluated after epoch 4"]
    assert results["best"]["epoch"] in (2, 4)
    assert json.loads((tmp_path / "with" / "results.json").read_text())["best"] == results["best"]
    assert json.loads((tmp_path / "without" / "results.json").read_text())["best"] is None
    last = f"rank@1 {results['global']['cmc1']:.2%}, mAP {results['global']['mAP']:.2%}"
    assert last in lines[-1]  # the final test of the same weights


def test_the_best_is_kept_over_a_stop_and_a_resume(tiny_data, tmp_path, monkeypatch):
    given = iter([0.25, 0.75, 0.5, 0.5])
    monkeypatch.setattr(best_module, "evaluate_features", lambda *_: {"global": {"cmc1": next(given), "mAP": 0.125}})
    after_epoch = best_module.Best.after_epoch

    def stops_after_two(self, model, epoch):
        after_epoch(self, model, epoch)
        if epoch == 3:
            raise RunStopped("here")

    monkeypatch.setattr(best_module.Best, "after_epoch", stops_after_two)
    with pytest.raises(RunStopped):
        run(config_of(tiny_data, tmp_path, eval_every=1))
    monkeypatch.setattr(best_module.Best, "after_epoch", after_epoch)
    results = run(config_of(tiny_data, tmp_path, eval_every=3, resume=True, total_epochs=3))
    best = {"epoch": 2, "rank1": 0.75, "mAP": 0.125}
    assert results["best"] == best
    content = read_weight_file(tmp_path / "best.pth")
    assert (content["epoch"], content["scores"]) == (2, {"rank1": 0.75, "mAP": 0.125})
    assert content["config"]["eval_every"] == 1
    assert "best: epoch 2" in (tmp_path / "log.txt").read_text().split("evaluated after epoch 3")[-1]


def test_a_damaged_best_is_named_and_sought_anew(tiny_data, tmp_path):
    run(config_of(tiny_data, tmp_path, eval_every=1, total_epochs=1))
    (tmp_path / "best.pth").write_bytes(b"nothing")
    results = run(config_of(tiny_data, tmp_path, eval_every=1, total_epochs=2, resume=True))
    assert results["best"]["epoch"] == 2
    assert "the best model is sought anew" in (tmp_path / "log.txt").read_text()


def test_a_full_disk_at_the_best_is_one_line(tiny_data, tmp_path, monkeypatch):
    def full(content, file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # as torch does

    after_epoch = best_module.Best.after_epoch

    def full_at_two(self, model, epoch):
        if epoch == 2:
            self.record = None
            monkeypatch.setattr(torch, "save", full)
        after_epoch(self, model, epoch)

    monkeypatch.setattr(best_module.Best, "after_epoch", full_at_two)
    monkeypatch.setattr(Checkpoints, "is_due", lambda self: True)
    with pytest.raises(InputError, match=r"best\.pth: No space left.* the last good checkpoint is .*ckpt\.pth"):
        run(config_of(tiny_data, tmp_path, eval_every=1, total_epochs=2))
    assert {read_weight_file(tmp_path / name)["epoch"] for name in ("ckpt.pth", "best.pth")} == {1}


def test_the_weights_as_safetensors_give_the_same_scores(tiny_data, tmp_path):
    trained = run(config_of(tiny_data, tmp_path / "run", total_epochs=1, l_loss_weight=1.0))
    weights = tmp_path / "run" / "model.safetensors"
    tested = run(config_of(tiny_data, tmp_path / "test", only_test=True, model_weight_file=str(weights)))
    for name in ("global", "local", "global_local_re_ranked"):  # local: the settings in the file say it was trained
        assert tested[name] == trained[name], name
    assert tested["local"] is not None


def test_a_disk_without_room_for_safetensors_costs_no_more_than_its_file(tiny_data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_module, "write_safetensors", full)
    assert run(config_of(tiny_data, tmp_path, total_epochs=1))["global"]
    assert "model.safetensors is not written: [Errno 28] No space left" in (tmp_path / "log.txt").read_text()


def test_a_missing_package_costs_no_more_than_its_file(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # its import fails
    assert run(config_of(tiny_data, tmp_path, total_epochs=1))["global"]
    assert not (tmp_path / "model.safetensors").exists()
    assert "needs the package safetensors: pip install safetensors" in (tmp_path / "log.txt").read_text()


def test_a_new_run_in_the_folder_keeps_the_former_files(tiny_data, tmp_path):
    for _ in range(2):
        run(config_of(tiny_data, tmp_path, eval_every=1, total_epochs=2))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best.old1.pth", "model.old1.safetensors", "ckpt.old1.pth", "best.pth", "model.safetensors"} <= names
