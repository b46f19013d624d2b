"""Features of test images: mirror averaging."""

import torch

from aligned_reid.data.dataset import TestImages, open_data
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.evaluation.extract import extract_features, run_network
from aligned_reid.model import AlignedReID


def test_mirror_averaging_is_the_mean_with_the_mirror_image(tiny_data, small_trunk):
    images = TestImages(open_data(tiny_data), size=(64, 32))
    model, accelerator = AlignedReID(None, pretrained="none").eval(), Accelerator(mixed_precision=False)
    plain, flipped = (
        extract_features(model, images, accelerator, World(), local=True, workers=0, flip=flip)
        for flip in (False, True)
    )
    pixels = torch.stack([torch.from_numpy(images[index][0]) for index in range(len(images))])
    with torch.inference_mode():
        mirrored = run_network(model, pixels.flip(2), accelerator)
    for one, other, mean in zip(plain, mirrored[:2], flipped, strict=True):
        assert torch.allclose(mean, (one + other) / 2, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mean, one, rtol=1e-2)
