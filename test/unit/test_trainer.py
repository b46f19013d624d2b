"""The loop: what it learns, what stops it, what it skips, and that a resumed run is the same run."""

import math
import os
import shutil
import signal

import pytest
import torch
from aligned_reid.training.watch import LOSS_CHECK_LAG, LossWatch

from aligned_reid import InputError
from aligned_reid.config import Config
from aligned_reid.data import TrainImages, open_data
from aligned_reid.data.loader import WorkerDied
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import Accelerator
from aligned_reid.distance import aligned_distance, euclidean_distance
from aligned_reid.distributed import World
from aligned_reid.errors import RunStopped
from aligned_reid.losses import mutual_distance_loss, mutual_probability_loss
from aligned_reid.model import AlignedReID
from aligned_reid.training import trainer as trainer_module
from aligned_reid.training.trainer import Trainer
from aligned_reid.weights import find_state_dict, read_weight_file

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
    models = [AlignedReID(images.num_classes, pretrained="none") for _ in range(config.num_models)]
    return Trainer(config, models, images, sampler, [Accelerator(mixed_precision=False)], World(), Lines(), folder)


def model_of(trainer):
    return trainer.learners[0].model


def weights_of(trainer):
    return {name: value.clone() for name, value in model_of(trainer).state_dict().items()}


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
    after = model_of(trainer).state_dict()
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
    assert same(saved["model"], model_of(trainer).state_dict())
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


def test_repeated_signals_change_nothing(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=3)
    add = trainer.throughput.add

    def signalled(*given):
        add(*given)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)

    trainer.throughput.add = signalled
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    with pytest.raises(RunStopped, match="SIGHUP at step 1 of epoch 1") as error:
        trainer.train()
    signal.signal(signal.SIGHUP, former)
    assert error.value.status == 129
    assert read_weight_file(tmp_path)["step"] == 1


def test_the_death_of_a_loading_worker_saves_first(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=3)

    def dies(batches):
        for number, batch in enumerate(batches):
            if number == 2:
                raise WorkerDied("a loading worker was killed (SIGKILL)")
            yield batch

    trainer.profile.steps = dies
    with pytest.raises(RunStopped, match=r"SIGKILL.*step 2 of epoch 1; the last good checkpoint") as error:
        trainer.train()
    assert error.value.status == 1
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
    objective = trainer.learners[0].objective

    def spoilt(features, labels):
        loss, figures = objective(features, labels)
        return loss * float("nan"), figures

    trainer.learners[0].objective = spoilt
    with pytest.raises(RunStopped) as error:
        trainer.train()
    message = str(error.value)
    assert "step 1 of epoch 2" in message
    assert str(tmp_path / "ckpt.pth") in message
    assert sum(name.endswith(".jpg") for name in message.split()) == 8  # 4 identities with 2 images
    assert read_weight_file(tmp_path)["epoch"] == 1
    assert all(value.isfinite().all() for value in model_of(trainer).state_dict().values())


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
    for step in range(1, LOSS_CHECK_LAG + 1):
        watch.add(step, torch.tensor(1.0), indices)
    assert SlowDevice.reads == 0  # the device has not been waited for
    watch.add(4, torch.tensor(float("inf")), indices)
    assert SlowDevice.reads == 1
    with pytest.raises(RunStopped, match="inf at step 4"):
        watch.flush()


def test_a_bad_gradient_under_a_good_loss_skips_its_step(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=1)
    before = weights_of(trainer)
    bias = model_of(trainer).base.bn1.bias
    bias.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train()
    steps = [line for line in trainer.log if "step skipped" in line]
    assert len(steps) == len(trainer.sampler)
    assert "a gradient is not finite" in steps[0]
    learnt = [name for name, _ in model_of(trainer).named_parameters()]
    after = model_of(trainer).state_dict()
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


# ---- the bag of tricks, one at a time


