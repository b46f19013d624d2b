"""AlignedReID: a ResNet-50 trunk with a global, a local and an identity head (arXiv:1711.08184, section 3)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from aligned_reid.errors import InputError
from aligned_reid.weights import find_state_dict, load_trunk, read_imagenet_weights, read_state_dict

TRUNK_CHANNELS = 2048
TRUNK_STRIDE = 32
RESIDUAL_START = 0.2


class Features(NamedTuple):
    """What the model makes of N images."""

    global_feat: Tensor  # [N, 2048]
    local_feat: Tensor  # [N, H, local_channels]: H stripes from top to bottom, 8 for 256 pixels of height
    logits: Tensor | None  # [N, num_classes]; None for a model without classifier


class AlignedReID(nn.Module):
    """The model; its parameters are named as the reference's: base.*, local_conv.*, local_bn.*, fc.*.

    num_classes: identities of the classifier; None for a model without one.
    local_channels: channels of a stripe's feature.
    pretrained: start of the trunk: "imagenet" (torchvision's weights), "none", or the path of a ResNet-50 state dict.
    Raises InputError where the weights cannot be had, are no weights, or lack a tensor of the trunk.
    """

    def __init__(self, num_classes: int | None, local_channels: int = 128, pretrained: str = "imagenet") -> None:
        super().__init__()
        self.base = make_trunk()
        self.local_conv = nn.Conv2d(TRUNK_CHANNELS, local_channels, kernel_size=1)
        self.local_bn = nn.BatchNorm2d(local_channels)
        self.local_relu = nn.ReLU(inplace=True)
        self.fc: nn.Linear | None = None
        if num_classes is not None:
            self.fc = nn.Linear(TRUNK_CHANNELS, num_classes)
            nn.init.normal_(self.fc.weight, std=0.001)
            nn.init.zeros_(self.fc.bias)
        if pretrained == "none":
            start_near_identity(self.base)
            self.trunk_report = "trunk: random start"
        else:
            weights = read_imagenet_weights() if pretrained == "imagenet" else read_state_dict(pretrained)
            self.trunk_report = load_trunk(self.base, weights, source=pretrained)

    def train_heads(self, *, local: bool, identity: bool) -> None:
        """Freeze a head that no loss uses: it takes no gradient, is not decayed, and DDP does not wait for it."""
        self.local_conv.requires_grad_(local)
        self.local_bn.requires_grad_(local)
        if self.fc is not None:
            self.fc.requires_grad_(identity)

    def feature_shapes(self, size: tuple[int, int], *, local: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of one image's features, by name in a feature file; size: height and width of the image."""
        stripes = -(-size[0] // TRUNK_STRIDE)
        local_shape = {"local": (stripes, self.local_conv.out_channels)} if local else {}
        return {"global": (TRUNK_CHANNELS,), **local_shape}

    def forward(self, images: Tensor) -> Features:
        """images [N, 3, h, w], normalised; h and w are multiples of 32 (256 x 128 gives 8 stripes)."""
        feat = self.base(images)  # [N, 2048, H, W]
        global_feat = feat.mean(dim=(2, 3))
        stripes = feat.mean(dim=3, keepdim=True)  # [N, 2048, H, 1]
        local_feat = self.local_relu(self.local_bn(self.local_conv(stripes)))
        local_feat = local_feat.squeeze(3).transpose(1, 2)  # [N, H, local_channels]
        logits = self.fc(global_feat) if self.fc is not None else None
        return Features(global_feat, local_feat, logits)


def make_trunk() -> nn.Sequential:
    """torchvision's ResNet-50 without pooling and classifier; its tensors keep torchvision's names."""
    resnet = torchvision.models.resnet50(weights=None)
    return nn.Sequential(OrderedDict((n, m) for n, m in resnet.named_children() if n not in ("avgpool", "fc")))


def start_near_identity(trunk: nn.Module) -> None:
    """Let each residual block of a random trunk begin as little more than its shortcut.

    The last batch norm of a block starts at 0.2, not at 1, in the spirit of arXiv:1706.02677, section 5.1, which starts
    it at 0. On drawn pedestrians a trunk then learns in 70 steps what it otherwise does not learn in 300.
    """
    for module in trunk.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, RESIDUAL_START)


def open_model(content: Any, source: str, *, need_local: bool) -> tuple[AlignedReID, str]:
    """The model without classifier that a weight file's `content` holds, and a line that says what was loaded.

    Raises InputError where the trunk, or with `need_local` the local branch, is not whole in it.
    """
    weights = find_state_dict(content, source)
    local_channels = len(weights["local_bn.weight"]) if "local_bn.weight" in weights else 128
    model = AlignedReID(None, local_channels, pretrained="none")
    return model, load_weights(model, weights, source, need_local=need_local)


def load_weights(model: AlignedReID, weights: dict[str, Tensor], source: str, *, need_local: bool) -> str:
    """Copy a whole model's `weights` into `model` in place; returns a line that says what was loaded.

    The classifier is left at its start where it is missing or knows another number of identities (fine-tuning on other
    people). The local head may be missing unless `need_local`. Raises InputError where the trunk does not fit.
    """
    report = load_trunk(model.base, weights, source)
    own = model.state_dict()
    heads = {name: value for name, value in weights.items() if name in own and not name.startswith("base.")}
    missing = [name for name in own if name.startswith("local_") and name not in heads and "num_batches" not in name]
    wrong = [name for name in heads if name.startswith("local_") and heads[name].shape != own[name].shape]
    if need_local and (missing or wrong):
        raise InputError(
            f"{source} has no local branch that fits ({(missing + wrong)[0]}): use --use_local_distance false"
        )
    fitting = {name: value for name, value in heads.items() if value.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    heads_report = "local head " + ("not loaded" if missing or wrong else "loaded")
    if model.fc is not None:
        heads_report += ", classifier " + ("loaded" if "fc.weight" in fitting else "not loaded (other identities)")
    return f"{report}; {heads_report}"
