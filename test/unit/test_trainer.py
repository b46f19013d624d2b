"""The training loop: what it learns, what stops it, what it skips, and that a resumed run repeats the whole one."""

import math
import os
import signal

import pytest
import torch
from conftest import full_disk, refusal, same, tiny_config

from aligned_reid.data import TrainImages, open_data
from aligned_reid.data.loader import WorkerDied
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import Accelerator
from aligned_reid.distance import aligned_distance, euclidean_distance
from aligned_reid.distributed import World
from aligned_reid.errors import RunStopped
from aligned_reid.losses import mutual_distance_loss, mutual_probability_loss
from aligned_reid.model import AlignedReID
from aligned_reid.training.trainer import Trainer
from aligned_reid.weights import read_weight_file

pytestmark = pytest.mark.usefixtures("small_trunk")


class Lines(list):
    """A log that keeps its lines."""

    __call__ = list.append

    def scalars(self, values, epoch):
        pass

    def losses(self):
        return [line.rsplit("loss ", 1)[1] for line in self if line.startswith("Ep ")]


class Sampler(IdentityBatchSampler):
    """Calls `before` with the epoch and the number of each batch that is drawn; both count from 1."""

    before = None

    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), start=self.first_batch + 1):
            if self.before:
                self.before(self.epoch, number)
            yield batch


def make_trainer(tiny_data, folder, before=None, after_epoch=None, **settings):
    """A trainer of 3 batches an epoch."""
    folder.mkdir(exist_ok=True)
    config = tiny_config(tiny_data, folder, **settings)
    torch.manual_seed(1)
    images = TrainImages(open_data(tiny_data), size=config.resize_h_w)
    sampler = Sampler(images.person_ids, config.ids_per_batch, config.ims_per_id, False, config.seed)
    sampler.before = before
    models = [AlignedReID(images.num_classes, pretrained="none") for _ in range(config.num_models)]
    devices = [Accelerator(config)]
    return Trainer(config, models, images, sampler, devices, World(), Lines(), after_epoch=after_epoch)


def trained(tiny_data, folder, **settings):
    trainer = make_trainer(tiny_data, folder, **{"total_epochs": 1, "id_loss_weight": 1.0} | settings)
    trainer.train()
    return trainer


def at(epoch, batch, action):
    """A sampler's `before` that calls `action` at one batch."""
    return lambda *drawn: action() if drawn == (epoch, batch) else None


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def weights_of(trainer, number=0):
    return {name: value.clone() for name, value in trainer.learners[number].model.state_dict().items()}


def test_training_lowers_the_loss_logs_each_epoch_and_leaves_unused_heads(tiny_data, tmp_path):
    settings = {"total_epochs": 6, "base_lr": 1e-3, "g_loss_weight": 0.0, "id_loss_weight": 1.0}
    trainer = make_trainer(tiny_data, tmp_path, **settings)
    before = weights_of(trainer)
    trainer.train()
    losses = [float(loss) for loss in trainer.log.losses()]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert min(losses[4:]) < 0.8 * losses[0]
    assert read_weight_file(tmp_path)["epoch"] == 6
    assert trainer.results()["FPS"] > 0
    unchanged = {name for name, value in weights_of(trainer).items() if torch.equal(value, before[name])}
    heads = {"local_conv.weight", "local_conv.bias", "local_bn.weight", "local_bn.bias"}  # nor decayed
    assert unchanged & {name for name, _ in trainer.learners[0].model.named_parameters()} == heads


def crash(*_):
    raise RunStopped("crash", 1)


