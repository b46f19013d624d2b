"""Weights of other projects: their names, the layers after pooling, and networks that are refused."""

import copy
import json
from functools import cache, partial

import pytest
import torch
import torchvision
from conftest import GOLDEN, refusal
from torch import nn

from aligned_reid import ReID
from aligned_reid.inference.foreign import OTHER_NETWORKS, PROJECTS, find_project, open_foreign
from aligned_reid.model import AlignedReID

REFERENCE = json.loads((GOLDEN / "reference_state_dict.json").read_text())


@cache
def resnet50():
    """With random weights, which take a while to draw."""
    return torchvision.models.resnet50(weights=None)


class Theirs(nn.Module):
    """A ResNet-50 as another project computes it: stem, stride, pooling and layers after it."""

    def __init__(self, last_stride=2, neck=nn.Identity, relu=True, ceil=False, gem=0.0):
        super().__init__()
        self.net = copy.deepcopy(resnet50())

        self.net.layer4[0].conv2.stride = self.net.layer4[0].downsample[0].stride = (last_stride, last_stride)
        self.net.fc = nn.Identity()
        if not relu:
            self.net.relu = nn.Identity()
        if ceil:
            self.net.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.neck, self.gem = neck(), gem
        for module in self.modules():  # batch norms that change something
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.1, 0.4)
                nn.init.uniform_(module.running_mean, -0.1, 0.1)

    def forward(self, x):
        for layer in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(self.net, layer)(x)
        pooled = x.clamp(min=1e-6).pow(self.gem).mean((2, 3)).pow(1 / self.gem) if self.gem else x.mean((2, 3))
        return self.neck(pooled)


def embedding(*layers):
    return nn.Sequential(nn.Linear(2048, 512), nn.BatchNorm1d(512), *layers)


CLASSIFIER = torch.zeros(751, 2)
FAST_REID = {"last_stride": 1, "ceil": True, "neck": partial(nn.BatchNorm1d, 2048)}
# How each project's network differs, the prefixes of the trunk and of the layers after pooling, and its other weights.
FILES = {
    "fast-reid": (FAST_REID, "backbone.", "heads.bottleneck.0.", {"heads.weight": CLASSIFIER}),
    "fast-reid, GeM": (
        {**FAST_REID, "gem": 2.5},
        "backbone.",
        "heads.bottleneck.0.",
        {"heads.weight": CLASSIFIER, "heads.pool_layer.p": torch.full((1,), 2.5)},
    ),
    "fast-reid, early": (FAST_REID, "backbone.", "heads.bnneck.", {}),
    "reid-strong-baseline": (
        {"last_stride": 1, "relu": False, "neck": partial(nn.BatchNorm1d, 2048)},
        "base.",
        "bottleneck.",
        {"classifier.weight": CLASSIFIER},
    ),
    "Person_reID_baseline_pytorch": (
        {"neck": embedding},
        "model.",
        "classifier.add_block.",
        {"model.fc.weight": CLASSIFIER, "classifier.classifier.0.weight": CLASSIFIER},
    ),
    "torchreid (resnet50)": ({}, "", "", {"classifier.weight": CLASSIFIER}),
    "torchreid (resnet50_fc512)": (
        {"last_stride": 1, "neck": partial(embedding, nn.ReLU())},
        "module.",
        "module.fc.",
        {"module.classifier.weight": CLASSIFIER},
    ),
}


def make_file(name):
    """A project's network, and the weights in its file."""
    options, trunk, neck, others = FILES[name]
    theirs = Theirs(**options)
    state = {trunk + key: value for key, value in theirs.net.state_dict().items()}
    return theirs, state | {neck + key: value for key, value in theirs.neck.state_dict().items()} | others


@pytest.mark.parametrize("name", FILES)
def test_the_features_are_those_of_the_project(name):
    torch.manual_seed(0)
    theirs, state = make_file(name)
    project, wrapper = find_project(state, "w")
    assert project.name == name.split(",")[0]
    model, report = open_foreign(state, project, wrapper, "w", dict(project.settings))
    assert "265 of 265" in report and "local head not loaded" in report
    assert ("layers after pooling loaded" in report) == bool(theirs.neck.state_dict())
    classifiers = [key for key, value in state.items() if value is CLASSIFIER]
    assert all(key.removeprefix("module.") in report for key in classifiers)
    images = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        expected, found = theirs.eval()(images), model.eval()(images).global_feat
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_layers_that_do_not_fit_are_refused():
    _, state = make_file("Person_reID_baseline_pytorch")
    state["classifier.add_block.1.running_mean"] = torch.zeros(7)
    assert "layers after pooling" in refusal(open_foreign, state, *find_project(state, "w"), "w", {})


# A name that each of OTHER_NETWORKS has in its own project.
TELLING = {
    "OSNet": "module.conv2.0.conv2a.conv1.weight",
    "MLFN": "feature.0.fm_conv1.weight",
    "HACNN": "ha1.soft_attn.spatial_attn.conv1.conv.weight",
    "PCB": "classifier5.add_block.0.weight",
    "MGN": "b1_head.bottleneck.0.weight",
    "ResNet-50 with mid-level features": "fc_fusion.0.weight",
    "ResNet-50 with non-local blocks": "backbone.NL_2.0.g.weight",
    "ResNet-50 with spatial attention": "usam_1.weight",
    "Swin Transformer": "model.layers.0.blocks.0.attn.qkv.weight",
    "vision transformer": "base.patch_embed.proj.weight",
    "ConvNeXt": "model.stages.0.blocks.0.conv_dw.weight",
    "HRNet": "model.stage2.0.branches.0.0.conv1.weight",
    "EfficientNet": "model._blocks.0._bn0.weight",
    "DenseNet": "model.features.denseblock1.denselayer1.norm1.weight",
    "MobileNet or ShuffleNet": "conv2.0.dwconv2.weight",
    "Inception": "mixed_5b.branch0.conv.weight",
}


@pytest.mark.parametrize("network", OTHER_NETWORKS)
def test_another_network_is_named(network):
    assert f"holds {network}" in refusal(find_project, {TELLING[network]: torch.zeros(1)}, "w")


def test_our_own_weights_and_the_references_are_of_no_other_project():
    assert find_project(AlignedReID(10, pretrained="none", bnneck=True).state_dict(), "w") is None
    assert find_project(dict.fromkeys(REFERENCE, torch.zeros(1)), "w") is None
    assert find_project(resnet50().state_dict(), "w") is None


def test_a_file_of_another_project_is_opened_with_its_test_settings(tmp_path):
    _, state = make_file("fast-reid")
    torch.save({"model": state, "iteration": 1}, tmp_path / "model_best.pth")
    lines = []
    reid = ReID.from_pretrained(tmp_path / "model_best.pth", "cpu", lines.append, resize_h_w=(64, 32))
    assert reid.unit_length and reid.size == (64, 32) and reid.threshold is None
    assert "fast-reid" in lines[0] and "heads.weight" in lines[0]
    assert reid(torch.zeros(3, 64, 32)).local_feat is None


def test_every_project_has_a_test():
    assert {project.name for project in PROJECTS} <= set(FILES)
