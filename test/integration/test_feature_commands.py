"""script/extract.py and script/evaluate.py as a user runs them."""

import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import ROOT, run_script

from aligned_reid.data import Partitions, read_partitions, write_partitions
from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.evaluation import saved


@pytest.fixture
def multi_query_data(tiny_data, tmp_path):
    """The data set with a gallery image of each query's person and camera marked for multi-query."""
    data = shutil.copytree(tiny_data, tmp_path / "multi_query")
    parts = read_partitions(data / "partitions.pkl")
    marks = list(parts.test_marks)
    places = [name[:13] for name in parts.test_im_names]  # person and camera
    asked = {place for place, mark in zip(places, marks, strict=True) if mark == QUERY}
    for row, place in enumerate(places):
        if marks[row] == GALLERY and place in asked:
            marks[row] = MULTI_QUERY
            asked.remove(place)  # the others of that place stay, for queries of another camera
    assert MULTI_QUERY in marks
    write_partitions(data / "partitions.pkl", Partitions(**{**vars(parts), "test_marks": marks}))
    return data


@pytest.fixture
def trained(command, tiny_flags, tmp_path, small_trunk):
    """The folder of a short run with the local loss, and what it printed."""
    folder = tmp_path / "run"
    done = command("train.py", *tiny_flags, "--total_epochs=1", "--seed=1", "-llw=1", f"--exp_dir={folder}")
    assert done.status == 0, done.err
    return folder, done.out


@pytest.fixture
def extract(command, tiny_flags, trained, tmp_path):
    def run(name, *flags):
        done = command(
            "extract.py", *tiny_flags, f"--model_weight_file={trained[0]}", f"--save_file={tmp_path / name}", *flags
        )
        assert (done.status, done.err) == (0, "")
        return tmp_path / name

    return run


def score_lines(output):
    return [line for line in output.splitlines() if "cmc1" in line or "Market-1501 benchmark" in line]


def test_saved_features_have_the_runs_scores(command, extract, trained, tmp_path):
    features = extract("features.h5")
    done = command("evaluate.py", f"--features={features}")
    assert (done.status, done.err) == (0, "")
    assert score_lines(done.out) == score_lines(trained[1])
    results = json.loads((tmp_path / "features.results.json").read_text())
    trained_results = json.loads((trained[0] / "results.json").read_text())
    for name in ("global", "global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked"):
        assert results[name] == trained_results[name]
    assert results["verification"] == {**trained_results["verification"], "measured_on": "features.h5"}
    with h5py.File(features) as file:
        assert set(file) == {"global", "local", "person_id", "camera", "mark", "image_name"}
        made_by = json.loads(file.attrs["made_by"])
    assert made_by["resize_h_w"] == [64, 32]
    assert set(made_by) == {"weights", "resize_h_w", "precision", "normalize_feature", "flip_test"}


def test_large_sets_are_streamed_with_the_same_scores(command, extract, trained, tmp_path, monkeypatch):
    features = extract("features.h5")
    monkeypatch.setattr(saved, "MATRIX_BYTES", 0)
    done = command("evaluate.py", f"--features={features}", f"--save_file={tmp_path / 'streamed.json'}")
    assert done.status == 0
    assert "so distances are streamed: local distances not re-ranked" in done.out
    streamed = json.loads((tmp_path / "streamed.json").read_text())
    expected = json.loads((trained[0] / "results.json").read_text())
    for name in ("global", "local", "global_local"):
        assert streamed[name] == expected[name]
    for name in ("global", "global_local"):
        curve, whole = streamed["verification"][name], expected["verification"][name]
        assert curve["eer"] == pytest.approx(whole["eer"], abs=0.01)
    assert streamed["global_re_ranked"]["mAP"] == pytest.approx(expected["global_re_ranked"]["mAP"], abs=1e-4)
    assert "local_re_ranked" not in streamed
    assert not list(tmp_path.glob("*.part*"))


def test_more_galleries_and_multi_query(command, extract, multi_query_data, tmp_path):
    flags = (f"--data_path={multi_query_data}", "--multi_query=true", "--use_local_distance=false")
    features = extract("features.h5", *flags)
    with h5py.File(features) as file:
        assert "local" not in file
        num_gallery, mean = int((file["mark"][()] == 1).sum()), file["global"][()].mean(0)
    np.savez(tmp_path / "more.npz", **{"global": np.stack([mean] * 5), "person_id": np.zeros(5), "camera": np.zeros(5)})
    flags = (
        f"--features={features}",
        "--gallery",
        tmp_path / "more.npz",
        "--multi_query_pool=max",
        "--re_ranked=false",
    )
    done = command("evaluate.py", *flags)
    assert (done.status, done.err) == (0, "")
    results = json.loads((tmp_path / "features.results.json").read_text())
    assert results["num_gallery"] == num_gallery + 5
    assert {"global", "global_multi_query"} <= set(results)
    assert "Global distance, multi-query (max)" in done.out
    assert done.out.splitlines()[-2].startswith("Global distance (")


def write_with_junk(path, num_junk):
    """Six people, two images each; junk images in the gallery, person -1, are nearer to each query than its match."""
    ids, cameras = np.tile(np.arange(6), 2), np.repeat([0, 1], 6)
    feat = np.eye(6, 8)[ids] + np.repeat([[0.0], [0.1]], 6, 0)
    fields = {"global": np.vstack([feat, *[feat[:6]] * num_junk]), "mark": np.append(cameras, [1] * 6 * num_junk)}
    fields["person_id"] = np.append(ids, [-1] * 6 * num_junk)
    fields["camera"] = np.append(cameras, [1] * 6 * num_junk)
    np.savez(path, **fields)
    return path


