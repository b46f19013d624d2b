"""What is evaluated in which order: pooled queries, and the plain global distance last."""

import numpy as np
import pytest
import torch

from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.protocol import EvaluationSettings, LabelArrays, evaluate_features, pool_queries

LABELS = LabelArrays(
    np.array([1, 1, 1, 1, 2, 2, 1, 2]), np.array([0, 0, 0, 1, 0, 1, 1, 0]), np.array([0, 2, 2, 2, 0, 1, 1, 1])
)


def make_features(local=True):
    generator = torch.Generator().manual_seed(0)
    return FeatureSet(
        torch.randn(8, 4, generator=generator), torch.randn(8, 2, 3, generator=generator) if local else None
    )


@pytest.mark.parametrize(("pool", "form"), [("average", lambda x: x.mean(0)), ("max", lambda x: x.max(0).values)])
def test_queries_are_pooled_over_person_and_camera(pool, form):
    features = make_features()
    pooled = pool_queries(features, LABELS, pool)
    assert torch.equal(pooled.global_feat[0], form(features.global_feat[[1, 2]]))  # not 3, of another camera
    assert torch.equal(pooled.local_feat[0], form(features.local_feat[[1, 2]]))
    assert torch.equal(
        pooled.global_feat[1], features.global_feat[4]
    )  # without multi-query images it keeps its feature
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
    record = scores["verification"]
    assert (record["global"] is not None, record["global_local"] is not None) == (True, local)
    verified = [line for line in lines if "EER" in line]
    assert len(verified) == 1 + local
    lines = [line for line in lines if line not in verified]
    assert lines[-2].startswith("Global distance (")
    assert "trapezoid" in lines[-2]
    assert not any(word in line for line in lines[::2] for word in ("cmc1", "FPS", "Ep"))  # parsed by tools
    assert lines[-1].split()[3] == f"{scores['global']['cmc1']:.2%}],"
    assert lines[2 * len(names) - 2].startswith("Global distance, multi-query (average)")


def test_pooled_queries_are_what_is_ranked():
    """Pooling moves the first query next to its match."""
    feats = torch.tensor([[9.0], [0.0], [2.0], [50.0], [0.0], [0.1], [1.0], [9.0]])
    scores = evaluate_features(
        FeatureSet(feats, None), LABELS, lambda line: None, EvaluationSettings(multi_query_pool="average")
    )
    assert scores["global"]["cmc1"] == 0.5  # the first query, at 9, is nearest to the other person at 9
    assert scores["global_multi_query"]["cmc1"] == 1.0  # pooled it is at 1, where its match is
