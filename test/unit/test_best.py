"""Evaluation during training keeps the best model and does not change the training; the weights as safetensors."""

import json

import pytest
import torch
from conftest import full_disk, refusal, tiny_config
from safetensors import torch as safetensors_torch

from aligned_reid.run import run
from aligned_reid.weights import read_weight_file

pytestmark = pytest.mark.usefixtures("small_trunk")


def log_of(folder):
    return (folder / "log.txt").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_not_change_the_training(tiny_data, tmp_path, workers):
    folders = [tmp_path / "without", tmp_path / "with"]
    results = [
        run(tiny_config(tiny_data, folder, workers=workers, total_epochs=4, eval_every=every))
        for folder, every in zip(folders, (0, 2), strict=True)
    ]
    plain, other = (torch.load(folder / "ckpt.pth", weights_only=True) for folder in folders)
    assert all(torch.equal(value, other["model"][name]) for name, value in plain["model"].items())
    assert torch.equal(plain["random"]["torch"], other["random"]["torch"])
    assert not (folders[0] / "best.pth").exists()
    lines = [line for line in log_of(folders[1]).splitlines() if line.startswith("evaluated")]
    assert [line.split(":")[0] for line in lines] == ["evaluated after epoch 2", "evaluated after epoch 4"]
    # The last evaluation scores as the final test of the same weights.
    final = results[1]["global"]
    assert f"rank@1 {final['cmc1']:.2%}, mAP {final['mAP']:.2%}" in lines[-1]
    assert results[1]["best"]["epoch"] in (2, 4)
    for folder, result in zip(folders, results, strict=True):
        assert json.loads((folder / "results.json").read_text())["best"] == result["best"]
    assert results[0]["best"] is None


@pytest.mark.parametrize(("rank1", "epoch"), [(2.0, 1), (-1.0, 2), ("damaged", 2)])
def test_the_best_model_is_kept_over_a_resume(tiny_data, tmp_path, rank1, epoch):
    run(tiny_config(tiny_data, tmp_path, eval_every=1, total_epochs=1))
    first = read_weight_file(tmp_path / "best.pth")
    torch.save({**first, "scores": {"rank1": rank1, "mAP": 0.125}}, tmp_path / "best.pth")
    if rank1 == "damaged":
        (tmp_path / "best.pth").write_bytes(b"damaged")
    results = run(tiny_config(tiny_data, tmp_path, eval_every=1, resume=True))
    assert results["best"]["epoch"] == read_weight_file(tmp_path / "best.pth")["epoch"] == epoch
    assert f"best: epoch {epoch}" in log_of(tmp_path)
    assert (f"{tmp_path}/best.pth cannot be continued" in log_of(tmp_path)) == (rank1 == "damaged")
    if epoch == 1:
        assert results["best"] == {"epoch": 1, "rank1": rank1, "mAP": 0.125}


def test_a_full_disk_while_the_best_is_written_keeps_the_checkpoint(tiny_data, tmp_path, monkeypatch):
    run(tiny_config(tiny_data, tmp_path, total_epochs=1))
    monkeypatch.setattr(torch, "save", full_disk)
    message = refusal(run, tiny_config(tiny_data, tmp_path, eval_every=1, resume=True))
    assert "best.pth: No space left" in message and f"{tmp_path}/ckpt.pth" in message
    assert read_weight_file(tmp_path / "ckpt.pth")["epoch"] == 1
    assert not (tmp_path / "best.pth").exists()


def test_the_weights_as_safetensors_have_the_same_scores(tiny_data, tmp_path):
    trained = run(tiny_config(tiny_data, tmp_path / "run", total_epochs=1, l_loss_weight=1.0))
    weights = tmp_path / "run" / "model.safetensors"
    tested = run(tiny_config(tiny_data, tmp_path / "test", only_test=True, model_weight_file=str(weights)))
    for name in ("global", "local", "global_local_re_ranked"):  # the file's settings say that local was trained
        assert tested[name] == trained[name] is not None, name
    record = trained["verification"]
    assert tested["verification"] == read_weight_file(weights)["verification"] == record
    assert record["global"]["eer"] is not None and record["global_local"]["eer"] is not None


def test_a_full_disk_after_the_evaluation_keeps_its_results(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_config(tiny_data, tmp_path, total_epochs=1))
    assert (tmp_path / "results.json").exists() and not (tmp_path / "model.safetensors").exists()


def test_a_new_run_in_the_folder_keeps_earlier_files(tiny_data, tmp_path):
    for _ in range(2):
        run(tiny_config(tiny_data, tmp_path, eval_every=1, total_epochs=1))
    names = {"best.pth", "model.safetensors", "model.md", "ckpt.pth", "log.txt", "results.json"}
    names |= {name.replace(".", ".old1.") for name in names}
    assert names <= {path.name for path in tmp_path.iterdir()}
