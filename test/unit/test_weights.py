"""Weight files of all kinds, including damaged and malicious ones."""

import argparse
import io
import json
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import GOLDEN, full_disk, refusal, same

from aligned_reid.model import AlignedReID, load_weights, make_trunk, open_model
from aligned_reid.weights import (
    METADATA,
    find_state_dict,
    find_verification,
    load_trunk,
    read_state_dict,
    read_weight_file,
    settings_of,
    write_safetensors,
)

REFERENCE = json.loads((GOLDEN / "reference_state_dict.json").read_text())
CONV = "layer1.0.conv1.weight"
LAST_CONV = "layer4.2.conv3.weight"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlignedReID(751, pretrained="none")


@pytest.fixture(scope="module")
def resnet_state():
    return torchvision.models.resnet50(weights=None).state_dict()


def unreadable(path):
    """The message for a file that is not read; it names the file."""
    message = refusal(read_state_dict, path)
    assert str(path) in message
    return message


trunk_to_fill = cache(make_trunk)


def load(weights):
    """What load_trunk reports, and the trunk, which has lost a convolution's weights before."""
    trunk = trunk_to_fill()
    torch.nn.init.zeros_(trunk.layer4[2].conv3.weight)
    return load_trunk(trunk, find_state_dict(weights, "w"), "w"), trunk


def test_a_checkpoint_of_the_reference_loads(tmp_path, model):
    state = OrderedDict((n, v) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked"))
    assert {name: list(value.shape) for name, value in state.items()} == REFERENCE
    path = tmp_path / "ckpt.pth"
    content = {"state_dicts": [state, {"state": {}, "param_groups": []}], "ep": 300, "scores": [0.5]}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    fresh = AlignedReID(751, pretrained="none")
    report = load_weights(fresh, read_state_dict(path), "ckpt.pth", need_local=True)
    assert "265 of 265" in report and "classifier loaded" in report
    assert same(state, {name: fresh.state_dict()[name] for name in REFERENCE})
    assert same(read_state_dict(tmp_path), state)  # in its folder
    path.unlink()
    assert "no weight file" in unreadable(path) and "ckpt.pth" in unreadable(tmp_path)


@pytest.mark.parametrize("prefix", ["", "module.", "base.", "module.base.", "module.pre.", "backbone.net."])
def test_a_trunk_loads_behind_any_prefix(resnet_state, prefix):
    state = {prefix + name: value for name, value in resnet_state.items() if not name.endswith("num_batches_tracked")}
    report, trunk = load({**state, "projection.weight": torch.zeros(3)})
    assert "265 of 265" in report
    assert torch.equal(trunk.state_dict()[LAST_CONV], resnet_state[LAST_CONV])


def other_network(network):
    with torch.device("meta"):
        state = getattr(torchvision.models, network)(weights=None).state_dict()
    return {f"module.base.{name}": value for name, value in state.items()}


NETWORKS = {"ResNet-18": "resnet18", "ResNet-34": "resnet34", "ResNet-101": "resnet101", "ResNet-152": "resnet152"}
NETWORKS |= {"ResNeXt-50": "resnext50_32x4d", "Wide ResNet-50": "wide_resnet50_2"}
MISFITS = {
    **{f"{name}, not": lambda _, network=network: other_network(network) for name, network in NETWORKS.items()},
    "SE-ResNet-50, not": lambda state: {**state, "layer1.0.se_module.fc1.weight": torch.zeros(3)},
    "ResNet-50-IBN, not": lambda state: {**state, "layer1.0.bn1.IN.weight": torch.zeros(32)},
    "patch_embed, cls_token": lambda _: dict.fromkeys(("patch_embed.w", "patch_embed.b", "cls_token"), torch.zeros(1)),
    f"1 of 265 tensors are missing.*{CONV}": lambda state: {name: state[name] for name in state if name != CONV},
    f"{CONV}.*CharTensor": lambda state: {**state, CONV: state[CONV].char()},
    f"{CONV}.*sparse": lambda state: {**state, CONV: state[CONV].to_sparse()},
    f"{CONV}.*shape": lambda state: {**state, CONV: state[CONV].to("meta")},
}


@pytest.mark.parametrize(("message", "change"), MISFITS.items(), ids=MISFITS)
def test_a_misfit_of_the_trunk_is_named(resnet_state, message, change):
    assert re.search(message, refusal(load, change(resnet_state)))


def test_parts_that_are_not_loaded_are_listed(resnet_state):
    assert load(resnet_state)[0].endswith("not loaded: fc")
    weights = {f"model.backbone.{name}": value for name, value in resnet_state.items() if not name.startswith("fc.")}
    assert "not loaded" not in load(weights)[0]
    weights |= dict.fromkeys(("model.heads.weight", "model.heads.bias", "pixel_mean"), torch.zeros(1))
    assert load(weights)[0].endswith("not loaded: model.heads, pixel_mean")
    weights |= {f"head{number}.weight": torch.zeros(1) for number in range(20)}
    assert load(weights)[0].endswith("and 14 more")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "module.module.", "net.model."]
)
def test_prefixes_of_wrappers_are_stripped(model, prefix):
    state = model.state_dict()
    wrapped = {prefix + name: value for name, value in state.items()}
    assert same(find_state_dict({"state_dict": wrapped}, "w"), state)


