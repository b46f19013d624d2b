"""From images to features: the test part of a data set through the model, split over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from aligned_reid.data.dataset import TestImages
from aligned_reid.data.loader import make_loader
from aligned_reid.data.transforms import normalize_images
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World, gather_rows, share_of
from aligned_reid.model import AlignedReID, Features

BATCH_SIZE = 64
BATCHES_PER_BLOCK = 8  # of each rank: gathered together, and lost at most if an extraction is interrupted
BYTES_ON_DEVICE = 4 * 2**30  # larger features move to the host, where distances are then computed


class FeatureSet(NamedTuple):
    """Features of N images, float32, on the device that computes their distances."""

    global_feat: Tensor  # [N, 2048]
    local_feat: Tensor | None = None  # [N, H, local_channels]

    def map(self, function: Callable[[Tensor], Tensor]) -> FeatureSet:
        """`function` of each tensor."""
        local_feat = None if self.local_feat is None else function(self.local_feat)
        return FeatureSet(function(self.global_feat), local_feat)


def extract_features(
    model: AlignedReID,
    images: TestImages,
    accelerator: Accelerator,
    world: World,
    *,
    local: bool,
    workers: int,
    flip: bool = False,
) -> FeatureSet:
    """Features of all `images`, on every rank; each rank runs its share through the model.

    They stay on the device unless they take more than BYTES_ON_DEVICE. flip: average the features of each image and its
    mirror image.
    """
    global_feats, local_feats = [], []
    for _, block in feature_blocks(model, images, accelerator, world, local=local, workers=workers, flip=flip):
        num_values = sum(feat[0].numel() for feat in block if feat is not None)
        device = accelerator.device if 4 * num_values * len(images) <= BYTES_ON_DEVICE else torch.device("cpu")
        global_feats.append(block.global_feat.to(device))
        if block.local_feat is not None:
            local_feats.append(block.local_feat.to(device))
    return FeatureSet(torch.cat(global_feats), torch.cat(local_feats) if local else None)


def feature_blocks(
    model: AlignedReID,
    images: TestImages,
    accelerator: Accelerator,
    world: World,
    *,
    local: bool,
    workers: int,
    start: int = 0,
    flip: bool = False,
) -> Iterator[tuple[int, FeatureSet]]:
    """Features of images[start:] in order, some batches at a time: (first image, features on the device)."""
    folded = inference_copy(model).to(accelerator.device).to(memory_format=accelerator.memory_format)
    network = accelerator.compile(folded, inference=True)
    firsts = range(start, len(images), BATCHES_PER_BLOCK * BATCH_SIZE * world.size)
    totals = [min(firsts.step, len(images) - first) for first in firsts]
    shares = [share_of(total, world) for total in totals]
    batches = [
        range(first + begin, first + min(begin + BATCH_SIZE, share.stop))
        for first, share in zip(firsts, shares, strict=True)
        for begin in range(share.start, share.stop, BATCH_SIZE)
    ]
    loader = iter(make_loader(images, batches, workers=workers, pin_memory=accelerator.pin_memory))
    blank = torch.zeros((1, *images.size, 3), dtype=torch.uint8, device=accelerator.device)
    with torch.inference_mode():
        example = run_network(network, blank, accelerator)  # for the shapes, and for a rank without a share
    empty = Features(example.global_feat[:0], example.local_feat[:0], None)
    # disable=None: the bar is shown on a terminal only.
    hidden = None if world.is_main else True
    with tqdm(total=len(images), initial=start, unit="im", desc="features", leave=False, disable=hidden) as bar:
        for first, total, share in zip(firsts, totals, shares, strict=True):
            with torch.inference_mode():
                parts = [empty]
                for _ in range(-(-len(share) // BATCH_SIZE)):
                    pixels = next(loader).images.to(accelerator.device, non_blocking=True)
                    parts.append(run_network(network, pixels, accelerator, flip))
                feats = zip(*(part[: 1 + local] for part in parts), strict=True)
                gathered = [gather_rows(torch.cat(one).float(), total) for one in feats]
            bar.update(total)
            yield first, FeatureSet(gathered[0], gathered[1] if local else None)


def run_network(network: nn.Module, images: Tensor, accelerator: Accelerator, flip: bool = False) -> Features:
    """Features of uint8 images [N, h, w, 3]. A compiled network always gets BATCH_SIZE images, to compile once."""
    if flip:
        features, mirrored = (run_network(network, one, accelerator) for one in (images, images.flip(2)))
        means = [(one.float() + other.float()) / 2 for one, other in zip(features[:2], mirrored[:2], strict=True)]
        return Features(means[0], means[1], None)
    num_images = len(images)
    if accelerator.config.compile and num_images < BATCH_SIZE:
        images = torch.cat([images, images.new_zeros((BATCH_SIZE - num_images, *images.shape[1:]))])
    with accelerator.autocast():
        features = network(normalize_images(images, accelerator.memory_format))
    return Features(features.global_feat[:num_images], features.local_feat[:num_images], None)


def inference_copy(model: AlignedReID) -> AlignedReID:
    """A copy of `model` for inference: without classifier, batch norms folded into the convolutions before them.

    Folding multiplies each convolution's weights by its batch norm's scale once instead of scaling every activation. It
    saves a quarter of the time on a CPU and changes features by rounding only.
    """
    network = copy.deepcopy(model).eval()
    network.fc = None
    fold_batch_norms(network)
    return network


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm in `module` into the convolution that is registered just before it, in place."""
    children = list(module.named_children())
    for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for _, child in module.named_children():
        fold_batch_norms(child)
