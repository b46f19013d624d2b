"""Benchmarks of training run on a tiny data set and print their tables; what the figures are is for a quiet machine."""

import importlib
import math
import sys

import pytest
from conftest import ROOT, run_program

pytestmark = pytest.mark.slow
TINY = ("--resize_h_w=32,32", "--ids_per_batch=4", "--steps=1", "--workers=0")


def rows_of(output):
    """The rows of a benchmark's tables, by their first column; the tables' heads too."""
    lines = [line for line in output.splitlines() if line.startswith("|") and "---" not in line]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def numbers(row):
    """The figures of a row; on a busy machine any may be rounded to 0."""
    found = [float(cell.rstrip("%").replace(",", "")) for cell in row]
    assert all(0 <= value < math.inf for value in found), row
    return found


def output_of(name, *arguments, **options):
    """A benchmark as a user runs it: each side in a separate process."""
    done = run_program(sys.executable, ROOT / "benchmark" / name, *arguments, **options)
    assert done.status == 0, done.err
    return done.out


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A benchmark with all sides in this process, one after another, which is many times as fast."""

    def run(name, *arguments):
        monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "in_own_processes", lambda work, given: [work(*one) for one in given])
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return rows_of(capsys.readouterr().out)

    return run


def test_training_has_a_row_for_each_side(tiny_data, run_here, small_trunk):
    title, *rows = run_here("training", f"--data_path={tiny_data}", "--only=training", *TINY).items()
    assert title[1] == ["images/s", "s a step", "to published", "of the bare step", "MB at most"]
    assert [name for name, _ in rows] == [
        "published, float32 NCHW",
        "ours",
        "ours, --cache true",
        "ours, --accumulate 2, half the --ids_per_batch",
        "ours, --freeze_stages 1",
        "bare step, random images",
    ]
    for name, row in rows:
        *_, megabytes = numbers(row)
        assert megabytes > 100, name
    assert numbers(rows[0][1])[2] == 1.0
    assert numbers(rows[-1][1])[3] == 100.0


def test_scaling_compares_one_process_and_two(tiny_data):
    rows = rows_of(output_of("training.py", f"--data_path={tiny_data}", "--only=scaling", *TINY))
    rows.pop("scaling")
    assert list(rows) == ["1 process", "2 processes", "2 processes, --cross_rank_mining true"]
    for device, *figures in rows.values():
        assert "threads" in device
        assert len(numbers(figures)) == 4
    assert numbers(rows["1 process"][1:])[2] == 1.0


def test_feature_extraction_gives_the_published_features(run_here, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    monkeypatch.delitem(importlib.import_module("extraction").SIDES, "ours, --compile true")  # it compiles for a minute
    monkeypatch.setattr("aligned_reid.evaluation.extract.BATCHES_PER_BLOCK", 1)  # undone when the test ends
    title, *rows = run_here("extraction", "--images=8", "--resize_h_w=32,32").items()
    assert title[0] == "features of 8 images of 32 x 32"
    assert [name for name, _ in rows] == ["published", "ours"]
    for _, (device, *figures) in rows:
        *_, difference = numbers(figures)
        assert difference < (0.05 if "bfloat16" in device else 1e-4)


def test_sizes_of_the_gallery_are_drawn_from_tables_of_several_runs(tmp_path):
    measured = output_of("evaluation_large.py", "--galleries=100,200", "--local=false", "--re_rank_up_to=100")
    rows = [line.split("|")[1:3] for line in measured.splitlines()[3:]]
    assert rows == [[" 100 ", " global "], [" 100 ", " global, re-ranked "], [" 200 ", " global "]]
    (tmp_path / "one.txt").write_text(measured)
    (tmp_path / "two.txt").write_text(measured.replace(" 100 ", " 1,000 "))
    output_of("evaluation_large.py", "--figure=all.png", "--tables", "one.txt", "two.txt", cwd=tmp_path)
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_of_the_ablation_are_made_once(tiny_data, tmp_path):
    folder, results = tmp_path / "ablation", tmp_path / "results.jsonl"
    flags = (f"--data_path={tiny_data}", f"--folder={folder}", f"--results={results}", "--pretrained=none")
    flags += ("--epochs=1", "--size=64,32", "--rows=8,9")
    made = rows_of(output_of("ablation.py", *flags))
    heads, (padded, mirrored) = made.pop("row"), made.values()
    assert (padded[:3], mirrored[:3]) == (["padded crops", "7", "1"], ["mirror averaging at test", "8", "1"])
    assert [row[heads.index("minutes of training")].isdigit() for row in (padded, mirrored)] == [True, False]
    written = results.read_text()
    assert len(written.splitlines()) == 2 and "--pad_crop=4" in written.splitlines()[1]
    (folder / "row08_seed1" / "ckpt.pth").unlink()  # which making it again would miss
    assert rows_of(output_of("ablation.py", *flags)) == {"row": heads, "8": padded, "9": mirrored}
    assert results.read_text() == written


def test_loading(tiny_data):
    rows = rows_of(
        output_of("loader.py", f"--data_path={tiny_data}", "--resize_h_w=32,32", "--images=16", "--rounds=1")
    )
    assert len(rows) == 6
    assert numbers(rows["published"])[1] == 1.0


def test_the_local_loss_is_the_published_one():
    """The benchmark ends with an error where the two losses differ."""
    rows = rows_of(output_of("local_loss.py", "--sizes=64", "--rounds=1"))
    assert len(numbers(rows["64 images"])) == 6


def test_more_steps_than_an_epoch_has_are_refused(tiny_data, run_here, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_here("training", f"--data_path={tiny_data}", "--ids_per_batch=8", "--steps=2")
    assert exit_.value.code == 2
    assert "--steps 2" in capsys.readouterr().err.splitlines()[-1]


def test_search_finds_what_numpy_finds():
    rows = rows_of(output_of("search.py", "--galleries=300,700", "--queries=70", "--rounds=1"))
    assert list(rows) == ["gallery", "300", "700"]
    assert numbers(rows["700"])[0] == 70
