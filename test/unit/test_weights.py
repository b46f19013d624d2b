"""Weight files from anywhere, hostile ones included."""

import argparse
import io
import json
import pickle
import tarfile
import types
import urllib.error
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from aligned_reid import InputError
from aligned_reid import weights as weights_module
from aligned_reid.model import AlignedReID, load_weights, make_trunk, open_model
from aligned_reid.weights import (
    find_state_dict,
    load_trunk,
    read_state_dict,
    read_weight_file,
    settings_of,
    write_safetensors,
)

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "reference_state_dict.json").read_text())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlignedReID(751, pretrained="none")


@pytest.fixture(scope="module")
def reference_state(model):
    """A state dict with the names of the reference's, which torch 0.3 wrote: no num_batches_tracked."""
    return OrderedDict((name, model.state_dict()[name].clone()) for name in REFERENCE)


def test_names_and_shapes_are_the_references(model):
    own = {n: list(v.shape) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert own == REFERENCE


def test_a_checkpoint_of_the_reference_loads(tmp_path, reference_state):
    scores = [np.float64(0.71), np.float32(0.87), np.int64(3), 0.5]
    content = {"state_dicts": [reference_state, {"state": {}, "param_groups": []}], "ep": 300, "scores": scores}
    torch.save(content, tmp_path / "ckpt.pth", _use_new_zipfile_serialization=False)
    if not hasattr(torch.serialization, "safe_globals"):  # torch < 2.5 cannot read numpy's numbers safely: it says so
        with pytest.raises(InputError, match=r"numpy values: it needs torch 2\.5"):
            read_state_dict(tmp_path)
        content["scores"] = [float(score) for score in scores]
        torch.save(content, tmp_path / "ckpt.pth", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "ckpt.pth", tmp_path):  # the file, or the folder that holds it
        loaded = read_state_dict(path)
        assert loaded.keys() == reference_state.keys()
    fresh = AlignedReID(751, pretrained="none")
    report = load_weights(fresh, loaded, "ckpt.pth", need_local=True)
    assert "265 of 265 tensors" in report
    assert "classifier loaded" in report
    for name, value in reference_state.items():
        assert torch.equal(fresh.state_dict()[name], value)


@pytest.mark.parametrize("prefix", ["", "module.", "base.", "module.base.", "module.pre.", "backbone.net."])
def test_a_trunk_loads_whatever_its_prefix(tmp_path, prefix):
    resnet = torchvision.models.resnet50(weights=None)
    state = {prefix + name: value for name, value in resnet.state_dict().items()}
    state["projection.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "trunk.pth")
    model = AlignedReID(None, pretrained=str(tmp_path / "trunk.pth"))
    assert model.trunk_report.startswith("trunk: 265 of 265 tensors loaded from")
    assert torch.equal(model.base.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)


def test_a_trunk_with_a_missing_tensor_is_refused(tmp_path):
    state = torchvision.models.resnet50(weights=None).state_dict()
    del state["layer3.2.bn1.running_var"]
    torch.save({"state_dict": state}, tmp_path / "trunk.pth")
    with pytest.raises(InputError, match=r"1 of 265 tensors are missing, the first is layer3\.2\.bn1\.running_var"):
        AlignedReID(None, pretrained=str(tmp_path / "trunk.pth"))


def test_num_batches_tracked_may_be_missing(tmp_path):
    state = torchvision.models.resnet50(weights=None).state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "trunk.pth")
    assert "265 of 265" in AlignedReID(None, pretrained=str(tmp_path / "trunk.pth")).trunk_report


@pytest.fixture(scope="module")
def trunk():
    return make_trunk()


NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "resnext50_32x4d": "ResNeXt-50",
    "wide_resnet50_2": "Wide ResNet-50",
}


