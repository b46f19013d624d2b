"""Every option of a run, once: the parser, the log, the checkpoint and the README's table come from it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aligned_reid.errors import InputError
from aligned_reid.flags import (
    PARSERS,
    OneLineParser,
    expand_home,
    expand_homes,
    format_option,
    parse_local_distance,
    parse_loss_scale,
)
from aligned_reid.recipes import RECIPES
from aligned_reid.rules import broken_rule

# How None is written on the command line; options that are not here are just left out.
NONE_AS = {"global_margin": "none", "local_margin": "none", "loss_scale": "dynamic", "use_local_distance": "auto"}
LARGEST = {int: 2**31 - 1, float: 1e9}  # of options that have no closer bound in rules.py

# Options that a resumed training ends with the same weights whatever they are.
WITHOUT_EFFECT = {
    "recipe",
    "dataset",
    "workers",
    "cache",
    "max_bad_images",
    "feature_after_bn",
    "test_distance",
    "flip_test",
    "stop_on_collapse",
    "repeat",
    "pretrained",
    "model_weight_file",
    "only_test",
    "use_local_distance",
    "multi_query",
    "multi_query_pool",
    "eval_every",
    "npu",
    "addr",
    "timeout",
    "exp_dir",
    "run",
    "resume",
    "checkpoint_every_steps",
    "set_seed",
    "profile",
    "log_to_file",
}


def option(
    default: Any, text: str, *, aliases: Sequence[str] = (), choices: Sequence[str] = (), parse: Any = None
) -> Any:
    """One option: a dataclass field whose metadata the parser and the README's table are made from."""
    return field(
        default=default, metadata={"help": text, "aliases": tuple(aliases), "choices": choices, "parse": parse}
    )


