"""ResNet-50 models of other projects, read in place: their names, the layers after pooling, and how they are tested."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aligned_reid.errors import InputError
from aligned_reid.model import TRUNK_CHANNELS, AlignedReID, architecture_of, load_weights
from aligned_reid.weights import TRUNK_PARTS, first_line, printable

TRUNK_START = "layer1.0.conv1.weight"
COUNTER = {"num_batches_tracked": torch.tensor(0)}  # of a batch norm; old files lack it
WRAPPERS = ("", "module.", "_orig_mod.")


class Project(NamedTuple):
    """How a project names the parts of its ResNet-50 model, and what its test does differently from ours."""

    name: str
    mark: str  # a pattern of names that tells its files from others
    trunk: str  # prefix of the trunk's names, which then are torchvision's
    settings: Mapping[str, Any] = {}  # options of Config, for tests
    neck: str = ""  # a pattern of the prefix of the layers from the pooled feature to the tested one
    neck_ends_in_relu: bool = False
    pooling: str = ""  # name of GeM's exponent
    stem: Mapping[str, nn.Module] = {}  # layers of the trunk in place of torchvision's


# torchreid's resnet50_fc512 has the layers `fc` and last stride 1; its plain resnet50 has neither.
PROJECTS = (
    Project(
        "fast-reid",
        r"heads\.(?:weight|classifier|bottleneck|bnneck)",
        "backbone.",
        {"last_stride": 1, "test_distance": "cosine"},
        neck=r"heads\.(?:bottleneck|bnneck)\.",
        pooling="heads.pool_layer.p",
        stem={"maxpool": nn.MaxPool2d(3, stride=2, ceil_mode=True)},
    ),
    Project(
        "reid-strong-baseline",
        r"bottleneck\.weight",
        "base.",
        {"last_stride": 1, "test_distance": "cosine"},
        neck=r"bottleneck\.",
        stem={"relu": nn.Identity()},
    ),
    Project(
        "Person_reID_baseline_pytorch",
        r"classifier\.add_block\.",
        "model.",
        {"test_distance": "cosine", "flip_test": True},
        neck=r"classifier\.add_block\.",
    ),
    Project(
        "torchreid (resnet50_fc512)", r"fc\.0\.weight", "", {"last_stride": 1}, neck=r"fc\.", neck_ends_in_relu=True
    ),
    Project("torchreid (resnet50)", r"classifier\.weight", ""),
)
# Networks that are not a ResNet-50 with one global feature, by a name that only they have; the first match counts.
OTHER_NETWORKS = {
    "OSNet": r"conv2\.0\.conv2a\.",
    "MLFN": r"\.fm_conv1\.",
    "HACNN": r"(^|\.)ha1\.",
    "PCB": r"(^|\.)(classifier5\.|classifier\.5\.weight)",
    "MGN": r"(^|\.)b1_head\.",
    "ResNet-50 with mid-level features": r"(^|\.)fc_fusion\.",
    "ResNet-50 with non-local blocks": r"\.NL_\d\.",
    "ResNet-50 with spatial attention": r"(^|\.)usam_1\.",
    "Swin Transformer": r"layers\.\d+\.blocks\.\d+\.attn\.",
    "vision transformer": r"(^|\.)(cls_token|patch_embed\.)",
    "ConvNeXt": r"stages\.\d\.blocks\.\d+\.conv_dw\.",
    "HRNet": r"stage[234]\.\d\.branches\.",
    "EfficientNet": r"(^|\.)_blocks\.\d+\.",
    "DenseNet": r"\.denseblock1\.",
    "MobileNet or ShuffleNet": r"features\.\d+\.conv\.\d|(^|\.)(conv2\.0\.dwconv2|stage2\.0)\.",
    "Inception": r"(?i)(^|\.)mixed_?5b\.|features\.\d+\.branch0",
}


def find_project(weights: Mapping[str, Tensor], source: str) -> tuple[Project, str] | None:
    """The project that a model's names are of, and the prefix before its names; None for ours and bare trunks.

    Raises InputError, which names the network, if it is one of OTHER_NETWORKS.
    """
    for network, pattern in OTHER_NETWORKS.items():
        if telling := next((name for name in weights if re.search(pattern, name)), None):
            raise InputError(
                f"{source} holds {network}, not a ResNet-50 with one global feature ({printable(telling)}): "
                "use it in the project that it comes from"
            )
    for project in PROJECTS:
        for wrapper in WRAPPERS:
            marked = any(re.match(project.mark, name.removeprefix(wrapper)) for name in weights)
            if marked and wrapper + project.trunk + TRUNK_START in weights:
                return project, wrapper
    return None


def open_foreign(
    weights: Mapping[str, Tensor], project: Project, wrapper: str, source: str, settings: Mapping[str, Any]
) -> tuple[AlignedReID, str]:
    """The model in another project's file, and a line that lists what was loaded and what was not.

    settings: options of Config by name. The model has no local branch. Raises InputError if the trunk does not fit.
    """
    renamed, neck = {}, {}
    for name, value in weights.items():
        name = name.removeprefix(wrapper)
        inner = name.removeprefix(project.trunk)
        if project.neck and (match := re.match(project.neck, name)):
            neck[name[match.end() :]] = value
        elif name.startswith(project.trunk) and inner.split(".")[0] in TRUNK_PARTS:
            renamed["base." + inner] = value
        else:
            renamed[name] = value
    architecture = {**architecture_of(settings), "bnneck": False, "feature_after_bn": False}
    if project.pooling in renamed:
        renamed["pooling.p"] = renamed.pop(project.pooling).reshape(())
        architecture["pooling"] = "gem"
    model = AlignedReID(None, pretrained="none", **architecture)
    for name, layer in project.stem.items():
        setattr(model.base, name, layer)
    report = load_weights(model, renamed, source, need_local=False)
    if neck:
        layers = build_neck(neck, source, relu=project.neck_ends_in_relu)
        model.neck = layers  # type: ignore[assignment]  # ours is a batch norm
        model.feature_after_bn = True
        report += f", layers after pooling loaded ({', '.join(type(layer).__name__ for layer in layers)})"
    return model, f"{project.name}: {report}"


def build_neck(tensors: Mapping[str, Tensor], source: str, *, relu: bool) -> nn.Sequential:
    """The linear layers and batch norms [N, 2048] -> [N, D] with these tensors, named like "0.weight" or "weight"."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, part = name.rpartition(".")
        layers.setdefault(number, {})[part] = value.flatten(1) if value.dim() == 4 else value  # a 1 x 1 convolution
    built: list[nn.Module] = []
    width = TRUNK_CHANNELS
    try:
        for number in sorted(layers, key=lambda number: int(number or 0)):
            parts = layers[number]
            is_linear = parts["weight"].dim() == 2
            layer = nn.Linear(width, len(parts["weight"]), bias="bias" in parts) if is_linear else nn.BatchNorm1d(width)
            layer.load_state_dict(parts if is_linear else {**COUNTER, **parts})
            width = len(parts["weight"])
            built.append(layer)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: cannot read the layers after pooling ({first_line(error)})") from error
    return nn.Sequential(*built, *([nn.ReLU()] if relu else []))
