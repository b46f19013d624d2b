"""How evaluation goes: its settings, mirroring, pooled queries, and the plain global distance last."""

import numpy as np
import pytest
import torch
from conftest import refusal

from aligned_reid.config import Config
from aligned_reid.data.dataset import TestImages, open_data
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.evaluation.evaluate import settle_test
from aligned_reid.evaluation.extract import FeatureSet, extract_features, run_network
from aligned_reid.evaluation.protocol import EvaluationSettings, LabelArrays, evaluate_features, pool_queries
from aligned_reid.model import AlignedReID

PERSONS, CAMERAS, MARKS = [1, 1, 1, 1, 2, 2, 1, 2], [0, 0, 0, 1, 0, 1, 1, 0], [0, 2, 2, 2, 0, 1, 1, 1]
LABELS = LabelArrays(*map(np.array, (PERSONS, CAMERAS, MARKS)))


def make_features(local=True):
    torch.manual_seed(0)
    return FeatureSet(torch.randn(8, 4), torch.randn(8, 2, 3) if local else None)


@pytest.mark.parametrize(("pool", "form"), [("average", lambda x: x.mean(0)), ("max", lambda x: x.max(0).values)])
def test_queries_are_pooled_over_person_and_camera(pool, form):
    features = make_features()
    pooled = pool_queries(features, LABELS, pool)
    assert torch.equal(pooled.global_feat[0], form(features.global_feat[[1, 2]]))  # not 3, of another camera
    assert torch.equal(pooled.local_feat[0], form(features.local_feat[[1, 2]]))
    assert torch.equal(pooled.global_feat[1], features.global_feat[4])  # it has no multi-query images
    assert len(pooled.global_feat) == 2


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("re_ranked", [True, False])
def test_order_and_names(local, re_ranked):
    lines = []
    settings = EvaluationSettings(re_ranked=re_ranked, multi_query_pool="average")
    scores = evaluate_features(make_features(local), LABELS, lines.append, settings)
    names = ["local", "global_local", "global"] if local else ["global"]
    names = [one for name in names for one in ([f"{name}_re_ranked"] if re_ranked else []) + [name]]
    assert list(scores) == [f"{name}_multi_query" for name in names] + [*names, "verification"]
    assert [scores["verification"][name] is not None for name in ("global", "global_local")] == [True, local]
    assert sum("EER" in line for line in lines) == 1 + local
    lines = [line for line in lines if "EER" not in line]
    assert lines[-2].startswith("Global distance (") and "trapezoid" in lines[-2]
    assert not any(word in line for line in lines[::2] for word in ("cmc1", "FPS", "Ep"))  # parsed by tools
    assert lines[-1].split()[3] == f"{scores['global']['cmc1']:.2%}],"
    assert lines[2 * len(names) - 2].startswith("Global distance, multi-query (average)")


def test_pooled_queries_are_what_is_ranked():
    """Pooling moves the first query next to its match."""
    feats = torch.tensor([[9.0], [0.0], [2.0], [50.0], [0.0], [0.1], [1.0], [9.0]])
    settings = EvaluationSettings(multi_query_pool="average")
    scores = evaluate_features(FeatureSet(feats, None), LABELS, [].append, settings)
    assert scores["global"]["cmc1"] == 0.5  # the first query, at 9, is nearest to the other person at 9
    assert scores["global_multi_query"]["cmc1"] == 1.0  # pooled it is at 1, where its match is


def settled(settings, **given):
    lines = []
    config = settle_test(Config.of(**given), {"config": {"ims_per_id": 4, **settings}}, lines.append)
    return config, lines


def test_settings_come_from_the_weights():
    config, lines = settled({"resize_h_w": [128, 64], "bnneck": True, "flip_test": True, "base_lr": 1.0})
    assert (config.resize_h_w, config.bnneck, config.flip_test) == ((128, 64), True, True)
    assert config.base_lr == Config().base_lr
    assert "--resize_h_w=128,64 --bnneck=true --flip_test=true" in lines[0]


@pytest.mark.parametrize("settings", [{"resize_h_w": 256}, ["bnneck"], "resnet.yaml", None])
def test_the_config_of_another_project_is_not_read(settings):
    assert settle_test(Config(), {"config": settings}, print) == Config()


def test_explicit_flags_win_and_another_image_size_is_logged():
    config, lines = settled({"flip_test": True}, flip_test=False)
    assert (config.flip_test, lines) == (False, [])
    config, lines = settled({"resize_h_w": [128, 64]}, resize_h_w=(256, 128))
    assert config.resize_h_w == (256, 128)
    assert "128,64" in lines[0] and "256,128" in lines[0]
    assert settled({"resize_h_w": [128, 64]}, resize_h_w=(128, 64))[1] == []
    config, _ = settled({"bnneck": True, "feature_after_bn": False}, feature_after_bn=True, only_test=True)
    assert (config.bnneck, config.feature_after_bn) == (True, True)
    assert "--feature_after_bn" in refusal(settled, {"bnneck": False}, feature_after_bn=True, only_test=True)


def test_mirror_averaging_is_the_mean_with_the_mirror_image(tiny_data, small_trunk):
    images = TestImages(open_data(tiny_data), size=(64, 32))
    model, accelerator = AlignedReID(None, pretrained="none").eval(), Accelerator(Config(amp="O0"))
    flipped = extract_features(model, images, accelerator, World(), local=True, workers=0, flip=True)
    pixels = torch.stack([torch.from_numpy(images[index][0]) for index in range(len(images))])
    with torch.inference_mode():
        plain, mirrored = (run_network(model, view, accelerator) for view in (pixels, pixels.flip(2)))
    for one, other, mean in zip(plain[:2], mirrored[:2], flipped, strict=True):
        assert torch.allclose(mean, (one + other) / 2, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mean, one, rtol=1e-2)