@pytest.mark.parametrize(
    ("settings", "batch", "epoch", "step"),
    [
        ({"id_loss_weight": 1.0, "l_loss_weight": 1.0}, 1, 1, 1),
        ({"accumulate": 2, "warmup_epochs": 2}, 2, 1, 1),
        ({"num_models": 2, "gdm_loss_weight": 0.5}, 2, 1, 2),
        ({"center_loss_weight": 0.01, "freeze_stages": 1, "freeze_stages_from": 2}, 2, 1, 2),
        ({"checkpoint_every_steps": 2, "l_loss_weight": 1.0}, None, 0, 2),
    ],
    ids=["losses", "accumulate", "models", "centers", "crash"],
)
def test_resume_is_bit_exact(tiny_data, tmp_path, settings, batch, epoch, step):
    """After a signal at a batch of epoch 2, or a crash after the last step of epoch 1, before its checkpoint."""
    settings |= {"total_epochs": 3, "exp_decay_at_epoch": 2}
    whole = make_trainer(tiny_data, tmp_path / "whole", **settings)
    whole.train()
    interruption = {"before": at(2, batch, lambda: send(signal.SIGTERM))} if batch else {"after_epoch": crash}
    with pytest.raises(RunStopped):
        make_trainer(tiny_data, tmp_path / "parts", **interruption, **settings).train()
    resumed = make_trainer(tiny_data, tmp_path / "parts", **settings)
    resumed.resume()
    assert (resumed.epoch, resumed.step) == (epoch, step)
    resumed.train()
    for one, other in zip(whole.learners, resumed.learners, strict=True):
        assert same(one.model.state_dict(), other.model.state_dict())
        if settings.get("center_loss_weight"):
            assert one.objective.center_loss.centers.abs().sum() > 0
            assert torch.equal(one.objective.center_loss.centers, other.objective.center_loss.centers)
    assert whole.log.losses()[epoch:] == resumed.log.losses()


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]]
)
def test_the_first_signal_stops_the_run_after_its_step(tiny_data, tmp_path, signals):
    trainer = make_trainer(tiny_data, tmp_path, before=at(2, 1, lambda: send(*signals)))
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    handlers = [signal.getsignal(number) for number in signals]
    try:
        with pytest.raises(RunStopped, match=f"{signals[0].name} at step 1 of epoch 2") as error:
            trainer.train()
        assert [signal.getsignal(number) for number in signals] == handlers
    finally:
        signal.signal(signal.SIGHUP, former)
    assert error.value.status == 128 + signals[0] and str(tmp_path / "ckpt.pth") in str(error.value)
    saved = read_weight_file(tmp_path)
    assert (saved["epoch"], saved["step"]) == (1, 1)
    assert same(saved["model"], weights_of(trainer))


@pytest.mark.parametrize(("signals", "name", "status"), [([signal.SIGTERM], "SIGTERM", 143), ([], "SIGKILL", 1)])
def test_the_death_of_a_worker_saves_first(tiny_data, tmp_path, signals, name, status):
    def lose_a_worker():
        send(*signals)  # to all of the run's processes
        raise WorkerDied("a loading worker was killed (SIGKILL)")

    trainer = make_trainer(tiny_data, tmp_path, before=at(1, 3, lose_a_worker))
    with pytest.raises(RunStopped, match=f"{name}.*step 2 of epoch 1") as error:
        trainer.train()
    assert error.value.status == status
    assert read_weight_file(tmp_path)["step"] == 2


def test_the_end_of_another_rank_at_the_same_signal_is_not_an_error(tiny_data, tmp_path):
    def fail():
        send(signal.SIGINT)
        raise RuntimeError("Connection closed by peer")

    trainer = make_trainer(tiny_data, tmp_path, before=at(1, 3, fail))
    with pytest.raises(RunStopped, match="SIGINT") as error:
        trainer.train()
    assert error.value.status == 130


def full_disk_in_torchs_words(content, file):
    file.write(b"a part")
    try:
        full_disk()
    finally:
        raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("failing", [full_disk, full_disk_in_torchs_words])
def test_a_full_disk_keeps_the_last_checkpoint(tiny_data, tmp_path, monkeypatch, failing):
    trainer = trained(tiny_data, tmp_path)
    monkeypatch.setattr(torch, "save", failing)
    message = refusal(trainer.save)
    assert "No space left" in message and f"{tmp_path}/ckpt.pth" in message
    assert read_weight_file(tmp_path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["ckpt.pth"]


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path):
    def spoil(model, inputs, features):
        return features._replace(logits=features.logits * math.nan)

    trainer = make_trainer(
        tiny_data, tmp_path, after_epoch=lambda model, _: model.register_forward_hook(spoil), id_loss_weight=1.0
    )
    with pytest.raises(RunStopped) as error:
        trainer.train()
    message = str(error.value)
    assert "step 1 of epoch 2" in message and str(tmp_path / "ckpt.pth") in message
    assert sum(name.endswith(".jpg") for name in message.split()) == 8  # 4 identities with 2 images
    assert read_weight_file(tmp_path)["epoch"] == 1
    assert all(value.isfinite().all() for value in weights_of(trainer).values())


def test_a_gradient_that_is_not_finite_skips_its_step(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=1)
    model, before = trainer.learners[0].model, weights_of(trainer)
    model.base.bn1.bias.register_hook(lambda gradient: gradient * math.inf)
    trainer.train()
    assert sum("step skipped" in line for line in trainer.log) == 3
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_collapse_is_logged_once_and_training_continues(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, total_epochs=3)
    trainer.learners[0].model.base.conv2.weight.requires_grad_(False).zero_()
    trainer.train()
    (line,) = [line for line in trainer.log if "collapse" in line]
    assert line.startswith("epoch 1:") and trainer.epoch == 3