def test_the_average_in_earlier_checkpoints_is_preferred():
    content = {"model": {"weight": torch.zeros(1)}, "average": {"weight": torch.ones(1)}}
    assert find_state_dict(content, "w") == {"weight": torch.ones(1)}


def test_a_head_is_loaded_completely_or_not_at_all(model):
    state = {name: value for name, value in model.state_dict().items() if name != "local_conv.bias"}
    fresh = AlignedReID(10, pretrained="none", bnneck=True)
    before = {name: value.clone() for name, value in fresh.state_dict().items() if not name.startswith("base.")}
    report = load_weights(fresh, state, "w", need_local=False)
    assert "local head not loaded (local_conv.bias is not in the file)" in report
    assert "neck not loaded" in report and "classifier not loaded (other identities)" in report
    assert same(before, {name: fresh.state_dict()[name] for name in before})
    assert torch.equal(fresh.base.conv1.weight, model.base.conv1.weight)
    state = torchvision.models.resnet50(weights=None, num_classes=10).state_dict()
    fresh = AlignedReID(10, pretrained="none")
    assert "classifier not loaded" in load_weights(fresh, state, "w", need_local=False)  # of another network
    assert fresh.fc.weight.std() < 0.002


@pytest.mark.parametrize(
    ("settings", "need_local", "message"),
    [
        ({}, True, "--use_local_distance"),
        ({"bnneck": True, "feature_after_bn": True}, False, "--bnneck"),
        ({"pooling": "gem"}, False, "--pooling"),
    ],
)
def test_a_missing_head_is_an_error_only_if_the_features_need_it(resnet_state, settings, need_local, message):
    assert message in refusal(open_model, resnet_state, "w", need_local=need_local, settings=settings)


def as_python_2_writes(content):
    """Strings in a pickle as bytes, and numpy's modules under their former name."""
    short_strings = re.sub(rb"X(.)\0\0\0", rb"U\1", content, flags=re.DOTALL)
    return short_strings.replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("written", ["as zip archive", "by torch before 1.6", "by Python 2"])
def test_settings_and_scores_next_to_the_weights_are_skipped(tmp_path, written):
    others = {"args": argparse.Namespace(lr=0.1), "cmc": np.ones((2, 3)), "best": np.True_, "rank1": np.float32(0.91)}
    content = {**others, "net": {"weight": torch.ones(3)}}
    content = saved(content, _use_new_zipfile_serialization=written == "as zip archive")
    if written == "by Python 2":
        content = as_python_2_writes(content)
        assert b"U\x05rank1" in content
    (tmp_path / "w.pth").write_bytes(content)
    if hasattr(torch.serialization, "safe_globals"):
        assert torch.equal(read_state_dict(tmp_path / "w.pth")["weight"], torch.ones(3))
    else:
        assert "torch 2.5" in unreadable(tmp_path / "w.pth")


def test_a_trunk_in_a_sequential_module_is_found():
    resnet = torchvision.models.resnet50(weights=None)
    base = torch.nn.Sequential(*list(resnet.children())[:-2])
    state = {f"base.{name}": value for name, value in base.state_dict().items()}
    state |= {"bn.weight": torch.ones(2048), "conv1.weight": torch.ones(128, 2048, 1, 1), "conv1.bias": torch.ones(128)}
    model, report = open_model({"state_dict": state}, "w", need_local=False)
    assert "265 of 265" in report and "not loaded: bn.weight, conv1" in report and "local head not loaded" in report
    assert torch.equal(model.base.state_dict()[LAST_CONV], resnet.state_dict()[LAST_CONV])


def test_entries_of_other_projects_under_our_names_are_left_out(tmp_path):
    torch.save({"net": {}, **dict.fromkeys(METADATA, "theirs")}, tmp_path / "w.pth")
    assert read_weight_file(tmp_path / "w.pth") == {"net": {}}
    write_safetensors(tmp_path / "w.safetensors", {"weight": torch.ones(3)}, "theirs", [1], [2])
    assert read_weight_file(tmp_path / "w.safetensors").keys() == {"model"}


