"""ReID: features of images of all kinds, and comparison of two."""

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from aligned_reid import ReID
from aligned_reid.config import Config
from aligned_reid.data.dataset import TestImages, open_data
from aligned_reid.data.transforms import decode_image
from aligned_reid.device import open_accelerator
from aligned_reid.distance import aligned_distance, euclidean_distance, normalize
from aligned_reid.distributed import World
from aligned_reid.evaluation.extract import extract_features
from aligned_reid.export import InferenceGraph, export_onnx
from aligned_reid.model import open_model
from aligned_reid.weights import read_weight_file, write_safetensors


@pytest.fixture
def photos(tiny_data):
    return sorted((tiny_data / "images").iterdir())


@pytest.mark.parametrize("flip", [False, True])
def test_features_equal_those_of_extraction(tiny_data, tiny_run, flip):
    images = TestImages(open_data(tiny_data), size=(64, 32))
    model, _ = open_model(read_weight_file(tiny_run / "model.safetensors"), "w", need_local=True)
    accelerator = open_accelerator(Config(device="cpu"), None, 0)
    expected = extract_features(model, images, accelerator, World(), local=True, workers=0, flip=flip)
    reid = ReID.from_pretrained(tiny_run, "cpu", flip_test=flip)
    found = reid([f"{images.images_dir}/{name}" for name in images.image_names])
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-6)
    assert found.global_feat.shape == (len(images), 2048)


def test_paths_images_arrays_and_tensors_give_the_same_features(reid, photos):
    array = decode_image(photos[0])
    forms = [photos[0], str(photos[0]), Image.open(photos[0]), array, torch.from_numpy(array).permute(2, 0, 1)]
    by_path = {number: reid(photos[:1] * number).global_feat for number in (1, 2, 5)}  # bits depend on the batch's size
    assert torch.equal(reid(forms).global_feat, by_path[5])
    assert torch.equal(reid(array).global_feat, by_path[1])
    assert torch.equal(reid(np.stack([array, array])).global_feat, by_path[2])
    assert torch.equal(reid(array[..., ::-1], bgr=True).global_feat, by_path[1])


def test_boxes_give_the_features_of_parts(reid):
    frame = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    part, boxes = frame[20:84, 10:42], [(10, 20, 42, 84), (0, 0, 300, 200)]
    assert torch.equal(reid(frame, boxes=boxes).global_feat, reid([part, frame]).global_feat)
    assert torch.equal(reid(frame[..., ::-1], boxes=boxes[:1], bgr=True).global_feat, reid(part).global_feat)


def test_no_images_and_no_boxes_give_no_features(reid):
    for feats in (reid([]), reid(np.zeros((64, 32, 3), np.uint8), boxes=[])):
        assert feats.global_feat.shape == (0, 2048) and feats.local_feat.shape == (0, 2, 128)