OPTIONS = {"label_smoothing": 0.2, "center_loss_weight": 0.1, "warmup_epochs": 1, "weight_decay": 0.1}
OPTIONS |= {"decay_norms": False, "lr_decay_type": "cosine", "accumulate": 2}


def test_each_option_changes_the_weights(tiny_data, tmp_path):
    plain = weights_of(trained(tiny_data, tmp_path / "plain"))
    for name, value in OPTIONS.items():
        assert not same(plain, weights_of(trained(tiny_data, tmp_path / name, **{name: value}))), name


def test_a_step_averages_the_gradients_of_accumulated_batches(tiny_data, tmp_path):
    trainer = make_trainer(tiny_data, tmp_path, accumulate=2, id_loss_weight=1.0, l_loss_weight=1.0)
    learner = trainer.learners[0]
    parameters = [one for one in learner.model.parameters() if one.requires_grad]
    trainer.sampler.set_epoch(1)
    batches = list(trainer.loader)[:2]
    losses = [trainer.compute_losses([learner.forward(one.images)], one.labels)[0][0] for one in batches]
    expected = torch.autograd.grad(sum(losses) / 2, parameters)
    steps = []
    learner.optimizer.register_step_pre_hook(lambda *_: steps.append([one.grad.clone() for one in parameters]))
    trainer.train_epoch(1)
    assert len(steps) == 2  # of 3 batches
    torch.testing.assert_close(steps[0], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [1, 2])
def test_stages_are_frozen_from_their_epoch(tiny_data, tmp_path, first):
    states = []
    settings = {"id_loss_weight": 1.0, "freeze_stages": 1, "freeze_stages_from": first}
    trainer = make_trainer(tiny_data, tmp_path, after_epoch=lambda *_: states.append(weights_of(trainer)), **settings)
    states.append(weights_of(trainer))
    trainer.train()
    for epoch in (1, 2):
        before, after = states[epoch - 1 : epoch + 1]
        for name in ("base.conv1.weight", "base.bn1.weight", "base.bn1.running_mean"):
            assert torch.equal(before[name], after[name]) == (epoch >= first)
        assert not torch.equal(before["base.conv2.weight"], after["base.conv2.weight"])
    optimized = [parameter for group in trainer.learners[0].optimizer.param_groups for parameter in group["params"]]
    assert any(one is trainer.learners[0].model.base.conv1.weight for one in optimized) == (first == 2)


def test_models_learn_from_each_other(tiny_data, tmp_path):
    settings = {"num_models": 2, "l_loss_weight": 1.0}
    alone = trained(tiny_data, tmp_path / "alone", **settings)
    for name in ("pm", "gdm", "ldm"):
        together = trained(tiny_data, tmp_path / name, **settings, **{f"{name}_loss_weight": 0.5})
        assert not any(same(weights_of(alone, number), weights_of(together, number)) for number in (0, 1))
        (epoch,) = [line for line in together.log if line.startswith("Ep ")]
        assert all(f" {name}L.{number} " in epoch for number in (1, 2))
        assert epoch.split(" gp.1 ")[1].split(",")[0].endswith("%")


def test_the_mutual_loss_is_the_mean_over_the_other_models(tiny_data, tmp_path):
    settings = {"pm_loss_weight": 0.3, "gdm_loss_weight": 0.5, "ldm_loss_weight": 0.7, "l_loss_weight": 1.0}
    trainer = make_trainer(tiny_data, tmp_path, num_models=3, id_loss_weight=1.0, **settings)
    batch = next(iter(trainer.loader))
    with torch.no_grad():
        features = [learner.forward(batch.images) for learner in trainer.learners]
        own = [learner.objective(one, batch.labels)[0] for learner, one in zip(trainer.learners, features, strict=True)]
        losses, figures = trainer.compute_losses(features, batch.labels)
    for number, mine in enumerate(features):
        expected = own[number]
        for theirs in features[:number] + features[number + 1 :]:
            expected += 0.3 * mutual_probability_loss(mine.logits, theirs.logits) / 2
            global_dists = [euclidean_distance(one.global_feat, one.global_feat) for one in (mine, theirs)]
            expected += 0.5 * mutual_distance_loss(*global_dists) / 2
            local_dists = [aligned_distance(one.local_feat, one.local_feat) for one in (mine, theirs)]
            expected += 0.7 * mutual_distance_loss(*local_dists) / 2
        assert losses[number].item() == pytest.approx(expected.item(), rel=1e-4)
        assert figures[f"loss.{number + 1}"].item() == losses[number].item()