@pytest.mark.parametrize(("network", "name"), NETWORKS.items())
@pytest.mark.parametrize("prefix", ["", "module.base."])
def test_another_network_is_refused_by_its_name(trunk, network, name, prefix):
    with torch.device("meta"):
        state = getattr(torchvision.models, network)(weights=None).state_dict()
    weights = find_state_dict({prefix + name: value for name, value in state.items()}, "w")
    with pytest.raises(InputError, match=f"{name}, not ResNet-50"):
        load_trunk(trunk, weights, "w")


def test_a_variant_of_resnet50_is_refused_by_its_name(trunk):
    state = torchvision.models.resnet50(weights=None).state_dict()
    squeezed = {**state, "layer1.0.se_module.fc1.weight": torch.zeros(3)}
    normed = {name.replace("layer1.0.bn1.", "layer1.0.bn1.BN."): value for name, value in state.items()}
    normed["layer1.0.bn1.IN.weight"] = torch.zeros(32)
    for weights, name in ((squeezed, "SE-ResNet-50"), (normed, "ResNet-50-IBN")):
        with pytest.raises(InputError, match=name):
            load_trunk(trunk, weights, "w")


@pytest.mark.parametrize("change", [torch.Tensor.char, torch.Tensor.to_sparse, lambda value: value.to("meta")])
def test_tensors_that_are_not_dense_floats_are_refused(trunk, change):
    state = torchvision.models.resnet50(weights=None).state_dict()
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight"):
        load_trunk(trunk, {**state, "layer1.0.conv1.weight": change(state["layer1.0.conv1.weight"])}, "w")


def test_names_of_no_residual_network_are_listed(trunk):
    with pytest.raises(InputError, match="patch_embed, cls_token"):
        load_trunk(
            trunk, {"patch_embed.w": torch.zeros(1), "patch_embed.b": torch.zeros(1), "cls_token": torch.zeros(1)}, "w"
        )


def test_what_is_not_loaded_is_listed(trunk):
    state = torchvision.models.resnet50(weights=None).state_dict()
    assert load_trunk(trunk, state, "w").endswith("not loaded: fc")
    weights = {f"model.backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    assert "not loaded" not in load_trunk(trunk, weights, "w")
    weights |= {f"model.heads.{name}": torch.zeros(1) for name in ("weight", "bias")}
    assert load_trunk(trunk, {**weights, "pixel_mean": torch.zeros(3)}, "w").endswith(
        "not loaded: model.heads, pixel_mean"
    )
    many = {f"head{number}.weight": torch.zeros(1) for number in range(20)}
    assert load_trunk(trunk, {**weights, **many}, "w").endswith("and 13 more")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "module.module.", "net.model."]
)
def test_whatever_stands_before_the_names_is_stripped(model, prefix):
    state = {prefix + name: value for name, value in model.state_dict().items()}
    fresh = AlignedReID(751, pretrained="none")
    report = load_weights(fresh, find_state_dict({"state_dict": state}, "w"), "w", need_local=True)
    assert "local head loaded, classifier loaded" in report and "not loaded" not in report
    assert all(torch.equal(one, other) for one, other in zip(fresh.state_dict().values(), state.values(), strict=True))


def test_a_head_is_loaded_whole_or_not_at_all(model):
    state = {name: value for name, value in model.state_dict().items() if name != "local_conv.bias"}
    fresh = AlignedReID(None, pretrained="none", bnneck=True)
    before = fresh.local_conv.weight.clone()
    report = load_weights(fresh, state, "w", need_local=False)
    assert "local head not loaded (local_conv.bias is not in the file)" in report
    assert "neck not loaded" in report
    assert torch.equal(fresh.local_conv.weight, before)


def test_the_classifier_of_another_network_is_not_ours():
    state = torchvision.models.resnet50(weights=None, num_classes=10).state_dict()
    model = AlignedReID(10, pretrained="none")
    assert "classifier not loaded" in load_weights(model, state, "w", need_local=False)
    assert model.fc.weight.std() < 0.002


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 did: strings of bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text):
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_bytes