def test_a_bad_image_is_an_error_or_nan(reid, photos, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    images = [photos[0], tmp_path / "bad.jpg", photos[1]]
    assert "bad.jpg" in refusal(reid, images)
    lines = []
    feats = reid(images, on_error=lines.append)
    assert len(lines) == 1
    assert torch.isnan(feats.global_feat).all(dim=1).tolist() == [False, True, False]
    assert torch.isnan(feats.local_feat[1]).all()
    assert torch.isnan(reid(images[1:2], on_error=lines.append).global_feat).all()


def test_many_images_stay_in_order(reid, photos):
    feat, alone = reid(photos[:3] * 50).global_feat, reid(photos[:3]).global_feat
    assert torch.cdist(feat, alone).argmin(1).tolist() == [0, 1, 2] * 50


def test_comparison_uses_the_distances_of_the_test(reid, photos):
    pair = reid.compare(photos[0], photos[1])
    feats = [normalize(feat) for feat in reid(photos[:2])]
    assert pair.distance == pytest.approx(float(euclidean_distance(feats[0], feats[0])[0, 1]), rel=1e-5)
    assert pair.local_distance == pytest.approx(float(aligned_distance(feats[1], feats[1])[0, 1]), rel=1e-5)
    assert pair.path[0] == (0, 0) and pair.path[-1] == (1, 1) and pair.cost.shape == (2, 2)
    assert pair.threshold == 0.5 and pair.same_person == (pair.distance < 0.5)
    assert [image.shape for image in pair.images] == [(64, 32, 3)] * 2
    assert str(pair).startswith("same person: ") and "drawn's test" in str(pair) and "\n" not in str(pair)


def test_a_comparison_without_threshold_or_local_branch_says_so(tiny_run, photos):
    (tiny_run / "results.json").unlink()
    assert ReID.from_pretrained(tiny_run, "cpu").threshold is None
    content = read_weight_file(tiny_run / "model.safetensors")
    write_safetensors(tiny_run / "model.safetensors", content["model"], Config.of(resize_h_w=(64, 32)).to_dict())
    pair = ReID.from_pretrained(tiny_run, "cpu").compare(photos[0], photos[1])
    assert pair.same_person is None and pair.path is None and pair.local_distance is None
    assert "no threshold" in str(pair) and pair.match_rate is None
    assert "local branch" in refusal(pair.save, "pair.png")


def test_a_verification_record_in_the_weights_comes_first(tiny_run):
    content = read_weight_file(tiny_run / "model.safetensors")
    for rates, threshold in (({"threshold": 0.75}, 0.75), (None, None)):  # None: too few pairs for this rate
        torch.save({**content, "verification": {"global": {"at_fmr": {"0.001": rates}}}}, tiny_run / "ckpt.pth")
        assert ReID.from_pretrained(tiny_run / "ckpt.pth", "cpu").threshold == threshold
        assert ReID.from_pretrained(tiny_run, "cpu").threshold == 0.5


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("uint8_input", [True, False])
def test_an_exported_graph_gives_the_features_of_the_model(reid, tiny_run, photos, tmp_path, batch_size, uint8_input):
    model, _ = open_model(read_weight_file(tiny_run / "model.safetensors"), "w", need_local=True)
    graph = InferenceGraph(model, local=True, uint8_input=uint8_input, normalize_feature=False)
    export_onnx(graph, tmp_path / "model.onnx", (64, 32), opset=17, batch_size=batch_size)
    onnx = ReID.from_pretrained(tmp_path / "model.onnx", resize_h_w=[64, 32])
    assert onnx.size == (64, 32)
    for one, other in zip(onnx(photos[:3]), reid(photos[:3]), strict=True):
        assert (one - other).abs().max() < 0.02 * other.abs().max()  # the model may compute in 16 bit
    assert "ONNX" in refusal(onnx.save_heat_map, photos[0], tmp_path / "map.png")


def test_what_cannot_be_opened_is_refused_in_one_line(tiny_run, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07 no graph")
    (tmp_path / "empty").mkdir()
    for source, device, settings, word in (
        (tmp_path / "bad.onnx", "cpu", {}, "ONNX"),
        (tmp_path / "empty", "cpu", {}, "ckpt.pth"),
        (tmp_path / "none.pth", "cpu", {}, "no weight file"),
        (tiny_run, "tpu", {}, "tpu"),
        (tiny_run, "cpu:first", {}, "cpu:first"),
        (tiny_run, "cpu", {"colour": 1}, "colour"),
        (tiny_run, "cpu", {"resize_h_w": (8, 8)}, "32"),
    ):
        assert word in refusal(ReID.from_pretrained, source, device, **settings)
    (tiny_run / "results.json").write_text("{")
    assert "damaged" in refusal(ReID.from_pretrained, tiny_run, "cpu")


def test_a_heat_map_is_drawn(reid, photos, tmp_path):
    reid.save_heat_map(photos[0], tmp_path / "map.png")
    assert min(Image.open(tmp_path / "map.png").size) > 100


def test_the_digest_covers_weights_and_settings(tiny_run, reid):
    assert ReID.from_pretrained(tiny_run, "cpu").digest == reid.digest
    assert ReID.from_pretrained(tiny_run, "cpu", flip_test=True).digest != reid.digest
    content = read_weight_file(tiny_run / "model.safetensors")
    content["model"]["base.conv1.weight"][0, 0, 0, 0] += 1
    write_safetensors(tiny_run / "model.safetensors", content["model"], content["config"])
    assert ReID.from_pretrained(tiny_run, "cpu").digest != reid.digest


def test_safetensors_are_read_whatever_their_first_byte(tmp_path):
    path, starts = tmp_path / "weights", set()
    for length in range(0, 256, 8):
        write_safetensors(path, {"a": torch.zeros(1)}, {"name": "x" * length})
        starts.add(path.read_bytes()[:1])
        assert read_weight_file(path)["model"]
    assert b"\x08" in starts
