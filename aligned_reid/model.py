"""AlignedReID: a ResNet-50 trunk with a global, a local and an identity head (arXiv:1711.08184, section 3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from aligned_reid.distance import at_least_float32
from aligned_reid.errors import InputError
from aligned_reid.weights import find_state_dict, fits, load_trunk, read_imagenet_weights, read_state_dict, settings_of

TRUNK_CHANNELS = 2048
TRUNK_STRIDE = 32
HEADS = {"local head": "local_", "pooling": "pooling.", "neck": "neck.", "classifier": "fc."}  # prefixes of names


class Features(NamedTuple):
    """Output of the model for N images."""

    global_feat: Tensor  # [N, 2048]
    local_feat: Tensor  # [N, H, local_channels], H stripes from top to bottom: 8 for a height of 256 pixels
    logits: Tensor | None  # [N, num_classes]; None if the model has no classifier


class GeneralizedMean(nn.Module):
    """Pooling between mean (p = 1) and maximum (large p), with p learned: [N, C, H, W] -> [N, C].

    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", arXiv:1711.02512, equation 3. Computes
    in at least float32.
    """

    def __init__(self, start: float = 3.0, smallest: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(start))
        self.smallest = smallest

    def forward(self, feat: Tensor) -> Tensor:
        with torch.autocast(feat.device.type, enabled=False):
            powers = at_least_float32(feat).clamp(min=self.smallest).pow(self.p)
            return powers.mean(dim=(2, 3)).pow(1.0 / self.p)


class AlignedReID(nn.Module):
    """The model; its parameters have the names of the reference: base.*, local_conv.*, local_bn.*, fc.*.

    num_classes: identities of the classifier; None for a model without classifier.
    local_channels: width of a stripe's feature.
    pretrained: initial weights of the trunk: "imagenet" (torchvision's), "none", or the path of a ResNet-50 state dict.
    last_stride: stride of the trunk's last stage; 1 doubles the number of stripes.
    pooling: of the global feature: "avg", or "gem" (GeneralizedMean).
    bnneck: classify the global feature after a batch norm without shift, neck.* (arXiv:1903.07071, section 3.6).
    feature_after_bn: in eval mode, return the global feature after that batch norm.
    Raises InputError if the weights cannot be read or downloaded, or do not contain a whole trunk.
    """

    def __init__(
        self,
        num_classes: int | None,
        local_channels: int = 128,
        pretrained: str = "imagenet",
        *,
        last_stride: int = 2,
        pooling: str = "avg",
        bnneck: bool = False,
        feature_after_bn: bool = False,
    ) -> None:
        super().__init__()
        self.base = make_trunk()
        self.stride = TRUNK_STRIDE
        if last_stride == 1:
            self.stride //= 2
            for module in self.base.get_submodule("layer4.0").modules():
                if isinstance(module, nn.Conv2d):  # the 3 x 3 convolution and the shortcut have stride 2
                    module.stride = (1, 1)
        self.pooling = GeneralizedMean() if pooling == "gem" else None
        self.neck = nn.BatchNorm1d(TRUNK_CHANNELS) if bnneck else None
        if self.neck is not None:
            self.neck.bias.requires_grad_(False)  # stays 0, so the classifier separates identities by angle
        self.feature_after_bn = feature_after_bn
        self.local_conv = nn.Conv2d(TRUNK_CHANNELS, local_channels, kernel_size=1)
        self.local_bn = nn.BatchNorm2d(local_channels)
        self.local_relu = nn.ReLU(inplace=True)
        self.fc: nn.Linear | None = None
        if num_classes is not None:
            self.fc = nn.Linear(TRUNK_CHANNELS, num_classes, bias=not bnneck)
            nn.init.normal_(self.fc.weight, std=0.001)
            if self.fc.bias is not None:
                nn.init.zeros_(self.fc.bias)
        if pretrained == "none":
            start_near_identity(self.base)
            self.trunk_report = "trunk: random start"
        else:
            weights = read_imagenet_weights() if pretrained == "imagenet" else read_state_dict(pretrained)
            self.trunk_report = load_trunk(self.base, weights, source=pretrained)

    def train_heads(self, *, local: bool, identity: bool) -> None:
        """Freeze heads that no loss uses: they get no gradient or weight decay, and DDP does not wait for them."""
        self.local_conv.requires_grad_(local)
        self.local_bn.requires_grad_(local)
        if self.fc is not None:
            self.fc.requires_grad_(identity)
        if self.neck is not None:
            self.neck.weight.requires_grad_(identity)

    def freeze_stages(self, num_stages: int) -> None:
        """Freeze the stem and the first `num_stages` of the trunk's 4 stages, and unfreeze the others.

        0 unfreezes the whole trunk. Batch norm statistics of frozen stages stay fixed. Call this after train().
        """
        last_frozen = f"layer{num_stages}"
        frozen = num_stages > 0
        for name, part in self.base.named_children():
            part.requires_grad_(not frozen)
            part.train(self.training and not frozen)
            frozen = frozen and name != last_frozen

    def feature_shapes(self, size: tuple[int, int], *, local: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of one image's features by their names in a feature file; size: image height and width."""
        stripes = -(-size[0] // self.stride)
        local_shape = {"local": (stripes, self.local_conv.out_channels)} if local else {}
        return {"global": (TRUNK_CHANNELS,), **local_shape}

    def forward(self, images: Tensor) -> Features:
        """images [N, 3, h, w], normalized; h and w are multiples of 32 (256 x 128 gives 8 stripes)."""
        feat = self.base(images)  # [N, 2048, H, W]
        global_feat = feat.mean(dim=(2, 3)) if self.pooling is None else self.pooling(feat)
        stripes = feat.mean(dim=3, keepdim=True)  # [N, 2048, H, 1]
        local_feat = self.local_relu(self.local_bn(self.local_conv(stripes)))
        local_feat = local_feat.squeeze(3).transpose(1, 2)  # [N, H, local_channels]
        normed = global_feat if self.neck is None else self.neck(global_feat)
        logits = self.fc(normed) if self.fc is not None else None
        if self.feature_after_bn and not self.training:
            global_feat = normed
        return Features(global_feat, local_feat, logits)


def make_trunk() -> nn.Sequential:
    """torchvision's ResNet-50, with its names, without pooling and classifier: [N, 3, h, w] -> [N, 2048, H, W]."""
    resnet = torchvision.models.resnet50(weights=None)
    return nn.Sequential(OrderedDict((n, m) for n, m in resnet.named_children() if n not in ("avgpool", "fc")))


def start_near_identity(trunk: nn.Module) -> None:
    """Initialize each residual block of a random trunk to little more than its shortcut.

    The scale of its last batch norm starts at 0.2 instead of 1; arXiv:1706.02677, section 5.1, starts it at 0. On
    synthetic pedestrians, a trunk then learns in 70 steps what it otherwise does not learn in 300.
    """
    for module in trunk.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.2)


def architecture_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of AlignedReID from a run's settings."""
    return {
        name: settings[name] for name in ("last_stride", "pooling", "bnneck", "feature_after_bn") if name in settings
    }


def open_model(
    content: Any, source: str, *, need_local: bool, settings: Mapping[str, Any] | None = None
) -> tuple[AlignedReID, str]:
    """Build a model without classifier from a weight file's `content`; also returns the report of `load_weights`.

    settings: the run's settings; default: those stored in the file. Raises InputError as `load_weights` does.
    """
    weights = find_state_dict(content, source)
    local_channels = weights["local_bn.weight"].numel() if "local_bn.weight" in weights else 128
    architecture = architecture_of(settings_of(content) if settings is None else settings)
    model = AlignedReID(None, local_channels, pretrained="none", **architecture)
    return model, load_weights(model, weights, source, need_local=need_local)


def load_weights(model: AlignedReID, weights: dict[str, Tensor], source: str, *, need_local: bool) -> str:
    """Copy `weights` into `model` in place; returns a line that lists what was loaded and what was not.

    A head is loaded completely or keeps its initial weights, such as a classifier of other identities. Raises
    InputError if the trunk or a required head does not fit: the local head with `need_local`, and without a classifier
    the model's pooling, and its neck if the feature is taken after it.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    ours = any(name.startswith("base.") for name in weights)  # else `fc` belongs to another network
    heads = {name: value for name, value in weights.items() if ours and name in own}
    reports = [load_trunk(model.base, {name: value for name, value in weights.items() if name not in heads}, source)]
    misfits = {}
    for head, start in HEADS.items():
        tensors = [name for name in own if name.startswith(start)]
        missing = [name for name in tensors if name not in heads and not name.endswith("num_batches_tracked")]
        wrong = [name for name in tensors if name in heads and not fits(heads[name], own[name])]
        if missing:
            misfits[head] = f"{missing[0]} is not in the file" if ours else "the file holds another model"
        elif wrong:
            misfits[head] = "other identities" if head == "classifier" else f"{wrong[0]} has another shape"
        else:
            model.load_state_dict({name: heads[name] for name in tensors if name in heads}, strict=False)
        if tensors:
            reports.append(f"{head} not loaded ({misfits[head]})" if head in misfits else f"{head} loaded")
    if need_local and "local head" in misfits:
        raise InputError(
            f"{source} has no local branch that fits ({misfits['local head']}): use --use_local_distance false"
        )
    if model.feature_after_bn and model.fc is None and "neck" in misfits:
        raise InputError(f"{source} has no neck.weight: it was trained without --bnneck true; leave --bnneck out")
    if model.pooling is not None and model.fc is None and "pooling" in misfits:
        raise InputError(f"{source} has no pooling.p: it was trained without --pooling gem; leave --pooling out")
    return f"{reports[0]}; {', '.join(reports[1:])}"