def zip_of(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x")
    return file.getvalue()


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Bystander:
    pass


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


OTHER_FILES = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98\n",
    "web page": b"\n<!DOCTYPE html><html><title>Virus scan warning</title></html>",
    "archive": b"\x1f\x8b\x08\x00",
    "an archive": tarfile.TarInfo("w.pth").tobuf(),
    "unpack": zip_of("model/weights.pth"),
    "TorchScript": zip_of("model/constants.pkl"),
    "ONNX": b"\x08\x08\x12\x07pytorch",
    "cut off": b"",
    "not a weight file": b"these are not weights",
    "holds no model weights": saved({"lr": 1}),
    "of type list": saved([1]),
    "keys are: teacher": saved({"teacher": {"weight": torch.ones(1)}, "a\n\x1b[2J": 1}),
    "Bystander": saved({"model": {"weight": torch.ones(1)}, "logger": Bystander()}),
    "without running code": saved({"model": Malicious()}),
    "running code.*state_dict": saved({"model": Malicious()}, _use_new_zipfile_serialization=False),
    "damaged or cut off": saved({"weight": torch.ones(100)})[:-300],
}


@pytest.mark.parametrize(("keyword", "content"), OTHER_FILES.items(), ids=OTHER_FILES)
def test_a_file_without_weights_is_an_error_whatever_its_name(tmp_path, monkeypatch, keyword, content):
    monkeypatch.chdir(tmp_path)
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert re.search(keyword, unreadable(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_the_content_decides_the_format_and_a_flipped_bit_is_an_error(tmp_path):
    write_safetensors(tmp_path / "w.bin", {"weight": torch.ones(1000)}, {})
    torch.save({"weight": torch.ones(1000)}, tmp_path / "w.safetensors")
    for path in (tmp_path / "w.bin", tmp_path / "w.safetensors"):
        assert torch.equal(read_state_dict(path)["weight"], torch.ones(1000))
        content = bytearray(path.read_bytes())
        content[content.index(np.ones(100, np.float32).tobytes()) + 200] ^= 1
        path.write_bytes(content)
        assert "checksum" in unreadable(path)


def test_imagenet_weights_are_downloaded_once_and_a_failure_names_the_missing_file(tmp_path, monkeypatch, resnet_state):
    file = tmp_path / "checkpoints" / "resnet50-0676ba61.pth"

    def download(url, destination, hash_prefix, progress):
        assert url.endswith(f"{hash_prefix}.pth") and destination == str(file)
        torch.save(resnet_state, destination)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: full_disk())
    assert str(file) in refusal(AlignedReID, None, pretrained="imagenet")
    with monkeypatch.context() as online:
        online.setattr(torch.hub, "download_url_to_file", download)
        assert "265 of 265" in AlignedReID(None, pretrained="imagenet").trunk_report
    model = AlignedReID(None, pretrained="imagenet")
    assert torch.equal(model.base.conv1.weight, resnet_state["conv1.weight"])


def test_safetensors_restore_tensors_and_settings(tmp_path, model):
    path = tmp_path / "model.safetensors"
    channels_last = dict(model.state_dict())
    channels_last["base.conv1.weight"] = channels_last["base.conv1.weight"].to(memory_format=torch.channels_last)
    settings = {"ims_per_id": 4, "l_loss_weight": 1.0, "resize_h_w": [64, 32]}
    write_safetensors(path, channels_last, settings, {"set": ["1"]}, {"num_same": 1})
    content = read_weight_file(path)
    assert settings_of(content) == settings
    assert content["trained_on"] == {"set": ["1"]}
    assert content["verification"] == {"num_same": 1}
    assert same(read_state_dict(path), model.state_dict())
    assert list(tmp_path.iterdir()) == [path]


def test_the_verification_of_weights_is_in_their_file_or_beside_it(tmp_path):
    path = tmp_path / "ckpt.pth"
    beside = {"config": {"ims_per_id": 4}}
    own = beside | {"verification": {"num_same": 1}}
    assert find_verification(beside, path) == {}
    (tmp_path / "results.json").write_text('{"verification": {"num_same": 2}}')
    assert find_verification(own, path) == {"num_same": 1}
    assert find_verification(beside, path) == find_verification(beside, tmp_path) == {"num_same": 2}
    assert find_verification({"net": {}}, path) == {}  # a file of another project
    (tmp_path / "results.json").write_text("{")
    assert "results.json" in refusal(find_verification, beside, path)


def test_damaged_safetensors_are_errors(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"weight": torch.ones(1000)}, {})
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:9], whole.replace(b'"config":"{}"', b'"config":"{\'"')):
        path.write_bytes(content)
        assert "cut off" in unreadable(path)


def test_a_full_disk_keeps_the_previous_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": torch.ones(3)}, {})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, {"weight": torch.zeros(3)}, {})
    assert torch.equal(read_state_dict(path)["weight"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]
