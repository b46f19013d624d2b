"""Euclidean and aligned distance against the reference's outputs and against the definitions written out."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aligned_reid import InputError
from aligned_reid.distance import (
    aligned_distance,
    aligned_distance_pairs,
    alignment_path,
    euclidean_distance,
    normalize,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "distances.npz")


def golden(name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def random_stripes(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cheapest_of_all_paths(cost: list[list[float]]) -> float:
    """Every monotone path tried in turn."""
    num_rows, num_columns = len(cost), len(cost[0])
    best = math.inf
    for downs in itertools.combinations(range(num_rows + num_columns - 2), num_rows - 1):
        i = j = 0
        total = cost[0][0]
        for step in range(num_rows + num_columns - 2):
            i, j = (i + 1, j) if step in downs else (i, j + 1)
            total += cost[i][j]
        best = min(best, total)
    return best


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
class TestGolden:
    def check(self, computed: torch.Tensor, name: str, dtype: torch.dtype, relative: float) -> None:
        assert computed.dtype == dtype
        np.testing.assert_allclose(computed.numpy(), GOLDEN[name], rtol=relative, atol=0)

    def test_euclidean(self, dtype: torch.dtype, relative: float) -> None:
        computed = euclidean_distance(golden("query_global", dtype), golden("gallery_global", dtype))
        self.check(computed, "euclidean", dtype, relative)

    def test_normalize(self, dtype: torch.dtype, relative: float) -> None:
        # The golden file's own normalisation adds float32's epsilon to the norm where the contract adds 1e-12.
        normalized = normalize(golden("query_global", torch.float64)).to(dtype)
        np.testing.assert_allclose(normalized.numpy(), GOLDEN["normalized_query_global"], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(normalized.norm(dim=-1).numpy(), 1, rtol=1e-6)

    def test_aligned(self, dtype: torch.dtype, relative: float) -> None:
        computed = aligned_distance(golden("query_local", dtype), golden("gallery_local", dtype))
        self.check(computed, "local", dtype, relative)

    def test_aligned_pairs(self, dtype: torch.dtype, relative: float) -> None:
        query, gallery = golden("query_local", dtype), golden("gallery_local", dtype)
        computed = aligned_distance_pairs(query, gallery[: len(query)])
        expected = np.diag(GOLDEN["local"])
        np.testing.assert_allclose(computed.numpy(), expected, rtol=relative, atol=0)


def test_aligned_normalized_golden() -> None:
    query, gallery = normalize(golden("query_local", torch.float64)), normalize(golden("gallery_local", torch.float64))
    np.testing.assert_allclose(aligned_distance(query, gallery), GOLDEN["local_normalized"], rtol=1e-6)
    computed = aligned_distance(query.float(), gallery.float())
    np.testing.assert_allclose(computed, GOLDEN["local_normalized"], rtol=1e-5)


@pytest.mark.parametrize(("num_x", "num_y"), [(1, 1), (1, 5), (5, 1), (2, 2), (3, 6), (6, 3), (5, 5)])
def test_aligned_is_the_cheapest_of_all_paths(num_x: int, num_y: int) -> None:
    x, y = random_stripes(0, 4, num_x, 3), random_stripes(1, 5, num_y, 3)
    computed = aligned_distance(x, y)
    pairs = aligned_distance_pairs(x, y[:4])
    for m, n in itertools.product(range(4), range(5)):
        cost = torch.tanh((x[m].unsqueeze(1) - y[n].unsqueeze(0)).norm(dim=-1) / 2)
        expected = cheapest_of_all_paths(cost.tolist())
        assert computed[m, n].item() == pytest.approx(expected, abs=1e-9)
        path = alignment_path(x[m], y[n])
        assert path.distance.item() == pytest.approx(expected, abs=1e-9)
        torch.testing.assert_close(path.cost, cost, rtol=0, atol=1e-9)
        if m == n:
            assert pairs[m].item() == pytest.approx(expected, abs=1e-9)


def test_alignment_path_is_monotone_and_sums_to_the_distance() -> None:
    x, y = random_stripes(2, 8, 4), random_stripes(3, 6, 4)
    path = alignment_path(x, y)
    assert path.cells[0] == (0, 0)
    assert path.cells[-1] == (7, 5)
    assert len(path.cells) == 8 + 6 - 1
    for (i, j), (next_i, next_j) in itertools.pairwise(path.cells):
        assert (next_i - i, next_j - j) in {(0, 1), (1, 0)}
    assert path.distance.item() == pytest.approx(sum(path.cost[i, j].item() for i, j in path.cells))
    torch.testing.assert_close(path.distance, aligned_distance(x.unsqueeze(0), y.unsqueeze(0))[0, 0])


def test_alignment_path_follows_a_vertical_shift() -> None:
    stripes = 10 * torch.eye(6, dtype=torch.float64)
    cells = alignment_path(stripes[:5], stripes[1:]).cells
    assert {(1, 0), (2, 1), (3, 2), (4, 3)} <= set(cells)


def test_alignment_path_keeps_no_gradient() -> None:
    path = alignment_path(random_stripes(0, 3, 4).requires_grad_(), random_stripes(1, 3, 4))
    assert not path.cost.requires_grad
    assert not path.distance.requires_grad


def test_euclidean_is_the_norm_of_the_difference() -> None:
    x, y = random_stripes(4, 7, 5), random_stripes(5, 9, 5)
    torch.testing.assert_close(euclidean_distance(x, y), (x.unsqueeze(1) - y.unsqueeze(0)).norm(dim=-1))


def test_normalize_along_another_dimension_and_of_zero() -> None:
    x = random_stripes(6, 3, 4)
    torch.testing.assert_close(normalize(x, dim=0), x / x.norm(dim=0, keepdim=True))
    assert normalize(torch.zeros(2, 3)).tolist() == torch.zeros(2, 3).tolist()


def test_gradients_are_those_of_finite_differences() -> None:
    x, y = random_stripes(7, 3, 3, 4).requires_grad_(), random_stripes(8, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(aligned_distance, (x, y))
    assert torch.autograd.gradcheck(aligned_distance_pairs, (x[:2], y))
    assert torch.autograd.gradcheck(euclidean_distance, (x[:, 0], y[:, 0]))
    assert torch.autograd.gradcheck(normalize, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_points_coincide(dtype: torch.dtype) -> None:
    x = random_stripes(9, 1, 4, 8, dtype=dtype).repeat(3, 1, 1).requires_grad_()
    loss = (
        euclidean_distance(x[:, 0], x[:, 0]).sum() + aligned_distance(x, x).sum() + aligned_distance_pairs(x, x).sum()
    )
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    zeros = torch.zeros(2, 4, 8, dtype=dtype, requires_grad=True)
    aligned_distance(zeros, zeros).sum().backward()
    assert zeros.grad is not None
    assert torch.isfinite(zeros.grad).all()


def test_far_stripes_cost_one_each() -> None:
    x = torch.full((1, 8, 2), 1e4)
    assert aligned_distance(x, -x).item() == 15.0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(half: torch.dtype) -> None:
    x, y = random_stripes(10, 4, 8, 16).to(half), random_stripes(11, 5, 8, 16).to(half)
    computed = aligned_distance(x, y)
    assert computed.dtype == torch.float32
    torch.testing.assert_close(computed, aligned_distance(x.float(), y.float()), rtol=0, atol=0)
    assert euclidean_distance(x[:, 0], y[:, 0]).dtype == torch.float32
    assert normalize(x).dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    x, y = random_stripes(12, 4, 8, 16, dtype=torch.float32), random_stripes(13, 4, 8, 16, dtype=torch.float32)
    functions = (
        lambda: aligned_distance(x, y),
        lambda: aligned_distance_pairs(x, y),
        lambda: euclidean_distance(x[:, 0], y[:, 0]),
        lambda: alignment_path(x[0], y[0]).cost,
    )
    for function in functions:
        expected = function()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            computed = function()
        assert computed.dtype == torch.float32
        assert torch.equal(computed, expected)


def test_mixed_types_take_the_wider() -> None:
    x = random_stripes(14, 2, 3, 4)
    assert aligned_distance(x.float(), x).dtype == torch.float64
    assert euclidean_distance(x[0], x[0].float()).dtype == torch.float64


def test_the_same_with_and_without_gradient() -> None:
    x, y = random_stripes(15, 3, 8, 4), random_stripes(16, 5, 8, 4)
    assert torch.equal(aligned_distance(x, y), aligned_distance(x.requires_grad_(), y).detach())
    kept = x.detach().clone()
    aligned_distance(kept, y)
    assert torch.equal(kept, x.detach())


def test_no_images() -> None:
    assert aligned_distance(torch.zeros(0, 8, 4), torch.zeros(3, 8, 4)).shape == (0, 3)
    assert euclidean_distance(torch.zeros(2, 4), torch.zeros(0, 4)).shape == (2, 0)
    assert aligned_distance_pairs(torch.zeros(0, 8, 4), torch.zeros(0, 8, 4)).shape == (0,)


def test_runs_without_looking_at_values() -> None:
    """A fake tensor has no values: whatever would need one on the host (a mask, an item) raises."""
    with FakeTensorMode():
        x, y = torch.empty(3, 8, 4), torch.empty(5, 8, 4)
        assert aligned_distance(x, y).shape == (3, 5)
        assert aligned_distance_pairs(x, y[:3]).shape == (3,)
        assert euclidean_distance(x[:, 0], y[:, 0]).shape == (3, 5)


@pytest.mark.parametrize(
    ("function", "x", "y", "message"),
    [
        (euclidean_distance, (3, 4), (5, 6), "width: 4 and 6"),
        (euclidean_distance, (3, 4, 5), (5, 5), "needs"),
        (aligned_distance, (3, 8, 4), (5, 8, 6), "width: 4 and 6"),
        (aligned_distance, (3, 4), (5, 4), "needs"),
        (aligned_distance, (3, 0, 4), (5, 8, 4), "one stripe"),
        (aligned_distance_pairs, (3, 8, 4), (5, 8, 4), "differ: 3 and 5"),
        (aligned_distance_pairs, (3, 8, 4), (3, 8, 5), "width: 4 and 5"),
        (alignment_path, (3, 8, 4), (3, 8, 4), "needs"),
        (alignment_path, (8, 4), (8, 5), "width: 4 and 5"),
        (alignment_path, (8, 4), (0, 4), "one stripe"),
    ],
)
def test_wrong_shapes_are_said(function, x: tuple[int, ...], y: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        function(torch.zeros(x), torch.zeros(y))
    assert function.__name__ in str(error.value)
    assert "\n" not in str(error.value)
