"""What a resumed run says, and where in an epoch it starts."""

import pytest
import torch
from aligned_reid.training.resume import describe_resume, first_step

from aligned_reid import InputError
from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.preflight import check_input
from aligned_reid.run import go_on_after_restart, run
from aligned_reid.training.checkpoint import LastGood
from aligned_reid.weights import read_weight_file

HERE = {"num_processes": 2, "device": "cpu"}


def last_good(tmp_path, damage="", **content):
    return LastGood({"config": Config().to_dict(), "epoch": 3, "step": 0, **content}, tmp_path / "ckpt.pth", damage)


def test_the_same_run_is_one_line(tmp_path):
    lines = describe_resume(Config(resume=True), last_good(tmp_path, made_on=HERE), HERE)
    assert lines == [f"resumed from {tmp_path}/ckpt.pth after epoch 3"]
    assert describe_resume(Config(), last_good(tmp_path), HERE) == lines  # a file from before `made_on`


def test_other_processes_or_another_device_are_not_bit_exact(tmp_path):
    before = {"num_processes": 8, "device": "npu"}
    lines = describe_resume(Config(), last_good(tmp_path, step=4, made_on=before), HERE)
    assert lines[0].endswith("after epoch 3 and step 4 of the next")
    assert lines[1] == "processes 8 -> 2, device npu -> cpu: from here on the run is no longer bit-exact"


def test_damage_comes_first(tmp_path):
    lines = describe_resume(Config(), last_good(tmp_path, damage="ckpt.pth is damaged"), HERE)
    assert lines[0] == "ckpt.pth is damaged: the checkpoint before it is used"


@pytest.mark.parametrize(
    ("sampling", "before", "now", "expected"),
    [("independent", 1, 2, 6), ("sharded", 1, 2, 3), ("sharded", 4, 2, 10), ("sharded", 2, 2, 6)],
)
def test_the_share_of_an_epoch_that_is_done_stays(sampling, before, now, expected):
    content = {"step": 6, "made_on": {"num_processes": before, "device": "cpu"}}
    assert first_step(content, Config(id_sampling=sampling), now, num_steps=10) == expected


@pytest.mark.parametrize(("before", "now", "expected"), [(1, 2, 3), (2, 1, 12), (2, 3, 4), (2, 2, 6)])
def test_steps_of_other_batches_show_the_same_share(before, now, expected):
    content = {"step": 6, "config": Config(accumulate=before).to_dict()}
    assert first_step(content, Config(accumulate=now), 1, num_steps=20) == expected


def config_of(data, folder, **settings):
    common = {"data_path": str(data), "exp_dir": str(folder), "pretrained": "none", "resize_h_w": (64, 32), "seed": 1}
    common |= {"ids_per_batch": 4, "ims_per_id": 2, "workers": 0, "device": "cpu", "amp": "O0", "total_epochs": 2}
    return Config(**common | settings)


def test_only_rank_0_needs_the_run_folder(tiny_data, tmp_path):
    config = config_of(tiny_data, tmp_path, resume=True)
    with pytest.raises(InputError, match=r"--resume true needs .*ckpt\.pth"):
        check_input(config)
    assert check_input(config, has_run_dir=False).weights is None


def test_several_seeds_have_no_checkpoint_in_the_folder_of_all(tiny_data, tmp_path, small_trunk):
    assert check_input(config_of(tiny_data, tmp_path, resume=True, repeat=2)).weights is None


def test_a_damaged_checkpoint_is_gone_on_from_by_the_one_before(tiny_data, tmp_path, small_trunk):
    run(config_of(tiny_data, tmp_path, total_epochs=2))
    path = tmp_path / "ckpt.pth"
    path.write_bytes(path.read_bytes()[:-50])
    run(config_of(tiny_data, tmp_path, total_epochs=2, resume=True))
    log = (tmp_path / "log.txt").read_text()
    assert f"{path} is damaged or cut off" in log
    assert f"resumed from {tmp_path}/ckpt.previous.pth after epoch 1" in log
    run(config_of(tiny_data, tmp_path, total_epochs=3, resume=True))
    assert f"resumed from {path} after epoch 2" in (tmp_path / "log.txt").read_text()


def test_the_seconds_of_a_resumed_run_are_of_all_its_parts(tiny_data, tmp_path, small_trunk):
    results = run(config_of(tiny_data, tmp_path, total_epochs=1))
    content = read_weight_file(tmp_path)
    assert 0 < content["train_seconds"] <= results["train_seconds"]
    torch.save({**content, "train_seconds": 1000.0}, tmp_path / "ckpt.pth")
    results = run(config_of(tiny_data, tmp_path, total_epochs=2, resume=True))
    assert results["train_seconds"] > 1000


@pytest.mark.parametrize(
    ("theirs", "goes_on"),
    [({"token": "a"}, True), ({"token": "b"}, False), ({"token": "a", "name": ""}, False), ({}, False)],
)
def test_a_restart_goes_on_from_its_own_launch_only(tiny_data, tmp_path, small_trunk, theirs, goes_on):
    config = config_of(tiny_data, tmp_path, total_epochs=1)
    accelerator = Accelerator(mixed_precision=False)
    ours = World(job={"token": "a"})
    assert not go_on_after_restart(config, ours, accelerator).resume  # there is nothing yet
    run(config)
    torch.save({**read_weight_file(tmp_path), "job": theirs}, tmp_path / "ckpt.pth")
    assert go_on_after_restart(config, ours, accelerator).resume == goes_on
    (tmp_path / "ckpt.pth").write_bytes(b"nothing")
    assert not go_on_after_restart(config, ours, accelerator).resume
