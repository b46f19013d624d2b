"""What a resumed run says, and where in an epoch it starts."""

import pytest

from aligned_reid.config import Config
from aligned_reid.training.checkpoint import LastGood
from aligned_reid.training.resume import describe_resume, first_step

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
