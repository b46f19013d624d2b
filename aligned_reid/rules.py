"""What settings have to be, each rule with the line that says so: in the order of the options in config.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aligned_reid.config import Config

Rules = list[tuple[bool, str]]  # whether it holds, and what is wrong otherwise


def broken_rule(config: Config) -> str:
    """The first rule that the settings break; empty where they break none."""
    parts: list[Callable[[Config], Rules]] = [data_rules, batch_rules, loss_rules, schedule_rules, run_rules]
    return next((line for part in parts for holds, line in part(config) if not holds), "")


def data_rules(config: Config) -> Rules:
    names, smallest = config.dataset_names, min(config.resize_h_w)
    return [
        (len(set(names)) == len(names), f"--dataset {config.dataset} names a data set twice"),
        (len(names) == 1 or all(names), f"--dataset {config.dataset} has an empty name beside a +"),
        (len(names) == 1 or not config.partition_file, "--partition_file is for one data set, not for several"),
        (smallest >= 32, "--resize_h_w is at least 32,32 pixels"),
        (0.0 <= config.crop_prob <= 1.0, "--crop_prob is a probability, 0 to 1"),
        (0.0 < config.crop_ratio <= 1.0, "--crop_ratio is above 0 and at most 1"),
        (0 <= config.pad_crop < smallest, f"--pad_crop is a number of pixels, from 0 to {smallest - 1}"),
        (0.0 <= config.erase_prob <= 1.0, "--erase_prob is a probability, 0 to 1"),
        (config.workers >= 0, "--workers is 0 or more"),
        (config.max_bad_images >= 0, "--max_bad_images is a number of images, 0 or more"),
    ]


def batch_rules(config: Config) -> Rules:
    """Those of batches and of the model."""
    return [
        (config.ids_per_batch >= 2, "--ids_per_batch is at least 2: an anchor needs a negative"),
        (config.ims_per_id >= 2, "--ims_per_id is at least 2: an anchor needs a positive"),
        (config.accumulate >= 1, "--accumulate is a number of batches, 1 or more"),
        (config.last_stride in (1, 2), "--last_stride is 1 or 2"),
    ]


def loss_rules(config: Config) -> Rules:
    """Those of the losses, and of several models that learn from each other."""
    several = config.num_models > 1
    return [
        (
            min(*config.loss_weights, *config.mutual_weights, config.center_loss_weight) >= 0.0,
            "loss weights (-glw, -llw, -idlw, --center_loss_weight, -pmlw, -gdmlw, -ldmlw) are 0 or more",
        ),
        (config.only_test or sum(config.loss_weights) > 0.0, "one of -glw, -llw, -idlw has to be above 0"),
        (
            min(margin or 0.0 for margin in (config.global_margin, config.local_margin)) >= 0.0,
            "margins (-gm, -lm) are 0 or more, or none",
        ),
        (0.0 <= config.label_smoothing < 1.0, "--label_smoothing is a share, from 0 to below 1"),
        (config.num_models >= 1, "--num_models is 1 or more"),
        (several or sum(config.mutual_weights) == 0, "-pmlw, -gdmlw, -ldmlw need --num_models 2 or more"),
        (several or not config.models_apart, "--models_apart needs --num_models 2 or more"),
        (
            not (config.models_apart and (config.cross_rank_mining or config.sync_bn)),
            "--models_apart: processes have models of their own, so --cross_rank_mining and --sync_bn are for none",
        ),
        (
            config.pm_loss_weight == 0.0 or config.id_loss_weight > 0.0,
            "-pmlw needs -idlw above 0: probabilities come from the identity classifier",
        ),
        (
            config.ldm_loss_weight == 0.0 or config.l_loss_weight > 0.0,
            "-ldmlw needs -llw above 0: local distances come from the local branch",
        ),
    ]


def schedule_rules(config: Config) -> Rules:
    return [
        (config.total_epochs >= 1, "--total_epochs is at least 1"),
        (0.0 < config.base_lr < 1e3, "--base_lr is above 0 and below 1000"),
        (config.weight_decay >= 0.0, "--weight_decay is 0 or more"),
        (config.warmup_epochs >= 0, "--warmup_epochs is a number of epochs, 0 or more"),
        (config.exp_decay_at_epoch >= 1, "--exp_decay_at_epoch is an epoch, 1 or more"),
        (min(config.staircase_decay_at_epochs, default=1) >= 1, "--staircase_decay_at_epochs are epochs, 1 or more"),
        (config.staircase_decay_multiply_factor > 0.0, "--staircase_decay_multiply_factor is above 0"),
        (config.freeze_trunk_epochs >= 0, "--freeze_trunk_epochs is a number of epochs, 0 or more"),
        (
            config.freeze_trunk_epochs == 0 or config.trains_beside_trunk,
            "--freeze_trunk_epochs needs -llw or -idlw above 0, or --pooling gem: there is no head to train",
        ),
        (0 <= config.freeze_stages <= 3, "--freeze_stages is a number of stages, 0 to 3: of 4 the last one learns"),
        (config.freeze_stages_from >= 1, "--freeze_stages_from is an epoch, 1 or more"),
        (0.0 <= config.ema_decay < 1.0, "--ema_decay is from 0 to below 1, such as 0.999"),
    ]


def run_rules(config: Config) -> Rules:
    """Those of the test, of the device and of the run."""
    return [
        (  # in a test the weights' file says whether they have the neck
            config.bnneck or config.only_test or not config.feature_after_bn,
            "--feature_after_bn needs --bnneck true",
        ),
        (config.eval_every >= 0, "--eval_every is a number of epochs, 0 or more"),
        (config.npu is None or config.npu >= 0, "--npu is a device index, 0 or more"),
        (config.amp == "O1" or config.amp_backend != "apex", "--amp_backend apex needs --amp O1"),
        (
            config.amp_backend != "apex" or config.accumulate == config.num_models == 1,
            "--amp_backend apex trains one model, a batch a step; use native for --accumulate and --num_models",
        ),
        (1 <= config.timeout <= 365 * 86400, "--timeout is a number of seconds, from 1 to 31536000"),
        (config.run >= 1, "--run is a number, 1 or more"),
        (config.checkpoint_every_steps >= 0, "--checkpoint_every_steps is a number of steps, 0 or more"),
        (config.repeat >= 1, "--repeat is a number of runs, 1 or more"),
        (config.repeat == 1 or not config.only_test, "--repeat trains several times: leave out --only_test true"),
        (config.seed is None or 0 <= config.seed < 2**31, "--seed is a whole number from 0 to 2147483647"),
        (config.profile >= 0, "--profile is a number of steps, 0 or more"),
    ]
