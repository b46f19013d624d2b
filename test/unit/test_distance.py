"""Euclidean and aligned distance, compared with the reference's outputs and with their definitions."""

import itertools

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal
from torch._subclasses.fake_tensor import FakeTensorMode

from aligned_reid.distance import (
    aligned_distance,
    aligned_distance_pairs,
    alignment_path,
    euclidean_distance,
    normalize,
)

VECTORS = np.load(GOLDEN / "distances.npz")


def golden(name, dtype=torch.float64):
    return torch.from_numpy(VECTORS[name]).to(dtype)


def random_stripes(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cheapest_of_all_paths(cost, i=0, j=0):
    """Try every path from a cell that moves right or down."""
    cells = [(a, b) for a, b in ((i + 1, j), (i, j + 1)) if a < len(cost) and b < len(cost[0])]
    return cost[i][j] + min((cheapest_of_all_paths(cost, *cell) for cell in cells), default=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_distances_match_the_reference(dtype, rtol):
    query, gallery = golden("query_local", dtype), golden("gallery_local", dtype)
    euclidean = euclidean_distance(golden("query_global", dtype), golden("gallery_global", dtype))
    for name, value in {"euclidean": euclidean, "local": aligned_distance(query, gallery)}.items():
        assert value.dtype == dtype
        np.testing.assert_allclose(value, VECTORS[name], rtol=rtol, err_msg=name)
    pairs = aligned_distance_pairs(query, gallery[: len(query)])
    np.testing.assert_allclose(pairs, np.diag(VECTORS["local"]), rtol=rtol)
    # The reference adds the epsilon of float32 to the norm, ours 1e-12.
    unit = [normalize(golden(name).to(dtype)) for name in ("query_local", "gallery_local")]
    np.testing.assert_allclose(aligned_distance(*unit), VECTORS["local_normalized"], rtol=max(rtol, 1e-6))
    unit = normalize(golden("query_global", dtype))
    np.testing.assert_allclose(unit, VECTORS["normalized_query_global"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(unit.norm(dim=-1), 1, rtol=1e-6)


@pytest.mark.parametrize(("num_x", "num_y"), [(1, 1), (1, 5), (5, 1), (2, 2), (3, 6), (6, 3), (5, 5)])
def test_aligned_distance_is_the_cost_of_the_cheapest_path(num_x, num_y):
    x, y = random_stripes(0, 3, num_x, 3), random_stripes(1, 4, num_y, 3)
    unchanged = x.clone()
    computed = aligned_distance(x, y)
    for m, n in itertools.product(range(3), range(4)):
        cost = torch.tanh((x[m].unsqueeze(1) - y[n].unsqueeze(0)).norm(dim=-1) / 2)
        expected = cheapest_of_all_paths(cost.tolist())
        assert computed[m, n].item() == pytest.approx(expected, abs=1e-9)
        path = alignment_path(x[m], y[n])
        assert path.distance.item() == pytest.approx(expected, abs=1e-9)
        torch.testing.assert_close(path.cost, cost, rtol=0, atol=1e-9)
    torch.testing.assert_close(aligned_distance_pairs(x, y[:3]), computed[:, :3].diag())
    assert torch.equal(x, unchanged)
    assert torch.equal(aligned_distance(x.requires_grad_(), y).detach(), computed)


def test_alignment_path_moves_right_or_down_and_sums_to_the_distance():
    path = alignment_path(random_stripes(2, 8, 4).requires_grad_(), random_stripes(3, 6, 4))
    assert (path.cells[0], path.cells[-1]) == ((0, 0), (7, 5))
    steps = {(i - last_i, j - last_j) for (last_i, last_j), (i, j) in itertools.pairwise(path.cells)}
    assert steps == {(0, 1), (1, 0)}
    assert path.distance.item() == pytest.approx(sum(path.cost[cell].item() for cell in path.cells))
    assert not path.cost.requires_grad and not path.distance.requires_grad
    tied = alignment_path(torch.ones(3, 4), torch.ones(2, 4))
    assert tied.cells == [(0, 0), (0, 1), (1, 1), (2, 1)]  # down last among equal paths


def test_normalize_takes_a_dimension_and_leaves_zero_unchanged():
    x = random_stripes(6, 3, 4)
    torch.testing.assert_close(normalize(x, dim=0), x / x.norm(dim=0, keepdim=True))
    assert normalize(torch.zeros(2, 3)).count_nonzero() == 0


def test_gradients_match_finite_differences():
    x, y = random_stripes(7, 3, 3, 4).requires_grad_(), random_stripes(8, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(aligned_distance, (x, y))
    assert torch.autograd.gradcheck(aligned_distance_pairs, (x[:2], y))
    assert torch.autograd.gradcheck(euclidean_distance, (x[:, 0], y[:, 0]))
    assert torch.autograd.gradcheck(normalize, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_if_points_coincide(dtype):
    x = random_stripes(9, 1, 4, 8, dtype=dtype).repeat(3, 1, 1).requires_grad_()
    loss = euclidean_distance(x[:, 0], x[:, 0]).sum() + aligned_distance(x, x).sum()
    (loss + aligned_distance_pairs(x, x).sum()).backward()
    assert torch.isfinite(x.grad).all()
    zeros = torch.zeros(2, 4, 8, dtype=dtype, requires_grad=True)
    aligned_distance(zeros, zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_distances_are_computed_in_the_wider_type_and_at_least_float32(x_dtype, y_dtype, expected, autocast):
    def distances(x, y):
        pairs, path = aligned_distance_pairs(x, y), alignment_path(x[0], y[0])
        return [aligned_distance(x, y), euclidean_distance(x[:, 0], y[:, 0]), pairs, path.cost]

    x, y = random_stripes(10, 5, 8, 16).to(x_dtype), random_stripes(11, 5, 8, 16).to(y_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        computed = distances(x, y)
    assert {value.dtype for value in computed} == {expected}
    assert all(map(torch.equal, computed, distances(x.to(expected), y.to(expected))))
    assert normalize(x).dtype == torch.float32


def test_far_stripes_cost_one_each_and_empty_inputs_give_empty_distances():
    x = torch.full((1, 8, 2), 1e4)
    assert aligned_distance(x, -x).item() == 15.0
    assert aligned_distance(torch.zeros(0, 8, 4), torch.zeros(3, 8, 4)).shape == (0, 3)
    assert euclidean_distance(torch.zeros(2, 4), torch.zeros(0, 4)).shape == (2, 0)
    assert aligned_distance_pairs(torch.zeros(0, 8, 4), torch.zeros(0, 8, 4)).shape == (0,)


def test_distances_never_wait_for_the_device():
    """Fake tensors have no values, so any operation that needs a value on the host raises."""
    with FakeTensorMode():
        x, y = torch.empty(3, 8, 4), torch.empty(5, 8, 4)
        assert aligned_distance(x, y).shape == (3, 5)
        assert aligned_distance_pairs(x, y[:3]).shape == (3,)
        assert euclidean_distance(x[:, 0], y[:, 0]).shape == (3, 5)


@pytest.mark.parametrize(
    ("function", "x", "y", "message"),
    [
        (euclidean_distance, (3, 4), (5, 6), "width"),
        (euclidean_distance, (3, 4, 5), (5, 5), "needs"),
        (aligned_distance, (3, 8, 4), (5, 8, 6), "width"),
        (aligned_distance, (3, 4), (5, 4), "needs"),
        (aligned_distance, (3, 0, 4), (5, 8, 4), "one stripe"),
        (aligned_distance_pairs, (3, 8, 4), (5, 8, 4), "numbers of images"),
        (aligned_distance_pairs, (3, 8, 4), (3, 8, 5), "width"),
        (alignment_path, (3, 8, 4), (3, 8, 4), "needs"),
        (alignment_path, (8, 4), (8, 5), "width"),
        (alignment_path, (8, 4), (0, 4), "one stripe"),
    ],
)
def test_wrong_shapes_are_errors(function, x, y, message):
    found = refusal(function, torch.zeros(x), torch.zeros(y))
    assert found.startswith(f"{function.__name__}: ") and message in found
