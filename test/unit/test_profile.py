"""What a step costs: operations and bytes that can be worked out by hand, and a trace in files."""

import gzip
import json

import pytest
import torch

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.training.log import Throughput
from aligned_reid.training.profile import StepProfile


@pytest.fixture
def profile_steps(tmp_path):
    """Profile `num_steps` of `num_batches` products [4, 8] x [8, 16], forward and backward."""

    def run(num_steps, num_batches):
        lines = []
        profile = StepProfile(num_steps, Accelerator(Config(amp="O0")), tmp_path / "profile", lines.append)
        weight = torch.zeros(8, 16, requires_grad=True)
        seen = 0
        for batch in profile.steps(torch.ones(num_batches, 4, 8)):
            product = batch.requires_grad_(False) @ weight
            product.backward(torch.ones_like(product))
            weight.grad = None
            seen += 1
        profile.finish()
        profile.finish()
        return profile, lines, seen

    return run


def test_operations_and_bytes_are_counted_and_traced(profile_steps):
    profile, lines, seen = profile_steps(2, 6)
    assert seen == 6
    product = 2 * 4 * 8 * 16  # a multiplication and an addition each
    assert profile.flops == 2 * product  # the product and the gradient of its weight; the input has none
    x, weight, y = 4 * 8 * 4, 8 * 16 * 4, 4 * 16 * 4  # bytes
    gradient = 2 * y  # ones_like reads a tensor for its shape, and writes one
    extra = profile.bytes - (x + weight + y) - gradient - (x + y + weight)
    assert extra in (0, weight, 2 * weight)  # autograd may detach or clone a gradient: whole weights, nothing else
    assert set(profile.results()) == {"flops_per_step", "bytes_per_step", "seconds_per_step"}
    assert profile.results()["seconds_per_step"] > 0
    trace = json.loads(gzip.decompress((profile.folder / "trace.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2 * 2  # 2 steps of 2 products
    assert "aten::mm" in (profile.folder / "operators.txt").read_text()
    assert len(lines) == 2 and str(profile.folder) in lines[1]


def test_a_run_that_ends_early_reports_the_steps_traced_so_far(profile_steps):
    profile, lines, _ = profile_steps(100, Throughput.WARM_UP_STEPS + 1 + 3)
    assert profile.num_traced == 3 and "a step over 3" in lines[1]


@pytest.mark.parametrize(("num_steps", "num_batches"), [(0, 6), (2, 2)])
def test_without_steps_to_trace_nothing_is_written(profile_steps, num_steps, num_batches):
    profile, lines, seen = profile_steps(num_steps, num_batches)
    assert (seen, lines, profile.results()) == (num_batches, [], None)
    assert not profile.folder.exists()