@dataclass(frozen=True)
class Config:
    """All settings of a run. Frozen: what was parsed is what the log, the checkpoint and results.json say."""

    recipe: str = option(
        "reference", "settings to start from, a row of aligned_reid/recipes.py; flags come on top", choices=[*RECIPES]
    )
    # data
    data_path: str = option(
        "",
        "folder with images/ and partitions.pkl; several: dirA+dirB, with --dataset a+b",
        aliases=["--data_pth"],
        parse=expand_homes,
    )
    dataset: str = option(
        "market1501", "name of the data set, for the log and the run folder; a+b: train on both, test on each"
    )
    partition_file: str = option(
        "", "partition file; default: partitions.pkl in --data_path", aliases=["--pkl"], parse=expand_home
    )
    trainset_part: str = option("trainval", "identities to train on", choices=["trainval", "train"])
    resize_h_w: tuple[int, int] = option((256, 128), "height,width of the images that the model sees, in pixels")
    crop_prob: float = option(0.0, "probability that a training image is cropped at random")
    crop_ratio: float = option(1.0, "smallest share of height and of width that a random crop keeps")
    pad_crop: int = option(0, "pixels to pad a training image by at each side before it is cropped back at random")
    erase_prob: float = option(0.0, "probability that a rectangle of a training image is erased")
    workers: int = option(
        4, "processes that decode images, per device, at most one a processor; 0: in the main process"
    )
    cache: bool = option(
        False,
        "decode training images once, into a file in cache/ of --data_path that later runs and all processes share",
    )
    max_bad_images: int = option(
        10, "training images that may turn bad during a run, per process: others of the person take their places"
    )
    # batches
    ids_per_batch: int = option(32, "identities per batch and device")
    ims_per_id: int = option(4, "images per identity in a batch")
    train_final_batch: bool = option(False, "keep the last, smaller batch of an epoch")
    id_sampling: str = option(
        "independent",
        "with several processes: each walks all identities (independent), or they share them (sharded)",
        choices=["independent", "sharded"],
    )
    accumulate: int = option(1, "batches whose gradients are averaged into one step; each is mined by itself")
    cross_rank_mining: bool = option(False, "mine over the batches of all processes, not each its own")
    # model
    pretrained: str = option(
        "imagenet", "start of the trunk: imagenet, none, or a file with ResNet-50 weights", parse=expand_home
    )
    model_weight_file: str = option(
        "", "weights to start or test from: a file, or a folder that holds ckpt.pth", parse=expand_home
    )
    last_stride: int = option(2, "stride of the trunk's last stage: 2, or 1 for twice the stripes and columns")
    pooling: str = option("avg", "global pooling: avg, or gem (generalised mean)", choices=["avg", "gem"])
    bnneck: bool = option(False, "a batch norm between global feature and classifier, which then has no bias")
    grad_checkpoint: bool = option(False, "compute activations twice instead of keeping them: half the memory")
    sync_bn: bool = option(False, "batch norm over the batches of all processes (torch has none for CPUs)")
    # losses
    normalize_feature: bool = option(False, "bring features to unit length, in training and test")
    local_dist_own_hard_sample: bool = option(False, "the local loss mines its own hard samples, not the global ones")
    global_margin: float | None = option(0.3, "margin of the global triplet loss; none: soft margin", aliases=["-gm"])
    local_margin: float | None = option(0.3, "margin of the local triplet loss; none: soft margin", aliases=["-lm"])
    g_loss_weight: float = option(1.0, "weight of the global triplet loss", aliases=["-glw"], parse=float)
    l_loss_weight: float = option(0.0, "weight of the local triplet loss", aliases=["-llw"], parse=float)
    id_loss_weight: float = option(0.0, "weight of the identity loss", aliases=["-idlw"], parse=float)
    label_smoothing: float = option(0.0, "share of the identity loss's target that is spread over all identities")
    center_loss_weight: float = option(0.0, "weight of the center loss")
    num_models: int = option(1, "models that are trained together and learn from each other (mutual learning)")
    models_apart: bool = option(False, "each of --num_models on a device of its own, or in a process of its own")
    pm_loss_weight: float = option(0.0, "weight of the mutual loss on probabilities", aliases=["-pmlw"])
    gdm_loss_weight: float = option(0.0, "weight of the mutual loss on global distances", aliases=["-gdmlw"])
    ldm_loss_weight: float = option(0.0, "weight of the mutual loss on local distances", aliases=["-ldmlw"])
    # schedule
    total_epochs: int = option(300, "epochs to train; an epoch shows every identity once")
    base_lr: float = option(2e-4, "learning rate of Adam before decay")
    lr_scale: str = option(
        "none", "multiply --base_lr by the number of processes, or its root", choices=["none", "linear", "sqrt"]
    )
    weight_decay: float = option(5e-4, "weight decay of Adam (added to the gradient)")
    decay_norms: bool = option(True, "decay biases and the weights of norms too")
    warmup_epochs: int = option(0, "epochs over which the learning rate rises from 1/100, step by step")
    lr_decay_type: str = option("exp", "learning rate schedule", choices=["exp", "staircase", "cosine"])
    exp_decay_at_epoch: int = option(151, "epoch from which the rate falls exponentially, to 1/1000 at the end")
    staircase_decay_at_epochs: tuple[int, ...] = option((101, 201), "epochs at which the rate drops")
    staircase_decay_multiply_factor: float = option(0.1, "factor of each drop")
    freeze_trunk_epochs: int = option(0, "first epochs in which only the heads are trained")
    freeze_stages: int = option(0, "stages of the trunk's 4 that are not trained, from the first, with the stem")
    freeze_stages_from: int = option(1, "epoch from which --freeze_stages holds; before it all are trained")
    ema_decay: float = option(0.0, "decay per step of the weights' moving average, which is tested; 0: no average")
    # evaluation
    only_test: bool = option(False, "evaluate --model_weight_file (or the run folder's checkpoint), do not train")
    use_local_distance: bool | None = option(
        None,
        "evaluate local distance: true, false, or auto (where the local branch was trained)",
        parse=parse_local_distance,
    )
    feature_after_bn: bool = option(False, "test the global feature after --bnneck's batch norm")
    test_distance: str = option("euclidean", "distance at test", choices=["euclidean", "cosine"])
    flip_test: bool = option(False, "test the mean of an image's features and its mirror image's")
    multi_query: bool = option(
        False, "measure multi-query too: queries pooled over their person's images in the camera"
    )
    eval_every: int = option(0, "evaluate after every so many epochs too, by global distance, and keep best.pth; 0: no")
    multi_query_pool: str = option("average", "how features are pooled for multi-query", choices=["average", "max"])
    # device
    device: str = option("auto", "device: npu, cuda, cpu, or auto, which takes the first of these that is there")
    npu: int | None = option(None, "index of the device (npu or cuda); default: 0, or the local rank")
    amp: str = option("O1", "mixed precision: O1 where the device has it, or O0 (float32)", choices=["O0", "O1"])
    amp_backend: str = option(
        "auto",
        "what casts at O1: native (torch), apex (Huawei's, for npu), or auto, which is native",
        choices=["auto", "native", "apex"],
    )
    loss_scale: float | None = option(
        128.0, "loss scale of float16: a number (static) or dynamic", parse=parse_loss_scale
    )
    tf32: bool = option(False, "round the float32 input of convolutions to TF32 (cuda) or HF32 (npu); speeds up O0")
    deterministic: bool = option(False, "same flags and seed, same bits: deterministic operators, some of them slower")
    compile: bool = option(False, "torch.compile the model, for training and for features (it takes minutes)")
    addr: str = option("", "address of the first machine of several; default: MASTER_ADDR, or this one")
    timeout: int = option(600, "seconds without a sign of life after which a process of several counts as hung")
    # run
    exp_dir: str = option("", "run folder; default: exp/train/<data set>/<settings>/run<N>", parse=expand_home)
    run: int = option(1, "number of the run, for the default run folder", aliases=["-r"])
    resume: bool = option(False, "go on from the run folder's ckpt.pth")
    checkpoint_every_steps: int = option(0, "write ckpt.pth every so many steps too, not only after epochs; 0: no")
    stop_on_collapse: bool = option(False, "end a run that has collapsed, with status 3; it is named in the log anyway")
    repeat: int = option(1, "runs with seeds that count up; their mean and standard deviation are reported")
    seed: int | None = option(None, "seed of everything random; default: drawn at random and logged")
    set_seed: bool = option(False, "true is --seed 1")
    profile: int = option(0, "count what a step computes and trace this many steps, into profile/ of the run folder")
    log_to_file: bool = option(True, "write log.txt and tensorboard files into the run folder")
    given: frozenset[str] = field(default=frozenset(), compare=False)  # names of the options that were given

    @classmethod
    def from_arguments(cls, arguments: Sequence[str] | None = None) -> Config:
        """Parse command-line arguments (default: sys.argv); a mistake prints one line and exits with status 2."""
        parser = make_parser()
        values = vars(parser.parse_args(arguments))
        try:
            return cls.of(**values).checked()
        except InputError as error:
            parser.error(str(error))

    @classmethod
    def of(cls, **values: Any) -> Config:
        """The recipe's settings with `values`, which are what a user gave, on top."""
        recipe = RECIPES[values.get("recipe", "reference")]
        return cls(**{**recipe, **values}, given=frozenset(values))

    def checked(self) -> Config:
        """Self, with --set_seed resolved; raises InputError where a value is out of range."""
        if line := broken_rule(self):
            raise InputError(line)
        for one in OPTIONS:
            value = getattr(self, one.name)
            largest = LARGEST.get(type(value), math.inf)
            if isinstance(value, (int, float)) and not abs(value) <= largest:
                raise InputError(f"--{one.name} is a number up to {largest:.0f}, and {value:g} was given")
        return replace(self, seed=1) if self.set_seed and self.seed is None else self

    @property
    def dataset_names(self) -> list[str]:
        """The data sets of the run, in order: those that --dataset joins with +, or the only one."""
        return self.dataset.split("+")

    @property
    def loss_weights(self) -> tuple[float, float, float]:
        """Weights of the global, the local and the identity loss."""
        return self.g_loss_weight, self.l_loss_weight, self.id_loss_weight

    @property
    def trains_beside_trunk(self) -> bool:
        """Whether a loss has parameters to train where the trunk stays as it is."""
        return self.l_loss_weight > 0.0 or self.id_loss_weight > 0.0 or self.pooling == "gem"

    @property
    def mutual_weights(self) -> tuple[float, float, float]:
        """Weights of the mutual losses on probabilities, global and local distances."""
        return self.pm_loss_weight, self.gdm_loss_weight, self.ldm_loss_weight

    @property
    def run_dir(self) -> Path:
        """--exp_dir, or the reference's naming of a run by its settings."""
        if self.exp_dir:
            return Path(self.exp_dir)
        decay = f"exp_decay_at_{self.exp_decay_at_epoch}"
        if self.lr_decay_type == "cosine":
            decay = "cosine"
        elif self.lr_decay_type == "staircase":
            epochs = "_".join(str(epoch) for epoch in self.staircase_decay_at_epochs)
            decay = f"staircase_decay_at_{epochs}_factor_{self.staircase_decay_multiply_factor:g}"
        settings = "_".join(
            [
                *([] if self.recipe == "reference" else [self.recipe]),
                "nf" if self.normalize_feature else "not_nf",
                "ohs" if self.local_dist_own_hard_sample else "not_ohs",
                f"gm_{margin_name(self.global_margin)}",
                f"lm_{margin_name(self.local_margin)}",
                f"glw_{self.g_loss_weight:g}",
                f"llw_{self.l_loss_weight:g}",
                f"idlw_{self.id_loss_weight:g}",
                *([] if self.num_models == 1 else [f"models_{self.num_models}"]),
                f"lr_{self.base_lr:g}",
                decay,
                f"total_{self.total_epochs}",
            ]
        )
        return Path("exp/train", self.dataset, settings, f"run{self.run}")

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, booleans, lists and None only: what JSON and a weights_only checkpoint can hold."""
        return json.loads(json.dumps({one.name: getattr(self, one.name) for one in OPTIONS}))

    def to_flags(self) -> list[str]:
        """The command line that gives these settings; options that are not set are left out."""
        values = {one.name: NONE_AS.get(one.name, "") for one in OPTIONS}
        set_values = {one.name: getattr(self, one.name) for one in OPTIONS}
        values |= {name: format_option(value) for name, value in set_values.items() if value is not None}
        return [f"--{name}={value}" for name, value in values.items() if value]

    def differences(self, other: dict[str, Any]) -> list[str]:
        """'name: theirs -> ours' for every option whose value differs from those of another run's `to_dict()`."""
        return [
            f"{name}: {other[name]} -> {value}"
            for name, value in self.to_dict().items()
            if other.get(name, value) != value
        ]

    def differences_by_effect(self, other: dict[str, Any]) -> tuple[list[str], list[str]]:
        """`differences` of a resumed run: those that change what it ends with, and those that do not."""
        lines = [line for line in self.differences(other) if not line.startswith("resume:")]
        matter = [line for line in lines if line.split(":")[0] not in WITHOUT_EFFECT]
        return matter, [line for line in lines if line not in matter]


