"""Benchmarks of training run on a tiny data set and print their tables; what the figures are is for a quiet machine."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def tables_of(name, *arguments):
    """The rows of the tables that a benchmark prints, by their first column."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmark" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|") and "---" not in line]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def train(data, subject, *arguments):
    tiny = ("--resize_h_w=32,32", "--ids_per_batch=4", "--steps=1", "--workers=0")
    return tables_of("training.py", f"--data_path={data}", f"--only={subject}", *tiny, *arguments)


def numbers(row):
    return [float(cell.rstrip("%").replace(",", "")) for cell in row]


def test_training_has_a_row_for_each_side(tiny_data):
    title, *rows = train(tiny_data, "training").items()
    assert title[1] == ["images/s", "s a step", "to published", "of the bare step", "MB at most"]
    assert [name for name, _ in rows] == [
        "published, float32 NCHW",
        "ours",
        "ours, --cache true",
        "ours, --grad_checkpoint true",
        "ours, --accumulate 2, half the --ids_per_batch",
        "bare step, random images",
    ]
    for name, row in rows:
        rate, _, to_published, of_bare, megabytes = numbers(row)
        assert rate > 0 and to_published > 0 and of_bare > 0, name
        assert 100 < megabytes < 4000, name
    assert numbers(rows[0][1])[2] == 1.0
    assert numbers(rows[-1][1])[3] == 100.0


def test_scaling_compares_one_process_and_two(tiny_data):
    rows = train(tiny_data, "scaling")
    rows.pop("scaling")
    assert list(rows) == ["1 process", "2 processes", "2 processes, --cross_rank_mining true"]
    for device, *figures in rows.values():
        assert "threads" in device
        assert min(numbers(figures)) > 0
    assert numbers(rows["1 process"][1:])[2] == 1.0


def test_feature_extraction(tiny_data):
    rows = train(tiny_data, "extraction", "--extract=8")
    assert min(numbers(rows["8 images"])) > 0


def test_loading(tiny_data):
    rows = tables_of("loader.py", f"--data_path={tiny_data}", "--resize_h_w=32,32", "--images=16", "--rounds=1")
    assert len(rows) == 6
    assert numbers(rows["published"])[1] == 1.0


def test_the_local_loss_is_the_published_one():
    """The benchmark ends with an error where the two losses differ."""
    rows = tables_of("local_loss.py", "--sizes=16,24", "--rounds=1")
    assert [len(numbers(rows[f"{size} images"])) for size in (16, 24)] == [6, 6]


def test_more_steps_than_an_epoch_has_are_refused(tiny_data):
    arguments = [f"--data_path={tiny_data}", "--ids_per_batch=8", "--steps=2"]
    command = [sys.executable, str(ROOT / "benchmark" / "training.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "--steps 2 and one before them are more than the 1 steps of an epoch" in done.stderr
