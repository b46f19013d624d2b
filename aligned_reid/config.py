"""Every option of a run, once: the parser, the log, the checkpoint and the README's table come from it."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from aligned_reid.errors import InputError


def parse_bool(text: str) -> bool:
    """'true' or 'false' in any case; anything else is refused (`bool('false')` would be True)."""
    try:
        return {"true": True, "false": False}[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def parse_ints(text: str) -> tuple[int, ...]:
    """'256,128' or '(256, 128)' -> (256, 128). Parsed, never evaluated."""
    try:
        return tuple(int(part) for part in text.strip().strip("()[]").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 256,128") from None


def parse_height_width(text: str) -> tuple[int, int]:
    size = parse_ints(text)
    if len(size) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width such as 256,128")
    return size[0], size[1]


def parse_margin(text: str) -> float | None:
    """A number, or 'none' for the soft margin log(1 + exp(dist_ap - dist_an))."""
    if text.strip().lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none (soft margin)") from None


def parse_loss_scale(text: str) -> float | None:
    """A positive number for a static scale, or 'dynamic' (None)."""
    if text.strip().lower() == "dynamic":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.0 < scale < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor dynamic")
    return scale


def parse_local_distance(text: str) -> bool | None:
    """'true', 'false', or 'auto' (None): where the local branch was trained."""
    return None if text.strip().lower() == "auto" else parse_bool(text)


PARSERS: dict[str, Callable[[str], Any]] = {
    "bool": parse_bool,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": parse_margin,
    "str": str,
    "tuple[int, int]": parse_height_width,
    "tuple[int, ...]": parse_ints,
}


# How None is written on the command line; options that are not here are just left out.
NONE_AS = {"global_margin": "none", "local_margin": "none", "loss_scale": "dynamic", "use_local_distance": "auto"}

# Options that a resumed training ends with the same weights whatever they are.
WITHOUT_EFFECT = {
    "dataset",
    "workers",
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

    # data
    data_path: str = option("", "folder with images/ and partitions.pkl", aliases=["--data_pth"])
    dataset: str = option("market1501", "name of the data set, for the log and the run folder")
    partition_file: str = option("", "partition file; default: partitions.pkl in --data_path", aliases=["--pkl"])
    trainset_part: str = option("trainval", "identities to train on", choices=["trainval", "train"])
    resize_h_w: tuple[int, int] = option((256, 128), "height,width of the images that the model sees, in pixels")
    crop_prob: float = option(0.0, "probability that a training image is cropped at random")
    crop_ratio: float = option(1.0, "smallest share of height and of width that a random crop keeps")
    workers: int = option(
        4, "processes that decode images, per device, at most one a processor; 0: in the main process"
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
    # model
    pretrained: str = option("imagenet", "start of the trunk: imagenet, none, or a file with ResNet-50 weights")
    model_weight_file: str = option("", "weights to start or test from: a file, or a folder that holds ckpt.pth")
    # losses
    normalize_feature: bool = option(False, "bring features to unit length, in training and test")
    local_dist_own_hard_sample: bool = option(False, "the local loss mines its own hard samples, not the global ones")
    global_margin: float | None = option(0.3, "margin of the global triplet loss; none: soft margin", aliases=["-gm"])
    local_margin: float | None = option(0.3, "margin of the local triplet loss; none: soft margin", aliases=["-lm"])
    g_loss_weight: float = option(1.0, "weight of the global triplet loss", aliases=["-glw"], parse=float)
    l_loss_weight: float = option(0.0, "weight of the local triplet loss", aliases=["-llw"], parse=float)
    id_loss_weight: float = option(0.0, "weight of the identity loss", aliases=["-idlw"], parse=float)
    # schedule
    total_epochs: int = option(300, "epochs to train; an epoch shows every identity once")
    base_lr: float = option(2e-4, "learning rate of Adam before decay")
    lr_scale: str = option(
        "none", "multiply --base_lr by the number of processes, or its root", choices=["none", "linear", "sqrt"]
    )
    lr_decay_type: str = option("exp", "learning rate schedule", choices=["exp", "staircase"])
    exp_decay_at_epoch: int = option(151, "epoch from which the rate falls exponentially, to 1/1000 at the end")
    staircase_decay_at_epochs: tuple[int, ...] = option((101, 201), "epochs at which the rate drops")
    staircase_decay_multiply_factor: float = option(0.1, "factor of each drop")
    # evaluation
    only_test: bool = option(False, "evaluate --model_weight_file (or the run folder's checkpoint), do not train")
    use_local_distance: bool | None = option(
        None,
        "evaluate local distance: true, false, or auto (where the local branch was trained)",
        parse=parse_local_distance,
    )
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
    exp_dir: str = option("", "run folder; default: exp/train/<data set>/<settings>/run<N>")
    run: int = option(1, "number of the run, for the default run folder", aliases=["-r"])
    resume: bool = option(False, "go on from the run folder's ckpt.pth")
    checkpoint_every_steps: int = option(0, "write ckpt.pth every so many steps too, not only after epochs; 0: no")
    seed: int | None = option(None, "seed of everything random; default: drawn at random and logged")
    set_seed: bool = option(False, "true is --seed 1")
    profile: int = option(0, "count what a step computes and trace this many steps, into profile/ of the run folder")
    log_to_file: bool = option(True, "write log.txt and tensorboard files into the run folder")

    @classmethod
    def from_arguments(cls, arguments: Sequence[str] | None = None) -> Config:
        """Parse command-line arguments (default: sys.argv); a mistake prints one line and exits with status 2."""
        parser = make_parser()
        values = vars(parser.parse_args(arguments))
        try:
            return cls(**values).checked()
        except InputError as error:
            parser.error(str(error))

    def checked(self) -> Config:
        """Self, with --set_seed resolved; raises InputError where a value is out of range."""
        from dataclasses import replace

        rules = [
            (self.ids_per_batch >= 2, "--ids_per_batch is at least 2: an anchor needs a negative"),
            (self.ims_per_id >= 2, "--ims_per_id is at least 2: an anchor needs a positive"),
            (self.total_epochs >= 1, "--total_epochs is at least 1"),
            (self.workers >= 0, "--workers is 0 or more"),
            (0.0 < self.base_lr < 1e3, "--base_lr is a positive number"),
            (min(self.resize_h_w) >= 32, "--resize_h_w is at least 32,32 pixels"),
            (0.0 <= self.crop_prob <= 1.0, "--crop_prob is a probability, 0 to 1"),
            (0.0 < self.crop_ratio <= 1.0, "--crop_ratio is above 0 and at most 1"),
            (self.checkpoint_every_steps >= 0, "--checkpoint_every_steps is a number of steps, 0 or more"),
            (self.eval_every >= 0, "--eval_every is a number of epochs, 0 or more"),
            (self.timeout >= 1, "--timeout is a number of seconds, 1 or more"),
            (self.profile >= 0, "--profile is a number of steps, 0 or more"),
            (self.run >= 1, "--run counts from 1"),
            (self.seed is None or 0 <= self.seed < 2**31, "--seed is a whole number from 0 to 2147483647"),
            (self.amp == "O1" or self.amp_backend != "apex", "--amp_backend apex needs --amp O1"),
            (self.npu is None or self.npu >= 0, "--npu is a device index, 0 or more"),
            (min(self.loss_weights) >= 0.0, "loss weights (-glw, -llw, -idlw) are 0 or more"),
            (self.only_test or sum(self.loss_weights) > 0.0, "one of -glw, -llw, -idlw has to be above 0"),
            (self.exp_decay_at_epoch >= 1, "--exp_decay_at_epoch counts from 1"),
        ]
        for holds, rule in rules:
            if not holds:
                raise InputError(rule)
        return replace(self, seed=1) if self.set_seed and self.seed is None else self

    @property
    def loss_weights(self) -> tuple[float, float, float]:
        """Weights of the global, the local and the identity loss."""
        return self.g_loss_weight, self.l_loss_weight, self.id_loss_weight

    @property
    def run_dir(self) -> Path:
        """--exp_dir, or the reference's naming of a run by its settings."""
        if self.exp_dir:
            return Path(self.exp_dir)
        decay = f"exp_decay_at_{self.exp_decay_at_epoch}"
        if self.lr_decay_type == "staircase":
            epochs = "_".join(str(epoch) for epoch in self.staircase_decay_at_epochs)
            decay = f"staircase_decay_at_{epochs}_factor_{self.staircase_decay_multiply_factor:g}"
        settings = "_".join(
            [
                "nf" if self.normalize_feature else "not_nf",
                "ohs" if self.local_dist_own_hard_sample else "not_ohs",
                f"gm_{margin_name(self.global_margin)}",
                f"lm_{margin_name(self.local_margin)}",
                f"glw_{self.g_loss_weight:g}",
                f"llw_{self.l_loss_weight:g}",
                f"idlw_{self.id_loss_weight:g}",
                f"lr_{self.base_lr:g}",
                decay,
                f"total_{self.total_epochs}",
            ]
        )
        return Path("exp/train", self.dataset, settings, f"run{self.run}")

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, booleans, lists and None only: what JSON and a weights_only checkpoint can hold."""
        return json.loads(json.dumps(asdict(self)))

    def to_flags(self) -> list[str]:
        """The command line that gives these settings; options that are not set are left out."""
        values = {one.name: NONE_AS.get(one.name, "") for one in fields(self)}
        values |= {name: format_option(value) for name, value in vars(self).items() if value is not None}
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


def margin_name(margin: float | None) -> str:
    return "soft" if margin is None else f"{margin:g}"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest flag's name, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        if unknown.startswith("-") and message.startswith("unrecognized"):
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown, flags, n=1)
            message = f"unknown flag {unknown}" + (f" (did you mean {near[0]}?)" if near else "")
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """The parser of `script/train.py`: one flag per field of Config."""
    parser = OneLineParser(allow_abbrev=False, description="Train and evaluate AlignedReID.")
    for one in fields(Config):
        parser.add_argument(
            *flags_of(one),
            dest=one.name,
            default=one.default,
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


def format_option(value: Any) -> str:
    """A value other than None as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def markdown_table() -> str:
    """The README's table of flags."""
    rows = ["| flag | default | what it does |", "| --- | --- | --- |"]
    for one in fields(Config):
        names = ", ".join(f"`{flag}`" for flag in flags_of(one))
        default = "random" if one.name == "seed" else default_of(one)
        choices = " (" + ", ".join(one.metadata["choices"]) + ")" if one.metadata["choices"] else ""
        rows.append(f"| {names} | {default and f'`{default}`'} | {one.metadata['help']}{choices} |")
    return "\n".join(rows)
