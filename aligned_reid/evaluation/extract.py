"""From images to features: the test part of a data set through the model, each rank its share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

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
BATCHES_PER_BLOCK = 8  # of each rank: what is gathered at a time, and what an interrupted extraction loses at most


class FeatureSet(NamedTuple):
    """Features of N images on the host, float32."""

    global_feat: Tensor  # [N, 2048]
    local_feat: Tensor | None  # [N, H, local_channels]; None where it was not asked for


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
    """Features of all `images`, on every rank; each rank runs its share of them through the model.

    flip: the mean of the features of an image and of its mirror image.
    """
    parts = feature_blocks(model, images, accelerator, world, local=local, workers=workers, flip=flip)
    blocks = [block for _, block in parts]
    local_feats = [block.local_feat for block in blocks if block.local_feat is not None]
    return FeatureSet(torch.cat([block.global_feat for block in blocks]), torch.cat(local_feats) if local else None)


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
    """Features of images[start:], some batches at a time and in order: (first image, features), on every rank."""
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
    height, width = images.size
    blank = torch.zeros((1, height, width, 3), dtype=torch.uint8, device=accelerator.device)
    with progress(len(images), start, world) as bar:
        with torch.inference_mode():
            example = run_network(network, blank, accelerator)  # for the shapes, and for a rank whose share is empty
        for first, total, share in zip(firsts, totals, shares, strict=True):
            with torch.inference_mode():
                parts = [Features(example.global_feat[:0], example.local_feat[:0], None)]
                for _ in range(-(-len(share) // BATCH_SIZE)):
                    pixels = next(loader).images.to(accelerator.device, non_blocking=True)
                    parts.append(run_network(network, pixels, accelerator, flip))
                global_feat = gather_rows(torch.cat([part.global_feat for part in parts]).float(), total).cpu()
                local_feat = None
                if local:
                    local_feat = gather_rows(torch.cat([part.local_feat for part in parts]).float(), total).cpu()
            bar.update(total)
            yield first, FeatureSet(global_feat, local_feat)


def run_network(network: nn.Module, images: Tensor, accelerator: Accelerator, flip: bool = False) -> Features:
    """Features of uint8 images [N, h, w, 3]; a compiled network always sees BATCH_SIZE of them, to compile once."""
    if flip:
        features, mirrored = (run_network(network, one, accelerator) for one in (images, images.flip(2)))
        means = [(one.float() + other.float()) / 2 for one, other in zip(features[:2], mirrored[:2], strict=True)]
        return Features(means[0], means[1], None)
    num_images = len(images)
    if accelerator.modes.compiled and num_images < BATCH_SIZE:
        images = torch.cat([images, images.new_zeros((BATCH_SIZE - num_images, *images.shape[1:]))])
    with accelerator.autocast():
        features = network(normalize_images(images, accelerator.memory_format))
    return Features(features.global_feat[:num_images], features.local_feat[:num_images], None)


def progress(total: int, start: int, world: World) -> tqdm[NoReturn]:
    """A bar of images on a terminal; nothing where there is none, or on another rank than 0."""
    hidden = None if world.is_main else True
    return tqdm(total=total, initial=start, unit="im", desc="features", leave=False, disable=hidden)


def inference_copy(model: AlignedReID) -> AlignedReID:
    """A copy of `model` for inference: without classifier, batch norms folded into the convolutions before them.

    Folding multiplies each convolution's weights by its batch norm's scale once instead of scaling every activation; it
    saves a quarter of the time on a CPU and changes features by rounding only.
    """
    network = copy.deepcopy(model).eval()
    network.fc = None
    fold_batch_norms(network)
    return network


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that is registered just before it, in place, in all of `module`."""
    children = list(module.named_children())
    for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for _, child in module.named_children():
        fold_batch_norms(child)
