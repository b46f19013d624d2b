"""AlignedReID: a ResNet-50 trunk with a global, a local and an identity head (arXiv:1711.08184, section 3)."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

from aligned_reid.distance import at_least_float32
from aligned_reid.errors import InputError
from aligned_reid.weights import find_state_dict, fits, load_trunk, read_imagenet_weights, read_state_dict, settings_of

TRUNK_CHANNELS = 2048
TRUNK_STRIDE = 32
TRUNK_STAGES = 4
RESIDUAL_START = 0.2
HEADS = {"local head": "local_", "pooling": "pooling.", "neck": "neck.", "classifier": "fc."}  # how their tensors begin


class Features(NamedTuple):
    """What the model makes of N images."""

    global_feat: Tensor  # [N, 2048]
    local_feat: Tensor  # [N, H, local_channels]: H stripes from top to bottom, 8 for 256 pixels of height
    logits: Tensor | None  # [N, num_classes]; None for a model without classifier


class GeneralizedMean(nn.Module):
    """Pooling between mean (p = 1) and maximum (p large), p learnt: [N, C, H, W] -> [N, C].

    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", arXiv:1711.02512, equation 3. In at
    least float32.
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
    """The model; its parameters are named as the reference's: base.*, local_conv.*, local_bn.*, fc.*.

    With `bnneck` the classifier sees the global feature through a batch norm without shift, named neck.* (Luo et al.,
    arXiv:1903.07071, section 3.6); with `feature_after_bn` a model in eval mode gives the feature after it.

    num_classes: identities of the classifier; None for a model without one.
    local_channels: channels of a stripe's feature.
    last_stride: of the trunk's last stage; 1 doubles stripes and columns.
    pooling: of the global feature: "avg", or "gem", whose exponent is pooling.p.
    pretrained: start of the trunk: "imagenet" (torchvision's weights), "none", or the path of a ResNet-50 state dict.
    Raises InputError where the weights cannot be had, are no weights, or lack a tensor of the trunk.
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
            undo_last_stride(self.base)
            self.stride //= 2
        self.pooling = GeneralizedMean() if pooling == "gem" else None
        self.neck = make_neck() if bnneck else None
        self.feature_after_bn = feature_after_bn
        self.grad_checkpoint = False
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
        """Freeze a head that no loss uses: it takes no gradient, is not decayed, and DDP does not wait for it."""
        self.local_conv.requires_grad_(local)
        self.local_bn.requires_grad_(local)
        if self.fc is not None:
            self.fc.requires_grad_(identity)
        if self.neck is not None:
            self.neck.weight.requires_grad_(identity)

    def freeze_stages(self, num_stages: int) -> None:
        """Keep the stem and the first `num_stages` of the trunk's 4 stages as they are, and let the others learn.

        0: all learn, the stem too. What is kept keeps its batch norm statistics; to be called after train().
        """
        last_frozen = f"layer{num_stages}"
        frozen = num_stages > 0
        for name, part in self.base.named_children():
            part.requires_grad_(not frozen)
            part.train(self.training and not frozen)
            frozen = frozen and name != last_frozen

    def feature_shapes(self, size: tuple[int, int], *, local: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of one image's features, by name in a feature file; size: height and width of the image."""
        stripes = -(-size[0] // self.stride)
        local_shape = {"local": (stripes, self.local_conv.out_channels)} if local else {}
        return {"global": (TRUNK_CHANNELS,), **local_shape}

    def forward(self, images: Tensor) -> Features:
        """images [N, 3, h, w], normalised; h and w are multiples of 32 (256 x 128 gives 8 stripes)."""
        run_trunk = checkpointed if self.grad_checkpoint and self.training else nn.Module.__call__
        feat = run_trunk(self.base, images)  # [N, 2048, H, W]
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
    """torchvision's ResNet-50 without pooling and classifier; its tensors keep torchvision's names."""
    resnet = torchvision.models.resnet50(weights=None)
    return nn.Sequential(OrderedDict((n, m) for n, m in resnet.named_children() if n not in ("avgpool", "fc")))


def undo_last_stride(trunk: nn.Module) -> None:
    """Stride 1 in the last stage: its first block has one in its 3 x 3 convolution and one in its shortcut."""
    for module in trunk.get_submodule("layer4.0").modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def make_neck() -> nn.BatchNorm1d:
    """A batch norm of the global feature whose shift stays 0, so that classes are told apart by angle."""
    neck = nn.BatchNorm1d(TRUNK_CHANNELS)
    neck.bias.requires_grad_(False)
    return neck


def checkpointed(trunk: nn.Module, images: Tensor) -> Tensor:
    """The trunk's output, with only its stages' inputs kept for backward, which computes the rest again.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    stages = list(trunk.children())
    blocks = [block for stage in stages for block in stage.children() if isinstance(block, Bottleneck)]
    stem = nn.Sequential(
        *(stage for stage in stages if not any(isinstance(one, Bottleneck) for one in stage.children()))
    )
    feat = images
    for part in (stem, *blocks):
        if any(parameter.requires_grad for parameter in part.parameters()):
            contexts = functools.partial(recomputation_contexts, part)
            feat = checkpoint(part, feat, use_reentrant=False, context_fn=contexts)
        else:
            feat = part(feat)
    return feat


def recomputation_contexts(block: nn.Module) -> tuple[Any, Any]:
    """For forward and for its repetition, in which batch norms do not count the batch a second time."""
    return contextlib.nullcontext(), statistics_kept(block)


@contextlib.contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def start_near_identity(trunk: nn.Module) -> None:
    """Let each residual block of a random trunk begin as little more than its shortcut.

    The last batch norm of a block starts at 0.2, not at 1, in the spirit of arXiv:1706.02677, section 5.1, which starts
    it at 0. On drawn pedestrians a trunk then learns in 70 steps what it otherwise does not learn in 300.
    """
    for module in trunk.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, RESIDUAL_START)


def architecture_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of AlignedReID that a run's settings give."""
    return {
        name: settings[name] for name in ("last_stride", "pooling", "bnneck", "feature_after_bn") if name in settings
    }


def open_model(
    content: Any, source: str, *, need_local: bool, settings: Mapping[str, Any] | None = None
) -> tuple[AlignedReID, str]:
    """The model without classifier that a weight file's `content` holds, and a line that says what was loaded.

    settings: of the run that it is built by; default: those that the file was written with. Raises InputError where the
    trunk, or with `need_local` the local branch, is not whole in it.
    """
    weights = find_state_dict(content, source)
    local_channels = weights["local_bn.weight"].numel() if "local_bn.weight" in weights else 128
    architecture = architecture_of(settings_of(content) if settings is None else settings)
    model = AlignedReID(None, local_channels, pretrained="none", **architecture)
    return model, load_weights(model, weights, source, need_local=need_local)


def load_weights(model: AlignedReID, weights: dict[str, Tensor], source: str, *, need_local: bool) -> str:
    """Copy a whole model's `weights` into `model` in place; returns a line that says what was loaded, and what not.

    Heads are loaded whole or left at their start: the classifier if it is missing or was trained on another number of
    identities (fine-tuning on other people), the local head unless `need_local`. Raises InputError if the trunk, or a
    head that is needed, does not fit.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    ours = any(name.startswith("base.") for name in weights)  # else an `fc` is of some other network
    heads = {name: value for name, value in weights.items() if ours and name in own}
    reports = [load_trunk(model.base, {name: value for name, value in weights.items() if name not in heads}, source)]
    misfits = {}
    for head, start in HEADS.items():
        tensors = [name for name in own if name.startswith(start)]
        missing = [name for name in tensors if name not in heads and not name.endswith("num_batches_tracked")]
        wrong = [name for name in tensors if name in heads and not fits(heads[name], own[name])]
        if missing:
            misfits[head] = f"{missing[0]} is not in the file" if ours else "the file is of another model"
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