@pytest.mark.parametrize("matrix_bytes", [saved.MATRIX_BYTES, 0])
def test_junk_is_left_out_and_counted(command, tmp_path, monkeypatch, matrix_bytes):
    monkeypatch.setattr(saved, "MATRIX_BYTES", matrix_bytes)
    features, more = write_with_junk(tmp_path / "a.npz", 2), write_with_junk(tmp_path / "b.npz", 3)
    done = command("evaluate.py", f"--features={features}", "--gallery", more)
    assert (done.status, done.err) == (0, "")
    assert "junk (person id -1): 0 query, 30 gallery images" in done.out
    assert ("streamed" in done.out) == (matrix_bytes == 0)
    results = json.loads((tmp_path / "a.results.json").read_text())
    assert results["num_gallery"] == 12
    assert results["global"]["cmc1"] == results["global"]["mAP"] == results["global_re_ranked"]["mAP"] == 1


def test_junk_queries_are_left_out_and_distractors_count(command, tmp_path):
    features = write_with_junk(tmp_path / "a.npz", 1)
    fields = dict(np.load(features))
    fields["person_id"][fields["person_id"] == -1] = 0  # the first person's images are distractors too
    fields["person_id"][0] = -1
    np.savez(features, **fields)
    done = command("evaluate.py", f"--features={features}", "--re_ranked=false")
    assert done.status == 0, done.err
    assert "junk (person id -1): 1 query, 0 gallery images" in done.out
    results = json.loads((tmp_path / "a.results.json").read_text())
    assert (results["num_query"], results["num_gallery"], results["global"]["cmc1"]) == (5, 12, 0)


def test_multi_query_in_a_run(command, tiny_flags, trained, multi_query_data, tmp_path):
    flags = ("--only_test=true", f"--model_weight_file={trained[0]}", f"--exp_dir={tmp_path / 'test'}")
    flags += (f"--data_path={multi_query_data}",)
    done = command("train.py", *tiny_flags, *flags, "--multi_query=true", "--use_local_distance=false")
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    assert results["global"]["cmc1"] is not None
    assert {"global_multi_query", "global_re_ranked_multi_query"} <= set(results)
    assert score_lines(done.out)[-2].startswith("Global distance (")


@pytest.mark.slow
def test_two_processes_write_what_one_does(tiny_data, tmp_path):
    flags = (f"--data_path={tiny_data}", "--resize_h_w=64,32", "--workers=0", "--device=cpu")
    train = ("--pretrained=none", "--ids_per_batch=4", "--ims_per_id=2", "--total_epochs=1", f"--exp_dir={tmp_path}")
    assert run_script("train.py", *flags, *train).status == 0
    wanted = (*flags, f"--model_weight_file={tmp_path}")
    assert run_script("extract.py", *wanted, f"--save_file={tmp_path / 'one.h5'}").status == 0
    script = ("launch.py", "--nproc=2", f"--log_dir={tmp_path / 'logs'}")
    done = run_script(*script, ROOT / "script" / "extract.py", *wanted, f"--save_file={tmp_path / 'two.h5'}")
    assert done.status == 0, done.err
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "two.h5") as two:
        np.testing.assert_allclose(one["global"][()], two["global"][()], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one["image_name"][()], two["image_name"][()])


def test_mistakes_are_one_line(command, tiny_flags, tmp_path, small_trunk):
    features = tmp_path / "features.npz"
    empty = {"global": np.zeros((4, 2)), "person_id": np.arange(4), "camera": np.arange(4), "mark": np.ones(4)}
    np.savez(features, **empty)
    np.savez(tmp_path / "wide.npz", **empty | {"global": np.zeros((4, 3)), "mark": np.array([0, 0, 1, 1])})
    np.savez(tmp_path / "apart.npz", **empty | {"mark": np.array([0, 0, 1, 1])})
    for script, flags, reason in (
        ("evaluate.py", (), "required: --features"),
        ("evaluate.py", ("--features=/none.h5",), "no feature file at /none.h5"),
        ("evaluate.py", (f"--features={features}",), "has no query (mark 0)"),
        ("evaluate.py", (f"--features={tmp_path}/wide.npz", "--gallery", features), "widths: 3 and 2"),
        ("evaluate.py", (f"--features={tmp_path}/apart.npz",), "No valid query"),
        ("evaluate.py", (f"--features={features}", "--k1=0"), "k1"),
        ("evaluate.py", (f"--features={features}", "--k2=-1"), "k2"),
        ("evaluate.py", (f"--features={features}", "--lambda_value=2"), "lambda_value"),
        ("evaluate.py", (f"--features={features}", "--save_file=/none/results.json"), "/none does not exist"),
        ("evaluate.py", (f"--features={tmp_path}/apart.npz", "--use_local_distance=true"), "has no field local"),
        ("extract.py", tiny_flags, "required: --save_file"),
        ("extract.py", (*tiny_flags, f"--save_file={tmp_path}/f.h5", "--model_weight_file=/none"), "no weight file"),
    ):
        done = command(script, *flags)
        assert done.status == 2, (script, flags, done.err)
        assert done.err.count("\n") == 1, done.err
        assert reason in done.err
    assert not list(tmp_path.glob("*.json*"))