def after_training(tiny_data, folder, **settings):
    folder.mkdir()
    trainer = make_trainer(tiny_data, folder, **{"total_epochs": 1, "id_loss_weight": 1.0} | settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.2},
        {"center_loss_weight": 0.1},
        {"warmup_epochs": 1},
        {"weight_decay": 0.1},
        {"decay_norms": False},
        {"lr_decay_type": "cosine"},
        {"accumulate": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_each_changes_what_is_learnt(tiny_data, tmp_path, settings):
    plain = after_training(tiny_data, tmp_path / "plain")
    other = after_training(tiny_data, tmp_path / "other", **settings)
    assert not same(weights_of(plain), weights_of(other))


def test_accumulated_batches_are_one_step_of_their_mean_gradient(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, accumulate=2, id_loss_weight=1.0, l_loss_weight=1.0)
    assert trainer.steps_per_epoch == 2  # of 3 batches
    learner = trainer.learners[0]
    batches = list(trainer.loader)[:2]
    gradients = []
    for batch in batches:
        learner.optimizer.zero_grad()
        trainer.learn(batch, 1.0, is_last=True)
        gradients.append([one.grad.clone() for one in learner.model.parameters() if one.grad is not None])
    learner.optimizer.zero_grad()
    for number, batch in enumerate(batches):
        trainer.learn(batch, 0.5, is_last=number == 1)
    summed = [one.grad for one in learner.model.parameters() if one.grad is not None]
    for total, first, second in zip(summed, *gradients, strict=True):
        assert torch.allclose(total, (first + second) / 2, rtol=1e-4, atol=1e-6)
    steps = []
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train_epoch(1)
    assert len(steps) == 2


def test_a_run_of_accumulated_batches_resumes_exactly(tiny_data, tmp_path):
    settings = {"total_epochs": 2, "checkpoint_every_steps": 1, "accumulate": 2, "ema_decay": 0.9}
    whole = after_training(tiny_data, tmp_path / "whole", **settings)
    (tmp_path / "parts").mkdir()
    first = make_trainer(tiny_data, tmp_path / "parts", id_loss_weight=1.0, **settings)
    first.throughput.add = lambda *_: first.stop.take_note(signal.SIGTERM, None)
    with pytest.raises(RunStopped, match="step 1 of epoch 1"):
        first.train()
    second = make_trainer(tiny_data, tmp_path / "parts", id_loss_weight=1.0, **settings)
    second.resume()
    second.train()
    assert same(weights_of(whole), weights_of(second))
    averages = [trainer.learners[0].average for trainer in (whole, second)]
    assert same(averages[0].model.state_dict(), averages[1].model.state_dict())
    assert averages[0].num_steps == averages[1].num_steps == 4


def test_the_average_of_weights_is_tested_and_saved(tiny_data, tmp_path):
    trainer = after_training(tiny_data, tmp_path / "run", ema_decay=0.9)
    learner = trainer.learners[0]
    assert learner.tested_model is learner.average.model
    assert not same(learner.average.model.state_dict(), weights_of(trainer))
    saved = read_weight_file(tmp_path / "run")
    assert same(saved["model"], weights_of(trainer))
    assert same(find_state_dict(saved, "it"), learner.average.model.state_dict())


def test_centers_are_part_of_the_checkpoint(tiny_data, tmp_path):
    trainer = after_training(tiny_data, tmp_path / "run", center_loss_weight=0.01)
    centers = trainer.learners[0].objective.center_loss.centers
    assert centers.abs().sum() > 0
    again = make_trainer(tiny_data, tmp_path / "run", center_loss_weight=0.01, id_loss_weight=1.0)
    again.resume()
    assert torch.equal(again.learners[0].objective.center_loss.centers, centers)


def test_the_trunk_is_frozen_for_its_epochs(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, freeze_trunk_epochs=1, id_loss_weight=1.0)
    before = weights_of(trainer)
    trainer.train_epoch(1)
    after = weights_of(trainer)
    for name, value in before.items():
        assert torch.equal(value, after[name]) or not name.startswith("base.")
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    trainer.epoch = 1
    trainer.train_epoch(2)
    assert not torch.equal(model_of(trainer).base.conv1.weight, before["base.conv1.weight"])
    assert not torch.equal(model_of(trainer).base.bn1.running_mean, before["base.bn1.running_mean"])


def test_frozen_stages_stay_as_they_start(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, freeze_stages=3, freeze_trunk_epochs=1, id_loss_weight=1.0)
    before = weights_of(trainer)
    trainer.train_epoch(1)
    trainer.epoch = 1
    trainer.train_epoch(2)
    after = weights_of(trainer)
    for name, value in before.items():  # the small trunk has no fourth stage
        assert torch.equal(value, after[name]) or not name.startswith("base.")
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    trained = [parameter for group in trainer.learners[0].optimizer.param_groups for parameter in group["params"]]
    assert all(one is not model_of(trainer).base.conv1.weight for one in trained)


def test_stages_may_be_frozen_after_they_were_trained(tiny_data, tmp_path):
    settings = {"id_loss_weight": 1.0, "total_epochs": 3, "exp_decay_at_epoch": 3}
    frozen_late = {**settings, "freeze_stages": 1, "freeze_stages_from": 2}
    trainer = make_trainer(tiny_data, tmp_path, **frozen_late)
    start = weights_of(trainer)
    trainer.train_epoch(1)
    trainer.epoch = 1
    trainer.save()
    learnt = weights_of(trainer)
    assert not torch.equal(start["base.conv1.weight"], learnt["base.conv1.weight"])
    again = make_trainer(tiny_data, tmp_path, **frozen_late)
    again.resume()
    for one in (trainer, again):
        one.train_epoch(2)
        assert torch.equal(weights_of(one)["base.conv1.weight"], learnt["base.conv1.weight"])
        assert torch.equal(weights_of(one)["base.bn1.running_mean"], learnt["base.bn1.running_mean"])
        assert not torch.equal(weights_of(one)["base.conv2.weight"], learnt["base.conv2.weight"])
    assert all(torch.equal(value, weights_of(trainer)[name]) for name, value in weights_of(again).items())


# ---- several models


def test_models_learn_from_each_other(tiny_data, tmp_path):
    settings = {"num_models": 2, "l_loss_weight": 1.0}
    alone = after_training(tiny_data, tmp_path / "alone", **settings)
    for name in ("pm", "gdm", "ldm"):
        folder = tmp_path / name
        together = after_training(tiny_data, folder, **settings, **{f"{name}_loss_weight": 0.5})
        for number in (0, 1):
            weights = [trainer.learners[number].model.state_dict() for trainer in (alone, together)]
            assert not same(*weights)
        (epoch,) = [line for line in together.log if line.startswith("Ep ")]
        assert f"{name}L.1 " in epoch
        assert f"{name}L.2 " in epoch
        assert "gp.1 " in epoch
        assert "% " in epoch.split("gp.1 ")[1] or "%," in epoch.split("gp.1 ")[1]


def test_the_mutual_loss_is_the_golden_terms_sum(tiny_data, tmp_path):
    settings = {"pm_loss_weight": 0.3, "gdm_loss_weight": 0.5, "ldm_loss_weight": 0.7, "l_loss_weight": 1.0}
    trainer = make_trainer(tiny_data, tmp_path, num_models=3, id_loss_weight=1.0, **settings)
    batch = next(iter(trainer.loader))
    with torch.no_grad():
        features = [learner.forward(batch.images) for learner in trainer.learners]
        own = [learner.judge(one, batch.labels)[0] for learner, one in zip(trainer.learners, features, strict=True)]
    _, figures = trainer.learn(batch, 1.0, is_last=True)
    for number in range(3):
        terms = 0.0
        for other in {0, 1, 2} - {number}:
            mine, theirs = features[number], features[other]
            terms += 0.3 * mutual_probability_loss(mine.logits, theirs.logits) / 2
            global_dists = [euclidean_distance(one.global_feat, one.global_feat) for one in (mine, theirs)]
            terms += 0.5 * mutual_distance_loss(*global_dists) / 2
            local_dists = [aligned_distance(one.local_feat, one.local_feat) for one in (mine, theirs)]
            terms += 0.7 * mutual_distance_loss(*local_dists) / 2
        assert figures[f"loss.{number + 1}"].item() == pytest.approx((own[number] + terms).item(), rel=1e-4)


def test_several_models_resume_exactly(tiny_data, tmp_path):
    settings = {"num_models": 2, "gdm_loss_weight": 0.5, "total_epochs": 2}
    whole = after_training(tiny_data, tmp_path / "whole", **settings)
    (tmp_path / "parts").mkdir()
    first = make_trainer(tiny_data, tmp_path / "parts", id_loss_weight=1.0, **settings)
    first.train_epoch(1)
    first.save()
    second = make_trainer(tiny_data, tmp_path / "parts", id_loss_weight=1.0, **settings)
    second.resume()
    second.train()
    for one, other in zip(whole.learners, second.learners, strict=True):
        assert same(one.model.state_dict(), other.model.state_dict())
    single = make_trainer(tiny_data, tmp_path / "parts", id_loss_weight=1.0)
    with pytest.raises(InputError, match="num_models: 2 -> 1"):
        single.resume()


# ---- collapse


def test_a_collapse_is_logged_and_ends_the_run_where_asked(tiny_data, tmp_path):
    def collapsed(folder, **settings):
        folder.mkdir()
        trainer = make_trainer(tiny_data, folder, total_epochs=3, **settings)
        with torch.no_grad():
            model_of(trainer).base.conv2.weight.zero_()
            model_of(trainer).base.conv2.weight.requires_grad_(False)
        return trainer

    trainer = collapsed(tmp_path / "goes_on")
    trainer.train()
    (line,) = [line for line in trainer.log if "collapse" in line]
    assert line.startswith("epoch 1: collapse: the global features have no spread")
    stopped = collapsed(tmp_path / "stops", stop_on_collapse=True)
    with pytest.raises(RunStopped, match="no spread") as error:
        stopped.train()
    assert error.value.status == 3


def test_a_bad_image_ends_the_run_with_its_name(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    trainer = make_trainer(data, tmp_path, total_epochs=9)
    trainer.train_epoch(1)
    bad = trainer.images.image_names[2]
    (data / "images" / bad).write_bytes(b"not a JPEG")
    with pytest.raises(InputError, match=bad):
        trainer.train()