def save_as_python2(content, path):
    writer = types.SimpleNamespace(
        __name__="cPickle",
        Pickler=Python2Pickler,
        dump=lambda value, file, protocol: Python2Pickler(file, protocol).dump(value),
    )
    file = io.BytesIO()
    torch.save(content, file, pickle_module=writer, pickle_protocol=2, _use_new_zipfile_serialization=False)
    path.write_bytes(file.getvalue().replace(b"numpy._core", b"numpy.core"))


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch < 2.5 reads no numpy values safely")
def test_a_trunk_without_names_and_scores_of_python_2_are_read(tmp_path):
    resnet = torchvision.models.resnet50(weights=None)
    base = torch.nn.Sequential(*list(resnet.children())[:-2])
    state = {f"base.{name}": value for name, value in base.state_dict().items() if "num_batches" not in name}
    state |= {"bn.weight": torch.ones(2048), "conv1.weight": torch.ones(128, 2048, 1, 1), "conv1.bias": torch.ones(128)}
    scores = {"rank1": np.float32(0.91), "cmc": np.linspace(0.9, 1, 20), "epoch": 299}
    save_as_python2({"state_dict": OrderedDict(state), **scores}, tmp_path / "best.pth.tar")
    assert b"U\x05epoch" in (tmp_path / "best.pth.tar").read_bytes()  # as Python 2 writes it
    model, report = open_model(read_weight_file(tmp_path / "best.pth.tar"), "w", need_local=False)
    assert "265 of 265" in report and "not loaded: bn.weight, conv1" in report
    assert torch.equal(model.base.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch < 2.5 has no list of safe classes")
@pytest.mark.parametrize("zip_format", [True, False])
def test_settings_and_scores_beside_the_weights_do_not_matter(tmp_path, zip_format):
    content = {
        "net": {"weight": torch.ones(3)},
        "args": argparse.Namespace(lr=0.1),
        "cmc": np.ones((2, 3)),
        "best": np.True_,
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zip_format)
    assert torch.equal(read_state_dict(tmp_path / "w.pth")["weight"], torch.ones(3))


class Bystander:
    pass


def zip_of(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x")
    return file.getvalue()


def tar_archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"))
    return file.getvalue()


OTHER_FILES = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98\n",
    "web page": b"\n<!DOCTYPE html><html><title>Virus scan warning</title></html>",
    "compressed": b"\x1f\x8b\x08\x00",
    "tar archive": tar_archive(),
    "zip archive": zip_of("model/weights.pth"),
    "TorchScript": zip_of("model/constants.pkl"),
    "ONNX": b"\x08\x08\x12\x07pytorch",
    "empty": b"",
}


@pytest.mark.parametrize(("what", "content"), OTHER_FILES.items())
def test_a_file_of_another_kind_is_named(tmp_path, what, content):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=what) as error:
            read_weight_file(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_pickled_object_is_named(tmp_path):
    torch.save({"model": {"weight": torch.ones(1)}, "logger": Bystander()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"Bystander.*state_dict\(\)"):
        read_weight_file(tmp_path / "w.pth")


def test_keys_of_a_file_without_weights_are_listed(tmp_path):
    torch.save({"teacher": {"weight": torch.ones(1)}, "a\n\x1b[2J": 1}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="teacher") as error:
        read_state_dict(tmp_path / "w.pth")
    assert str(error.value).isprintable()


def test_a_name_of_a_weight_file_does_not_tell_its_format(tmp_path):
    write_safetensors(tmp_path / "w.bin", {"weight": torch.ones(3)}, {})
    torch.save({"weight": torch.ones(3)}, tmp_path / "w.safetensors")
    for name in ("w.bin", "w.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["weight"], torch.ones(3))


def test_other_identities_leave_the_classifier_at_its_start(model, reference_state):
    other = AlignedReID(10, pretrained="none")
    before = other.fc.weight.clone()
    assert "classifier not loaded" in load_weights(other, dict(reference_state), "w", need_local=True)
    assert torch.equal(other.fc.weight, before)
    assert torch.equal(other.local_conv.weight, model.local_conv.weight)


def test_a_missing_local_head_matters_only_where_it_is_used(reference_state):
    trunk_only = {name: value for name, value in reference_state.items() if name.startswith("base.")}
    model = AlignedReID(None, pretrained="none")
    assert "local head not loaded" in load_weights(model, trunk_only, "w", need_local=False)
    with pytest.raises(InputError, match="no local branch"):
        load_weights(model, trunk_only, "w", need_local=True)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, zip_format):
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "bad.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(InputError, match="without running code"):
        read_weight_file(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_weights(tmp_path, reference_state):
    (tmp_path / "text.pth").write_text("these are not weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": "none"}))
    torch.save(reference_state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "empty", "plain", "cut"):
        with pytest.raises(InputError) as error:
            read_state_dict(tmp_path / f"{name}.pth")
        assert f"{name}.pth" in str(error.value)
        assert "\n" not in str(error.value)
    torch.save({"lr": 1}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="holds no model weights"):
        read_state_dict(tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="no weight file at"):
        read_state_dict(tmp_path / "missing.pth")
    with pytest.raises(InputError, match=r"no weight file at .*ckpt\.pth"):
        read_state_dict(tmp_path)


def test_imagenet_weights_are_read_from_the_hub_folder(tmp_path, monkeypatch):
    resnet = torchvision.models.resnet50(weights=None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "resnet50-0676ba61.pth"
    file.parent.mkdir(parents=True)
    torch.save(resnet.state_dict(), file)
    model = AlignedReID(None, pretrained="imagenet")
    assert torch.equal(model.base.conv1.weight, resnet.conv1.weight)


def test_imagenet_weights_are_downloaded_once(tmp_path, monkeypatch):
    resnet = torchvision.models.resnet50(weights=None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(url, destination, hash_prefix, progress):
        assert url.endswith("resnet50-0676ba61.pth")
        assert hash_prefix == "0676ba61"
        torch.save(resnet.state_dict(), destination)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert "265 of 265" in AlignedReID(None, pretrained="imagenet").trunk_report
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # a second download would fail
    assert "265 of 265" in AlignedReID(None, pretrained="imagenet").trunk_report


def test_offline_one_line_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError) as error:
        AlignedReID(None, pretrained="imagenet")
    assert str(tmp_path / "checkpoints" / "resnet50-0676ba61.pth") in str(error.value)
    assert "\n" not in str(error.value)


def test_safetensors_are_written_and_read(tmp_path, model):
    path = tmp_path / "model.safetensors"
    channels_last = {name: value.clone() for name, value in model.state_dict().items()}
    channels_last["base.conv1.weight"] = channels_last["base.conv1.weight"].to(memory_format=torch.channels_last)
    write_safetensors(path, channels_last, {"l_loss_weight": 1.0, "resize_h_w": [64, 32]})
    content = read_weight_file(path)
    assert settings_of(content) == {"l_loss_weight": 1.0, "resize_h_w": [64, 32]}
    loaded = read_state_dict(path)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_safetensors_are_one_line(tmp_path):
    write_safetensors(tmp_path / "whole.safetensors", {"weight": torch.ones(1000)}, {})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    damaged = {"cut": whole[:-10], "empty": b"", "text": b"these are not weights", "head": whole[:9]}
    damaged["settings"] = whole.replace(b'"config":"{}"', b'"config":"{\'"')
    assert damaged["settings"] != whole
    for name, content in damaged.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"cut off|empty") as error:
            read_weight_file(tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_bit_that_flipped_in_safetensors_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": torch.ones(1000)}, {})
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        read_weight_file(path)


def test_a_full_disk_leaves_the_former_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": torch.ones(3)}, {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, {"weight": torch.zeros(3)}, {})
    assert torch.equal(read_state_dict(path)["weight"], torch.ones(3))
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]