OPTIONS = tuple(one for one in fields(Config) if "help" in one.metadata)


def margin_name(margin: float | None) -> str:
    return "soft" if margin is None else f"{margin:g}"


def make_parser() -> argparse.ArgumentParser:
    """The parser of `script/train.py`: one flag per field of Config."""
    parser = OneLineParser(allow_abbrev=False, description="Train and evaluate AlignedReID.")
    for one in OPTIONS:
        parser.add_argument(
            *flags_of(one),
            dest=one.name,
            default=argparse.SUPPRESS,  # what is not given is the recipe's
            type=one.metadata["parse"] or PARSERS[str(one.type)],
            choices=one.metadata["choices"] or None,
            metavar=None if one.metadata["choices"] else "X",
            help=one.metadata["help"].replace("%", "%%")
            + (f" (default: {default_of(one)})" if default_of(one) else ""),
        )
    return parser


def flags_of(one: Any) -> list[str]:
    return [f"--{one.name}", *one.metadata["aliases"]]


def default_of(one: Any) -> str:
    """A field's default as it is written on the command line; empty where it is not set."""
    return NONE_AS.get(one.name, "") if one.default is None else format_option(one.default)


def markdown_table() -> str:
    """The README's table of flags."""
    rows = ["| flag | default | what it does |", "| --- | --- | --- |"]
    for one in OPTIONS:
        names = ", ".join(f"`{flag}`" for flag in flags_of(one))
        default = "random" if one.name == "seed" else default_of(one)
        choices = " (" + ", ".join(one.metadata["choices"]) + ")" if one.metadata["choices"] else ""
        rows.append(f"| {names} | {default and f'`{default}`'} | {one.metadata['help']}{choices} |")
    return "\n".join(rows)
