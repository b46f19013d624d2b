"""Euclidean and aligned distance: pure, differentiable functions on tensors of any device.

Both compute in at least float32, even under autocast: a difference of squares in half precision loses the digits that
mining compares. float64 stays float64. No shape depends on a value and no boolean mask selects elements, so the device
never waits for the host.

Aligned distance: Zhang et al., "AlignedReID: Surpassing Human-Level Performance in Person Re-Identification",
arXiv:1711.08184, section 3.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aligned_reid.errors import InputError

# Lower bound of squared distances before the square root, whose slope at 0 is infinite.
MIN_SQUARED_DISTANCE = 1e-12


class AlignmentPath(NamedTuple):
    """The cheapest way to match the stripes of two images from top to bottom."""

    cells: list[tuple[int, int]]  # stripe pairs (i, j) from (0, 0) to (H - 1, G - 1)
    cost: Tensor  # [H, G], cost of each stripe pair, in [0, 1)
    distance: Tensor  # [], the aligned distance: the sum of the costs on the path


def normalize(x: Tensor, dim: int = -1) -> Tensor:
    """Scale x to unit length along `dim`: x / (||x|| + 1e-12), same shape."""
    (x,) = _same_precision(x)
    return x / (x.norm(p=2, dim=dim, keepdim=True) + 1e-12)


def euclidean_distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of every pair: [M, D], [N, D] -> [M, N].

    sqrt(clamp(|x|^2 + |y|^2 - 2 x.y, min=1e-12)): no distance is below 1e-6, and the gradient is finite even if points
    coincide. Raises InputError for other shapes.
    """
    _check_shapes("euclidean_distance", x, y, "[M, D] and [N, D]", num_dims=2)
    x, y = _same_precision(x, y)
    with _no_autocast(x):
        norms = x.square().sum(1, keepdim=True) + y.square().sum(1)  # [M, N]
        return _clamped_sqrt(torch.addmm(norms, x, y.t(), alpha=-2))


def aligned_distance(x: Tensor, y: Tensor) -> Tensor:
    """Aligned distance of every pair of images, stripes ordered from top to bottom: [M, H, d], [N, G, d] -> [M, N].

    The cost of two stripes at Euclidean distance e is tanh(e / 2) = (exp(e) - 1) / (exp(e) + 1). The aligned distance
    is the total cost of the cheapest path from stripe pair (0, 0) to (H - 1, G - 1) that moves right or down; it visits
    H + G - 1 pairs. Raises InputError for other shapes.
    """
    _check_stripes("aligned_distance", x, y)
    x, y = _same_precision(x, y)
    num_x, num_y = x.shape[1], y.shape[1]
    rows, columns = _cells_by_diagonal(num_x, num_y, x.device)
    with _no_autocast(x):
        # One small matrix product per stripe pair, already in the order that the path needs: the costs are never
        # permuted, and images are contiguous in memory.
        x_norms = x.square().sum(2).t().index_select(0, rows)  # [H * G, M]
        y_norms = y.square().sum(2).t().index_select(0, columns)  # [H * G, N]
        x_cells = x.transpose(0, 1).index_select(0, rows)  # [H * G, M, d]
        y_cells = y.transpose(0, 1).index_select(0, columns)  # [H * G, N, d]
        norms = x_norms.unsqueeze(2) + y_norms.unsqueeze(1)  # [H * G, M, N]
        squared = torch.baddbmm(norms, x_cells, y_cells.transpose(1, 2), alpha=-2)
        return _shortest_path(_stripe_cost(squared), num_x, num_y)


def aligned_distance_pairs(x: Tensor, y: Tensor) -> Tensor:
    """Like aligned_distance, but only of image n of x and image n of y: [N, H, d], [N, G, d] -> [N]."""
    _check_stripes("aligned_distance_pairs", x, y)
    if x.shape[0] != y.shape[0]:
        raise InputError(f"aligned_distance_pairs: numbers of images differ: {x.shape[0]} and {y.shape[0]}")
    num_x, num_y = x.shape[1], y.shape[1]
    rows, columns = _cells_by_diagonal(num_x, num_y, x.device)
    cost = _stripe_cost_pairs(x, y).permute(1, 2, 0).reshape(num_x * num_y, -1)  # [H * G, N]
    return _shortest_path(cost.index_select(0, rows * num_y + columns), num_x, num_y)


