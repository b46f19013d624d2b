"""The ONNX graph: same features as torch's, in every form it is offered in."""

import numpy as np
import onnx
import pytest
import torch
from conftest import refusal

from aligned_reid import export
from aligned_reid.data import TestImages, open_data, preprocess
from aligned_reid.errors import RunStopped
from aligned_reid.evaluation.extract import inference_copy
from aligned_reid.export import InferenceGraph, OnnxFeatures, check_packages, export_onnx, graph_metadata
from aligned_reid.model import AlignedReID

SIZE = (64, 32)
# What atc accepts: no shape depends on values, no loop, no branch.
OPERATORS = {"Add", "Cast", "Clip", "Constant", "Conv", "Div", "MatMul", "MaxPool", "Mul", "ReduceL2", "ReduceMean"}
OPERATORS |= {"Relu", "Reshape", "Squeeze", "Sub", "Transpose", "Identity"}


@pytest.fixture
def model(small_trunk):
    torch.manual_seed(0)
    return AlignedReID(None, pretrained="none").eval()


def make_graph(model, local=True, uint8_input=True, normalize_feature=False):
    return InferenceGraph(model, local=local, uint8_input=uint8_input, normalize_feature=normalize_feature)


@pytest.mark.parametrize(("opset", "batch_size"), [(13, 3), (17, None), (17, 3), (18, None), (18, 3)])
def test_every_opset_computes_torchs_features(model, tmp_path, opset, batch_size, capfd):
    has_unit_length = batch_size is None
    graph, path = make_graph(model, normalize_feature=has_unit_length), tmp_path / "model.onnx"
    difference, described = export_onnx(graph, path, SIZE, opset=opset, batch_size=batch_size)
    assert difference < 1e-5
    n = batch_size or "N"
    assert described.startswith(f"opset {opset}, images uint8 [{n}, 64, 32, 3] -> global_feat float32 [{n}, 2048], ")
    assert described.endswith(f"local_feat float32 [{n}, 2, 128]")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")  # the exporters are silent
    content = onnx.load(path)
    onnx.checker.check_model(content, full_check=True)
    assert {node.op_type for node in content.graph.node} <= OPERATORS
    images = graph.example(batch_size or 5, SIZE, seed=9)
    for ours, theirs in zip(OnnxFeatures(path)(images.numpy()), graph(images), strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-4)
        assert np.allclose(np.linalg.norm(ours, axis=-1), 1, rtol=1e-5) == has_unit_length


def test_both_inputs_are_normalised_as_in_training(model):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    expected = inference_copy(model)(preprocess(pixels, SIZE)[None])
    as_uint8 = make_graph(model)(torch.from_numpy(pixels)[None])
    as_float = make_graph(model, uint8_input=False)(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None])
    for one in (as_uint8, as_float):
        torch.testing.assert_close(one, (expected.global_feat, expected.local_feat), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("uint8_input", [True, False])
@pytest.mark.parametrize("batch_size", [None, 32])
def test_extraction_by_the_graph_equals_torch(model, tiny_data, tmp_path, uint8_input, batch_size):
    images = TestImages(open_data(tiny_data), size=SIZE)
    assert len(images) % 32  # the last batch is not full
    graph = make_graph(model, local=False, uint8_input=uint8_input)
    export_onnx(graph, tmp_path / "model.onnx", SIZE, opset=17, batch_size=batch_size)
    features = OnnxFeatures(tmp_path / "model.onnx").extract(images)
    assert features.local_feat is None
    pixels = torch.stack([preprocess(images[index][0], SIZE) for index in range(len(images))])
    with torch.inference_mode():
        expected = model(pixels).global_feat
    torch.testing.assert_close(features.global_feat, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("distance", "size", "normalize_feature", "holds"),
    [
        ("euclidean", (64, 32), False, True),
        ("euclidean", (64, 32), True, False),
        ("euclidean", (96, 32), False, False),
        ("cosine", (64, 32), True, True),
    ],
)
def test_metadata_have_thresholds_only_if_they_hold_for_the_graph(tmp_path, distance, size, normalize_feature, holds):
    settings = {"ims_per_id": 4, "resize_h_w": [64, 32], "test_distance": distance}
    content = {"config": settings, "verification": {"num_same": 1}}
    metadata = graph_metadata(content, tmp_path, size, normalize_feature=normalize_feature)
    assert ("verification" in metadata) == holds
    changes = {"resize_h_w": list(size)} | ({"normalize_feature": True} if normalize_feature else {})
    assert metadata["config"] == settings | changes


def test_a_graph_that_differs_is_discarded(model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("the former one")
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(export, "compare", lambda *_, difference=difference: difference)
        with pytest.raises(RunStopped, match="differ from torch's"):
            export_onnx(make_graph(model), path, SIZE, opset=17, batch_size=None)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the former one"]


def test_missing_packages_are_named(monkeypatch):
    assert "--opset 12" in refusal(check_packages, 12)
    monkeypatch.setattr(export, "HAS_NEW_EXPORTER", False)
    check_packages(17)
    assert "--opset 18" in refusal(check_packages, 18)
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "a_missing_package"))
    assert "a_missing_package" in refusal(check_packages, 17)
