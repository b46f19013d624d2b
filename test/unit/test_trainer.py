"""The loop: what it learns, what stops it, what it skips, and that a resumed run is the same run."""

import math
import os
import signal

import pytest
import torch

from aligned_reid import InputError
from aligned_reid.accelerator import Accelerator
from aligned_reid.config import Config
from aligned_reid.data import IdentityBatchSampler, TrainImages, open_data
from aligned_reid.distributed import World
from aligned_reid.errors import RunStopped
from aligned_reid.model import AlignedReID
from aligned_reid.training import trainer as trainer_module
from aligned_reid.training.trainer import LossWatch, Trainer
from aligned_reid.weights import read_weight_file

pytestmark = pytest.mark.usefixtures("small_trunk")


class Lines(list):
    """A log that remembers."""

    def __call__(self, line=""):
        self.append(line)

    def scalars(self, values, epoch):
        pass


def make_trainer(tiny_data, folder, **settings):
    config = Config(
        **{"seed": 1, "resize_h_w": (64, 32), "ids_per_batch": 4, "ims_per_id": 2, "total_epochs": 2, "workers": 0}
        | settings
    )
    torch.manual_seed(1)
    images = TrainImages(open_data(tiny_data), size=config.resize_h_w)
    sampler = IdentityBatchSampler(images.person_ids, config.ids_per_batch, config.ims_per_id, False, config.seed)
    model = AlignedReID(images.num_classes, pretrained="none")
    return Trainer(config, model, images, sampler, Accelerator(mixed_precision=False), World(), Lines(), folder)


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss_and_logs_each_epoch(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=6, base_lr=1e-3, g_loss_weight=0.0, id_loss_weight=1.0)
    trainer.train()
    epochs = [line for line in trainer.log if line.startswith("Ep ")]
    assert len(epochs) == 6
    losses = [float(line.rsplit("loss ", 1)[1]) for line in epochs]
    assert all(math.isfinite(loss) for loss in losses)
    assert min(losses[4:]) < 0.8 * losses[0]
    assert read_weight_file(tmp_path)["epoch"] == 6
    assert trainer.speed.fps > 0


def test_a_frozen_head_is_not_decayed(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=1)
    before = weights_of(trainer)
    trainer.train()
    after = trainer.model.state_dict()
    for name in ("fc.weight", "local_conv.weight", "local_bn.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["base.conv1.weight"], after["base.conv1.weight"])


def test_a_resumed_run_is_the_same_run(tiny_data, tmp_path):
    whole = make_trainer(tiny_data, tmp_path / "whole", total_epochs=3, id_loss_weight=1.0, l_loss_weight=1.0)
    (tmp_path / "whole").mkdir()
    whole.train()

    (tmp_path / "parts").mkdir()
    first = make_trainer(tiny_data, tmp_path / "parts", total_epochs=3, id_loss_weight=1.0, l_loss_weight=1.0)
    first.train_epoch(1)
    first.epoch = 1
    first.save()
    second = make_trainer(tiny_data, tmp_path / "parts", total_epochs=3, id_loss_weight=1.0, l_loss_weight=1.0)
    second.resume()
    assert second.epoch == 1
    second.train()
    assert same(weights_of(whole), weights_of(second))
    losses = [[line.rsplit("loss ", 1)[1] for line in t.log if line.startswith("Ep ")] for t in (whole, first, second)]
    assert losses[0] == losses[1] + losses[2]


def test_a_run_goes_on_in_the_middle_of_an_epoch(tiny_data, tmp_path):
    settings = {"total_epochs": 3, "checkpoint_every_steps": 2, "l_loss_weight": 1.0}
    (tmp_path / "whole").mkdir()
    whole = make_trainer(tiny_data, tmp_path / "whole", **settings)
    whole.train()

    (tmp_path / "parts").mkdir()
    first = make_trainer(tiny_data, tmp_path / "parts", **settings)
    add = first.throughput.add

    def ends_in_its_third_step(*given):
        add(*given)
        if first.throughput.steps == 3:
            raise KeyboardInterrupt

    first.throughput.add = ends_in_its_third_step
    with pytest.raises(KeyboardInterrupt):
        first.train()
    saved = read_weight_file(tmp_path / "parts")
    assert (saved["epoch"], saved["step"]) == (0, 2)
    second = make_trainer(tiny_data, tmp_path / "parts", **settings)
    second.resume()
    second.train()
    assert same(weights_of(whole), weights_of(second))


def test_a_signal_ends_the_run_after_its_step_with_all_saved(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=3)
    add = trainer.throughput.add

    def signalled(*given):
        add(*given)
        if trainer.throughput.steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.throughput.add = signalled
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped, match=r"SIGTERM at step 1 of epoch 2; the last good checkpoint is") as error:
        trainer.train()
    assert error.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before
    saved = read_weight_file(tmp_path)
    assert (saved["epoch"], saved["step"]) == (1, 1)
    assert same(saved["model"], trainer.model.state_dict())
    rest = make_trainer(tiny_data, tmp_path, total_epochs=3)
    rest.resume()
    assert any("after epoch 1 and step 1 of the next" in line for line in rest.log)
    rest.train()
    (tmp_path / "whole").mkdir()
    whole = make_trainer(tiny_data, tmp_path / "whole", total_epochs=3)
    whole.train()
    assert same(weights_of(whole), weights_of(rest))
    losses = [[line.rsplit("loss ", 1)[1] for line in t.log if line.startswith("Ep ")] for t in (whole, trainer, rest)]
    assert losses[0] == losses[1] + losses[2]


