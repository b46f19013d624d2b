"""Every option of a run, declared once: its flag, default, help, allowed values and what it affects."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aligned_reid.cli import command_line, expand_home
from aligned_reid.errors import InputError
from aligned_reid.flags import (
    ARCHITECTURE,
    COUNT,
    MODEL,
    NOTHING,
    SHARE,
    TEST,
    TRAINING,
    Range,
    check_value,
    format_value,
    make_parser,
    option,
    written_value,
)
from aligned_reid.recipes import RECIPES

# Flags of earlier versions, and what replaces them.
REMOVED = {
    "max_bad_images": "a bad image ends the run; prepare the data again",
    "grad_checkpoint": "for less memory use a smaller --ids_per_batch with --accumulate",
    "sync_bn": "each process normalizes its own batch; use larger batches",
    "models_apart": "name a device for each model: --npu=0,1",
    "lr_scale": "give the scaled rate as --base_lr",
    "freeze_trunk_epochs": "use --freeze_stages, or --warmup_epochs",
    "ema_decay": "leave it out; --lr_decay_type=cosine ends training at small rates",
    "multi_query_pool": "use the command extract, then evaluate --multi_query_pool",
    "stop_on_collapse": "watch the log for 'collapse'",
    "repeat": "run a shell loop over --seed (docs/training.md)",
    "amp_backend": "use --amp=apex for Huawei's apex; torch's autocast is the default",
    "tf32": "use --amp=tf32",
}


@dataclass(frozen=True)
class Config:
    """All settings of a run, by the names of their flags."""

    data_path: str = option(
        "data", "", "folder of a prepared data set", aliases=["--data_pth"], common=True, parse=expand_home
    )
    dataset: str = option("data", "market1501", "name of the data set, for the log and the run folder", affects=NOTHING)
    partition_file: str = option(
        "data", "", "partition file (default: partitions.pkl in --data_path)", aliases=["--pkl"], parse=expand_home
    )
    trainset_part: str = option("data", "trainval", "identities to train on", allowed=["trainval", "train"])
    resize_h_w: tuple[int, int] = option(
        "data",
        (256, 128),
        "height,width of the model's input, in pixels",
        allowed=Range(32, 10_000),
        affects=(TRAINING, TEST),
        common=True,
    )
    crop_prob: float = option("data", 0.0, "probability of a random crop of a training image", allowed=SHARE)
    crop_ratio: float = option(
        "data", 1.0, "smallest share of each side that a crop keeps", allowed=Range(0, 1, above=True)
    )
    pad_crop: int = option("data", 0, "pixels to pad training images by before a random crop to size")
    erase_prob: float = option("data", 0.0, "probability of erasing a rectangle of a training image", allowed=SHARE)
    workers: int = option(
        "data", 4, "processes per device that load images; 0: load in the main process", affects=NOTHING, common=True
    )
    cache: bool = option(
        "data", False, "decode training images once, into a file that later runs share", affects=NOTHING, common=True
    )

    ids_per_batch: int = option("batches", 32, "identities per batch and device", allowed=Range(2), common=True)
    ims_per_id: int = option("batches", 4, "images per identity in a batch", allowed=Range(2), common=True)
    train_final_batch: bool = option("batches", False, "keep the smaller last batch of an epoch")
    id_sampling: str = option(
        "batches",
        "independent",
        "whether each process sees all identities, or they divide them",
        allowed=["independent", "sharded"],
    )
    accumulate: int = option("batches", 1, "batches per step, each mined separately", allowed=COUNT)
    cross_rank_mining: bool = option("batches", False, "mine triplets over the batches of all processes")

    pretrained: str = option(
        "model",
        "imagenet",
        "trunk's initial weights: imagenet, none, or a ResNet-50 file",
        affects=NOTHING,
        common=True,
        parse=expand_home,
    )
    model_weight_file: str = option(
        "model",
        "",
        "weights to start or test from: a file or a run folder",
        affects=NOTHING,
        common=True,
        parse=expand_home,
    )
    last_stride: int = option(
        "model", 2, "stride of the trunk's last stage; 1 doubles the stripes", allowed=Range(1, 2), affects=MODEL
    )
    pooling: str = option(
        "model", "avg", "global pooling: average, or generalized mean", allowed=["avg", "gem"], affects=MODEL
    )
    bnneck: bool = option("model", False, "batch norm between global feature and classifier", affects=MODEL)

    g_loss_weight: float = option("losses", 1.0, "weight of the global triplet loss", aliases=["-glw"], common=True)
    l_loss_weight: float = option("losses", 0.0, "weight of the local triplet loss", aliases=["-llw"], common=True)
    id_loss_weight: float = option("losses", 0.0, "weight of the identity loss", aliases=["-idlw"], common=True)
    global_margin: float | None = option(
        "losses", 0.3, "margin of the global triplet loss; none: soft margin", aliases=["-gm"]
    )
    local_margin: float | None = option(
        "losses", 0.3, "margin of the local triplet loss; none: soft margin", aliases=["-lm"]
    )
    local_dist_own_hard_sample: bool = option("losses", False, "mine the local loss by local distance, not by global")
    normalize_feature: bool = option("losses", False, "scale features to unit length", affects=(TRAINING, TEST))
    label_smoothing: float = option("losses", 0.0, "label smoothing of the identity loss", allowed=Range(0, 0.999))
    center_loss_weight: float = option("losses", 0.0, "weight of the center loss")
    num_models: int = option("losses", 1, "models that learn from each other (mutual learning)", allowed=COUNT)
    pm_loss_weight: float = option("losses", 0.0, "weight of the mutual loss on probabilities", aliases=["-pmlw"])
    gdm_loss_weight: float = option("losses", 0.0, "weight of the mutual loss on global distances", aliases=["-gdmlw"])
    ldm_loss_weight: float = option("losses", 0.0, "weight of the mutual loss on local distances", aliases=["-ldmlw"])

    total_epochs: int = option(
        "schedule", 300, "epochs to train; an epoch shows every identity once", allowed=COUNT, common=True
    )
    base_lr: float = option(
        "schedule", 2e-4, "Adam's learning rate before decay", allowed=Range(0, 1e3, above=True), common=True
    )
    weight_decay: float = option("schedule", 5e-4, "Adam's weight decay (L2, added to the gradient)")
    decay_norms: bool = option("schedule", True, "apply weight decay to biases and norms too")
    warmup_epochs: int = option("schedule", 0, "epochs of linear warm-up from 1/100 of the rate, per step")
    lr_decay_type: str = option(
        "schedule", "exp", "learning rate schedule", allowed=["exp", "staircase", "cosine"], common=True
    )
    exp_decay_at_epoch: int = option(
        "schedule", 151, "epoch at which exponential decay starts, down to 1/1000", allowed=COUNT
    )
    staircase_decay_at_epochs: tuple[int, ...] = option(
        "schedule", (101, 201), "epochs at which the rate drops", allowed=COUNT
    )
    staircase_decay_multiply_factor: float = option(
        "schedule", 0.1, "factor of each drop", allowed=Range(0, above=True)
    )
    freeze_stages: int = option("schedule", 0, "stages of the trunk to freeze, with the stem", allowed=Range(0, 3))
    freeze_stages_from: int = option("schedule", 1, "epoch from which --freeze_stages applies", allowed=COUNT)

    only_test: bool = option(
        "test", False, "evaluate --model_weight_file or the run folder; do not train", affects=NOTHING, common=True
    )
    use_local_distance: bool | None = option(
        "test",
        None,
        "evaluate local distance; auto: if its branch was trained",
        affects=NOTHING,
    )
    feature_after_bn: bool = option(
        "test", False, "test the global feature after --bnneck's norm", affects=(TEST, ARCHITECTURE)
    )
    test_distance: str = option(
        "test", "euclidean", "distance at test", allowed=["euclidean", "cosine"], affects=(TEST,)
    )
    flip_test: bool = option("test", False, "average the features of each image and its mirror image", affects=(TEST,))
    multi_query: bool = option(
        "test", False, "also evaluate with the mean of a person's query images per camera", affects=NOTHING
    )
    eval_every: int = option(
        "test", 0, "evaluate every N epochs and keep the best in best.pth; 0: never", affects=NOTHING, common=True
    )

    device: str = option("device", "auto", "npu, cuda, cpu, or auto: the first available one", common=True)
    npu: tuple[int, ...] = option(
        "device", (), "device index (default: local rank); 0,1: one for each model", affects=NOTHING
    )
    amp: str = option(
        "device",
        "O1",
        "float32, float32 with TF32/HF32 convolutions, mixed precision, or that by Huawei's apex",
        allowed=["O0", "tf32", "O1", "apex"],
        common=True,
    )
    loss_scale: float | None = option(
        "device", 128.0, "loss scale of float16, or dynamic", allowed=Range(0, above=True)
    )
    deterministic: bool = option("device", False, "use deterministic operators only; some are slower")
    compile: bool = option("device", False, "use torch.compile; the first step takes minutes")
    addr: str = option("device", "", "address of the first of several machines", affects=NOTHING)
    timeout: int = option(
        "device", 600, "seconds after which a process counts as hung", allowed=Range(1, 365 * 86400), affects=NOTHING
    )

    recipe: str = option(
        "run",
        "reference",
        "named settings to start from; other flags override them",
        allowed=[*RECIPES],
        affects=NOTHING,
        common=True,
    )
    exp_dir: str = option(
        "run", "", "run folder (default: named after the settings)", affects=NOTHING, common=True, parse=expand_home
    )
    run: int = option("run", 1, "N of the default run folder", allowed=COUNT, aliases=["-r"], affects=NOTHING)
    resume: bool = option("run", False, "continue from the run folder's checkpoint", affects=NOTHING, common=True)
    checkpoint_every_steps: int = option("run", 0, "also write ckpt.pth every N steps; 0: never", affects=NOTHING)
    seed: int | None = option(
        "run", None, "random seed (default: drawn and logged)", allowed=Range(0, 2**31 - 1), common=True
    )
    set_seed: bool = option("run", False, "the same as --seed=1", affects=NOTHING)
    profile: int = option("run", 0, "steps to trace into profile/ of the run folder", affects=NOTHING)
    log_to_file: bool = option("run", True, "write log.txt and tensorboard files", affects=NOTHING)
    given: frozenset[str] = field(default=frozenset(), compare=False)  # names of the options that the user gave

    @classmethod
    def from_arguments(cls, arguments: Sequence[str] | None = None) -> Config:
        """Parse command-line arguments (default: sys.argv); a mistake prints one line and exits with status 2."""
        parser = make_parser(OPTIONS, REMOVED)
        values = vars(parser.parse_args(arguments))
        try:
            return cls.of(**values).checked()
        except InputError as error:
            parser.error(str(error))

    @classmethod
    def of(cls, **values: Any) -> Config:
        """The recipe's settings, overridden by `values`, which the user gave."""
        recipe = RECIPES[values.get("recipe", "reference")]
        return cls(**{**recipe, **values}, given=frozenset(values))

    def checked(self) -> Config:
        """Self, with --set_seed resolved, and no --resume of a test, which continues nothing.

        Raises InputError if a value is out of range or two do not fit together.
        """
        for one in OPTIONS:
            check_value(one, getattr(self, one.name))
        if "+" in self.dataset:
            line = f"join data sets by {command_line('prepare joined')}, then train on that"
            raise InputError(f"--dataset {self.dataset}: {line}")
        if self.pad_crop >= min(self.resize_h_w):
            raise InputError("--pad_crop has to be smaller than the image")
        if not self.only_test and self.g_loss_weight + self.l_loss_weight + self.id_loss_weight == 0:
            raise InputError("one of -glw, -llw, -idlw has to be above 0")
        if self.num_models == 1 and self.pm_loss_weight + self.gdm_loss_weight + self.ldm_loss_weight > 0:
            raise InputError("-pmlw, -gdmlw, -ldmlw need --num_models 2 or more")
        if self.pm_loss_weight > 0 and self.id_loss_weight == 0:
            raise InputError("-pmlw needs -idlw above 0: probabilities come from the identity classifier")
        if self.ldm_loss_weight > 0 and self.l_loss_weight == 0:
            raise InputError("-ldmlw needs -llw above 0: local distances come from the local branch")
        if len(self.npu) not in (0, 1, self.num_models):
            line = f"give one device, or one for each of --num_models {self.num_models}"
            raise InputError(f"--npu {format_value(self.npu)}: {line}")
        if self.feature_after_bn and not (self.bnneck or self.only_test):  # in a test the weight file knows
            raise InputError("--feature_after_bn needs --bnneck true")
        if self.amp == "apex" and (self.accumulate > 1 or self.num_models > 1):
            raise InputError("--amp apex trains one model, a batch a step: use --amp O1")
        seed = 1 if self.set_seed and self.seed is None else self.seed
        return replace(self, seed=seed, resume=self.resume and not self.only_test)

    @property
    def dataset_name(self) -> str:
        """--dataset if it was given, else the data folder's name (of a link: the link's), which tells more."""
        if "dataset" in self.given or not self.data_path:
            return self.dataset
        return os.path.basename(os.path.abspath(self.data_path))

    @property
    def run_dir(self) -> Path:
        """--exp_dir, or a folder named after the settings, as the reference names it."""
        if self.exp_dir:
            return Path(self.exp_dir)
        decay = {
            "exp": f"exp_decay_at_{self.exp_decay_at_epoch}",
            "cosine": "cosine",
            "staircase": f"staircase_decay_at_{'_'.join(map(str, self.staircase_decay_at_epochs))}"
            f"_factor_{self.staircase_decay_multiply_factor:g}",
        }[self.lr_decay_type]
        margins = ["soft" if margin is None else f"{margin:g}" for margin in (self.global_margin, self.local_margin)]
        settings = [
            "" if self.recipe == "reference" else self.recipe,
            "nf" if self.normalize_feature else "not_nf",
            "ohs" if self.local_dist_own_hard_sample else "not_ohs",
            f"gm_{margins[0]}_lm_{margins[1]}",
            f"glw_{self.g_loss_weight:g}_llw_{self.l_loss_weight:g}_idlw_{self.id_loss_weight:g}",
            "" if self.num_models == 1 else f"models_{self.num_models}",
            f"lr_{self.base_lr:g}_{decay}_total_{self.total_epochs}",
        ]
        return Path("exp/train", self.dataset, "_".join(filter(None, settings)), f"run{self.run}")

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, booleans, lists and None only: what JSON and a weights_only checkpoint can hold."""
        return json.loads(json.dumps({one.name: getattr(self, one.name) for one in OPTIONS}))

    def to_flags(self) -> list[str]:
        """The command line that gives these settings."""
        written = {one.name: written_value(one.name, getattr(self, one.name)) for one in OPTIONS}
        return [f"--{name}={text}" for name, text in written.items() if text]

    def differences(self, other: Mapping[str, Any], affecting: str = "") -> list[str]:
        """'name: theirs -> ours' for each option that differs from another run's `to_dict()`.

        affecting: TRAINING, TEST or ARCHITECTURE, to compare only the options that affect it.
        """
        ours = self.to_dict()
        names = names_affecting(affecting) if affecting else [*ours]
        return [
            f"{name}: {other[name]} -> {ours[name]}" for name in names if name in other and other[name] != ours[name]
        ]


OPTIONS = tuple(one for one in fields(Config) if one.metadata)


def names_affecting(what: str) -> list[str]:
    """The options that affect TRAINING, TEST or ARCHITECTURE, in order."""
    return [one.name for one in OPTIONS if what in one.metadata["affects"]]
