"""Products of features are the same, whichever library multiplies."""

import pytest
import torch

from aligned_reid.evaluation import product as module
from aligned_reid.evaluation.product import product


@pytest.fixture(params=[False, True], ids=["mm", "oneDNN"])
def either_library(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_rows", "num_columns", "width"), [(5, 7, 2048), (64, 33, 128), (1, 1, 3)])
def test_products_of_rows(either_library, dtype, num_rows, num_columns, width):
    torch.manual_seed(1)
    x, y = torch.randn(num_rows, width, dtype=dtype), torch.randn(2 * num_columns, width, dtype=dtype)[::2]
    found = product(x, y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double() @ y.double().t(), rtol=0, atol=1e-3 if width > 200 else 1e-4)


def test_onednn_multiplies_float32_of_the_cpu_only(either_library, monkeypatch):
    called = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, y: called.append(x.dtype) or multiply(x, y))
    for dtype in (torch.float32, torch.float64):
        product(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype))
    assert called == ([torch.float64] if either_library else [torch.float32, torch.float64])