@pytest.mark.parametrize("error", ["DataLoader worker exited unexpectedly", "Connection closed by peer"])
def test_what_ends_of_a_signal_is_no_error_of_its_own(tiny_data, tmp_path, error):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=3)

    def fails(batches):
        for number, batch in enumerate(batches):
            if number == 2:
                trainer.stop.take_note(signal.SIGINT, None)
                raise RuntimeError(error)
            yield batch

    trainer.profile.steps = fails
    with pytest.raises(RunStopped, match="SIGINT at step 2 of epoch 1") as stopped:
        trainer.train()
    assert stopped.value.status == 130
    assert read_weight_file(tmp_path)["step"] == 2


def test_ranks_whose_weights_differ_stop_the_run(tiny_data, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=1)
    trainer.world = World(0, 2, 0)
    monkeypatch.setattr(trainer_module, "sum_over_ranks", lambda value: value)
    monkeypatch.setattr(trainer_module, "take_from_main", lambda tensors: None)
    trainer.check_ranks(1)
    monkeypatch.setattr(trainer_module, "take_from_main", lambda tensors: [tensor.add_(1) for tensor in tensors])
    with pytest.raises(RunStopped, match="after epoch 1 the weights of 1 of 2 processes differ"):
        trainer.check_ranks(1)


def test_resuming_with_other_flags_says_which(tiny_data, tmp_path):
    first = make_trainer(tiny_data, tmp_path, total_epochs=1)
    first.train()
    second = make_trainer(tiny_data, tmp_path, total_epochs=1, base_lr=0.5, checkpoint_every_steps=7)
    second.resume()
    assert "flags that differ from those of the checkpoint and change the result: base_lr: 0.0002 -> 0.5" in second.log
    assert (
        "flags that differ from those of the checkpoint without effect on training: checkpoint_every_steps: 0 -> 7"
        in second.log
    )
    assert not any("bit-exact" in line for line in second.log)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=5)
    trainer.train_epoch(1)
    trainer.epoch = 1
    trainer.save()
    objective = trainer.objective

    def spoilt(features, labels):
        loss, figures = objective(features, labels)
        return loss * float("nan"), figures

    trainer.objective = spoilt
    with pytest.raises(RunStopped) as error:
        trainer.train()
    message = str(error.value)
    assert "step 1 of epoch 2" in message
    assert str(tmp_path / "ckpt.pth") in message
    assert sum(name.endswith(".jpg") for name in message.split()) == 8  # 4 identities with 2 images
    assert read_weight_file(tmp_path)["epoch"] == 1
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_a_late_loss_is_noticed_a_few_steps_later():
    class SlowDevice(Accelerator):
        reads = 0

        def read_later(self, value):
            def read():
                SlowDevice.reads += 1
                return value

            return read

    watch = LossWatch(SlowDevice(), lambda step, indices: f"step {step}")
    indices = torch.tensor([0])
    for step in range(1, trainer_module.LOSS_CHECK_LAG + 1):
        watch.add(step, torch.tensor(1.0), indices)
    assert SlowDevice.reads == 0  # the device has not been waited for
    watch.add(4, torch.tensor(float("inf")), indices)
    assert SlowDevice.reads == 1
    with pytest.raises(RunStopped, match="inf at step 4"):
        watch.flush()


def test_a_bad_gradient_under_a_good_loss_skips_its_step(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=1)
    before = weights_of(trainer)
    bias = trainer.model.base.bn1.bias
    bias.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train()
    steps = [line for line in trainer.log if "step skipped" in line]
    assert len(steps) == len(trainer.sampler)
    assert "a gradient is not finite" in steps[0]
    learnt = [name for name, _ in trainer.model.named_parameters()]
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in learnt)


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny_data, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=1)
    trainer.epoch = 1
    trainer.save()

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "ckpt.pth.tmp"))

    monkeypatch.setattr("aligned_reid.training.checkpoint.torch.save", full)
    with pytest.raises(InputError) as error:
        trainer.save()
    assert "No space left" in str(error.value)
    assert f"the last good checkpoint is {tmp_path / 'ckpt.pth'}" in str(error.value)
    assert read_weight_file(tmp_path)["epoch"] == 1
