"""Distance matrices against the golden vectors and against aligned_reid.distance in float64."""

import numba
import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal

from aligned_reid import InputError
from aligned_reid.distance import aligned_distance, euclidean_distance, normalize
from aligned_reid.evaluation import distances, global_distance_matrix, kernels, local_distance_matrix

VECTORS = np.load(GOLDEN / "distances.npz")


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_blocks(monkeypatch):
    """Small inputs then have many blocks, the last of them not full."""
    for name, size in {"GLOBAL_TILE": 7, "QUERIES_PER_BLOCK": 3, "GALLERY_PER_TILE": 10, "DEVICE_TILE": 9}.items():
        monkeypatch.setattr(distances, name, size)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_distances_match_the_reference():
    for function, kind in ((global_distance_matrix, "global"), (local_distance_matrix, "local")):
        computed = function(VECTORS[f"query_{kind}"], VECTORS[f"gallery_{kind}"])
        assert computed.dtype == np.float32
        np.testing.assert_allclose(computed, VECTORS["local" if kind == "local" else "euclidean"], rtol=1e-5)
    query, gallery = (normalize(torch.from_numpy(VECTORS[name])) for name in ("query_local", "gallery_local"))
    np.testing.assert_allclose(local_distance_matrix(query, gallery), VECTORS["local_normalized"], rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("num_x", "num_y"), [(8, 8), (1, 1), (1, 6), (6, 1), (3, 5)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_local_is_the_aligned_distance(num_x, num_y, scale, threads):
    x, y = scale * random_tensor(0, 14, num_x, 16), scale * random_tensor(1, 37, num_y, 16)
    expected = aligned_distance(x.double(), y.double()).numpy()
    np.testing.assert_allclose(local_distance_matrix(x, y), expected, rtol=3e-6)


@pytest.mark.usefixtures("small_blocks")
def test_local_distances_within_a_set():
    x = random_tensor(2, 34, 5, 16)
    computed = local_distance_matrix(x, x)
    expected = aligned_distance(x.double(), x.double()).numpy()
    assert np.array_equal(computed, computed.T)
    others = ~np.eye(34, dtype=bool)
    np.testing.assert_allclose(computed[others], expected[others], rtol=3e-6)
    # A stripe's distance to itself is a difference of equal numbers: its error is the square root of their rounding.
    np.testing.assert_allclose(computed, expected, atol=5 * 2e-3)
    np.testing.assert_allclose(computed, local_distance_matrix(x, x.clone()), atol=5 * 4e-3)


@pytest.mark.usefixtures("small_blocks")
def test_global_is_the_euclidean_distance(threads):
    x, y = random_tensor(3, 16, 20), random_tensor(4, 33, 20)
    expected = euclidean_distance(x.double(), y.double()).numpy()
    np.testing.assert_allclose(global_distance_matrix(x, y), expected, rtol=3e-6)
    itself = global_distance_matrix(y, y)
    expected = euclidean_distance(y.double(), y.double()).numpy()
    np.testing.assert_allclose(itself, expected, rtol=3e-6, atol=5e-3)
    assert np.array_equal(np.triu(itself, 7), np.tril(itself, -7).T)


def test_far_and_equal_stripes_and_no_images():
    assert global_distance_matrix(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert local_distance_matrix(torch.zeros(3, 2, 4), torch.zeros(0, 2, 4)).shape == (3, 0)
    far = np.full((2, 8, 4), 1e4, np.float32)
    np.testing.assert_allclose(local_distance_matrix(far, -far), 15.0, rtol=1e-6)
    zeros = np.zeros((2, 8, 4), np.float32)
    np.testing.assert_allclose(local_distance_matrix(zeros, zeros.copy()), 15 * 0.5e-6, rtol=1e-5)


@pytest.mark.parametrize("function", [global_distance_matrix, local_distance_matrix])
def test_tensors_and_arrays_of_any_layout_give_the_same(function):
    shape = (6, 4) if function is global_distance_matrix else (6, 3, 4)
    x, y = random_tensor(6, *shape), random_tensor(7, *shape)
    expected = function(x, y)
    read_only = y.numpy().copy()
    read_only.setflags(write=False)
    reversed_twice = np.ascontiguousarray(x.numpy()[::-1])[::-1]
    assert np.array_equal(function(reversed_twice, y.numpy().astype(np.float64)), expected)
    assert np.array_equal(function(np.asfortranarray(x.numpy()), y), expected)
    np.testing.assert_allclose(function(x.bfloat16(), y), expected, rtol=0.05)
    assert np.array_equal(function(x.requires_grad_(), read_only), expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("distance", "shape"), [(euclidean_distance, (8,)), (aligned_distance, (4, 8))])
def test_tiles_of_a_device_make_the_whole_matrix(distance, shape):
    x, y = random_tensor(8, 23, *shape), random_tensor(9, 31, *shape)
    np.testing.assert_allclose(distances._by_device_tiles(distance, x, y, same=False), distance(x, y), rtol=1e-5)
    itself = distances._by_device_tiles(distance, x, x, same=True)
    np.testing.assert_allclose(itself, distance(x, x), rtol=1e-5, atol=5e-3)
    assert np.array_equal(np.triu(itself, 9), np.tril(itself, -9).T)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_rows", "num_columns", "width"), [(5, 7, 2048), (1, 1, 3)])
def test_either_library_computes_the_products(onednn, dtype, num_rows, num_columns, width, monkeypatch):
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", onednn and torch.backends.mkldnn.is_available())
    x, y = random_tensor(1, num_rows, width).to(dtype), random_tensor(2, 2 * num_columns, width).to(dtype)[::2]
    found = kernels.product(x, y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double() @ y.double().t(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("function", "x", "y"),
    [
        (global_distance_matrix, (3, 4), (3, 5)),
        (global_distance_matrix, (3, 4, 5), (3, 5)),
        (local_distance_matrix, (3, 8, 4), (3, 8, 5)),
        (local_distance_matrix, (3, 4), (3, 4)),
        (local_distance_matrix, (3, 0, 4), (3, 8, 4)),
    ],
)
def test_wrong_shapes_are_refused(function, x, y):
    assert function.__name__ in refusal(function, torch.zeros(x), torch.zeros(y))


def test_code_that_cannot_be_kept_on_disk_is_compiled_in_memory(monkeypatch):
    njit = numba.njit

    def njit_on_a_read_only_disk(signatures, *, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signatures, **options)

    monkeypatch.setattr(numba, "njit", njit_on_a_read_only_disk)
    count_ranks = kernels.compiled.__wrapped__("count_ranks")
    ranks = np.zeros(1, np.int64)
    count_ranks(np.array([[3, 1, 2]], np.float32), np.array([0, 1]), np.array([2]), np.array([False]), ranks)
    assert ranks.tolist() == [1]


def test_an_error_in_a_thread_is_raised_and_the_thread_count_kept(threads):
    def fail(number):
        raise InputError(f"number {number}")

    assert "number 0" in refusal(kernels.in_threads, fail, range(3))