def alignment_path(x: Tensor, y: Tensor) -> AlignmentPath:
    """The stripes of two images that the aligned distance matches: [H, d], [G, d] -> AlignmentPath, without gradient.

    Of paths with equal cost, returns the one that moves down last (along the stripes of y first). Raises InputError for
    other shapes.
    """
    _check_shapes("alignment_path", x, y, "[H, d] and [G, d]", num_dims=2)
    _check_stripes("alignment_path", x.unsqueeze(0), y.unsqueeze(0))
    cost = _stripe_cost_pairs(x.detach().unsqueeze(0), y.detach().unsqueeze(0))[0]
    costs = cost.tolist()
    num_x, num_y = cost.shape
    total = [[0.0] * num_y for _ in range(num_x)]
    for i in range(num_x):
        for j in range(num_y):
            above = total[i - 1][j] if i else float("inf")
            left = total[i][j - 1] if j else float("inf")
            total[i][j] = costs[i][j] + (min(above, left) if i or j else 0.0)
    i, j = num_x - 1, num_y - 1
    cells = [(i, j)]
    while i or j:
        if j == 0 or (i > 0 and total[i - 1][j] <= total[i][j - 1]):
            i -= 1
        else:
            j -= 1
        cells.append((i, j))
    return AlignmentPath(cells[::-1], cost, torch.as_tensor(total[-1][-1], dtype=cost.dtype, device=cost.device))


def at_least_float32(x: Tensor) -> Tensor:
    """Convert float16, bfloat16 and integers to float32; leave wider types unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert the tensors to their widest type, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(device_type=x.device.type, enabled=False)


def _clamped_sqrt(squared: Tensor) -> Tensor:
    return squared.clamp(min=MIN_SQUARED_DISTANCE).sqrt()


def _stripe_cost(squared: Tensor) -> Tensor:
    """Squared stripe distances -> costs, same shape. Uses tanh, because the quotient of exponentials overflows."""
    if squared.requires_grad:
        return torch.tanh(_clamped_sqrt(squared) * 0.5)
    # Mining and evaluation compute in place: allocating this much memory costs more than the arithmetic.
    return squared.clamp_(min=MIN_SQUARED_DISTANCE).sqrt_().mul_(0.5).tanh_()


def _stripe_cost_pairs(x: Tensor, y: Tensor) -> Tensor:
    """[N, H, d], [N, G, d] -> [N, H, G]."""
    x, y = _same_precision(x, y)
    with _no_autocast(x):
        norms = x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)
        return _stripe_cost(torch.baddbmm(norms, x, y.transpose(1, 2), alpha=-2))


def _cells_by_diagonal(num_x: int, num_y: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the stripe pairs, each [H * G], by anti-diagonals, each from top to bottom."""
    cells = [(i, k - i) for k in range(num_x + num_y - 1) for i in range(num_x) if 0 <= k - i < num_y]
    # A single copy that does not block. Not cached: a tensor created in inference mode could not be used in training.
    rows, columns = torch.tensor(cells).t().contiguous().to(device, non_blocking=True)
    return rows, columns


def _shortest_path(cost: Tensor, num_x: int, num_y: int) -> Tensor:
    """Costs by anti-diagonals, [H * G, ...] -> total cost of the cheapest path, [...].

    The cells of an anti-diagonal depend only on the previous one, so H + G - 1 steps do instead of H * G.
    """
    diagonals = cost.split([min(k, num_x - 1) - max(0, k - num_y + 1) + 1 for k in range(num_x + num_y - 1)])
    total = diagonals[0]
    for k, diagonal in enumerate(diagonals[1:], start=1):
        steps = [torch.minimum(total[:-1], total[1:])]  # from above, from the left
        if k < num_y:  # cell (0, k) is reached only from the left
            steps.insert(0, total[:1])
        if k < num_x:  # cell (k, 0) is reached only from above
            steps.append(total[-1:])
        total = diagonal + torch.cat(steps)
    return total[0]


def _check_shapes(name: str, x: Tensor, y: Tensor, expected: str, num_dims: int) -> None:
    if x.dim() != num_dims or y.dim() != num_dims:
        raise InputError(f"{name}: needs {expected}, got {list(x.shape)} and {list(y.shape)}")
    if x.shape[-1] != y.shape[-1]:
        raise InputError(f"{name}: features differ in width: {x.shape[-1]} and {y.shape[-1]}")


def _check_stripes(name: str, x: Tensor, y: Tensor) -> None:
    _check_shapes(name, x, y, "[M, H, d] and [N, G, d]", num_dims=3)
    if x.shape[1] == 0 or y.shape[1] == 0:
        raise InputError(f"{name}: each image needs at least one stripe, got {list(x.shape)} and {list(y.shape)}")
