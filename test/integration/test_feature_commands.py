"""script/extract.py and script/evaluate.py as a user runs them."""

import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import PROGRAM_PATH, assert_done, assert_refused, run_script, score_lines, write_small_script

from aligned_reid.data import Partitions, read_partitions, write_partitions
from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.evaluation import saved

NAMES = ("global", "global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked")


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
def extract(command, tiny_flags, trained, tmp_path):
    """Write the features of the trained run to a file."""

    def run(*flags):
        save = (f"--model_weight_file={trained}", "--amp=O0", f"--save_file={tmp_path / 'features.h5'}")
        assert_done(command("extract.py", *tiny_flags, *save, *flags))
        return tmp_path / "features.h5"

    return run


@pytest.fixture
def evaluate(command):
    """Evaluate features: (standard output, results)."""

    def run(features, *flags):
        done = assert_done(command("evaluate.py", f"--features={features}", *flags))
        return done.out, json.loads(features.with_suffix(".results.json").read_text())

    return run


def test_extraction_needs_no_run_folder(extract, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp").touch()  # where run folders are by default: none can be made
    assert extract().is_file()


def test_saved_features_have_the_runs_scores_and_streamed_ones_too(extract, evaluate, trained, monkeypatch):
    features = extract()
    out, results = evaluate(features)
    assert score_lines(out) == score_lines((trained / "log.txt").read_text())
    trained_results = json.loads((trained / "results.json").read_text())
    assert all(results[name] == trained_results[name] for name in NAMES)
    assert results["verification"] == {**trained_results["verification"], "measured_on": "features.h5"}
    with h5py.File(features) as file:
        assert set(file) == {"global", "local", "person_id", "camera", "mark", "image_name"}
        made_by = json.loads(file.attrs["made_by"])
    assert made_by["resize_h_w"] == [64, 32]
    assert set(made_by) == {"weights", "resize_h_w", "precision", "normalize_feature", "flip_test"}

    monkeypatch.setattr(saved, "MATRIX_BYTES", 0)
    out, streamed = evaluate(features)
    assert "so distances are streamed: local distances not re-ranked" in out
    assert all(streamed[name] == trained_results[name] for name in ("global", "local", "global_local"))
    for name in ("global", "global_local"):
        curve, whole = streamed["verification"][name], trained_results["verification"][name]
        assert curve["eer"] == pytest.approx(whole["eer"], abs=0.01)
    expected = trained_results["global_re_ranked"]["mAP"]
    assert streamed["global_re_ranked"]["mAP"] == pytest.approx(expected, abs=1e-4)
    assert "local_re_ranked" not in streamed
    assert not list(features.parent.glob("*.part*"))


def test_more_galleries_and_multi_query(extract, evaluate, multi_query_data, tmp_path):
    flags = (f"--data_path={multi_query_data}", "--multi_query=true", "--use_local_distance=false")
    features = extract(*flags)
    with h5py.File(features) as file:
        assert "local" not in file
        num_gallery, mean = int((file["mark"][()] == 1).sum()), file["global"][()].mean(0)
    more = tmp_path / "more.npz"
    np.savez(more, **{"global": np.stack([mean] * 5), "person_id": np.zeros(5), "camera": np.zeros(5)})
    out, results = evaluate(features, "--gallery", more, "--multi_query_pool=max", "--re_ranked=false")
    assert results["num_gallery"] == num_gallery + 5
    assert {"global", "global_multi_query"} <= set(results)
    assert "Global distance, multi-query (max)" in out
    assert out.splitlines()[-2].startswith("Global distance (")


def test_multi_query_in_a_run(train, trained, multi_query_data, tmp_path):
    flags = (f"--data_path={multi_query_data}", "--multi_query=true", "--use_local_distance=false")
    done = train("--only_test=true", f"--model_weight_file={trained}", *flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["global"]["cmc1"] is not None
    assert {"global_multi_query", "global_re_ranked_multi_query"} <= set(results)
    assert score_lines(done.out)[-2].startswith("Global distance (")


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
def test_junk_is_left_out_and_counted(evaluate, tmp_path, monkeypatch, matrix_bytes):
    monkeypatch.setattr(saved, "MATRIX_BYTES", matrix_bytes)
    features, more = write_with_junk(tmp_path / "a.npz", 2), write_with_junk(tmp_path / "b.npz", 3)
    out, results = evaluate(features, "--gallery", more)
    assert "junk (person id -1): 0 query, 30 gallery images" in out
    assert ("streamed" in out) == (matrix_bytes == 0)
    assert results["num_gallery"] == 12
    assert results["global"]["cmc1"] == results["global"]["mAP"] == results["global_re_ranked"]["mAP"] == 1


def test_junk_queries_are_left_out_and_distractors_count(evaluate, tmp_path):
    features = write_with_junk(tmp_path / "a.npz", 1)
    fields = dict(np.load(features))
    fields["person_id"][fields["person_id"] == -1] = 0  # the first person's images are distractors too
    fields["person_id"][0] = -1
    np.savez(features, **fields)
    out, results = evaluate(features, "--re_ranked=false")
    assert "junk (person id -1): 1 query, 0 gallery images" in out
    assert (results["num_query"], results["num_gallery"], results["global"]["cmc1"]) == (5, 12, 0)


def test_queries_too_many_for_their_own_distances_are_streamed(evaluate, tmp_path, monkeypatch):
    num = 102
    fields = {"global": np.eye(num, 4) + 1, "local": np.ones((num, 2, 3)), "person_id": np.zeros(num)}
    np.savez(tmp_path / "a.npz", **fields, camera=np.arange(num), mark=np.arange(num) < 2)  # two gallery images
    monkeypatch.setattr(saved, "MATRIX_BYTES", 4 * 100 * 100)
    assert "streamed" in evaluate(tmp_path / "a.npz")[0]
    assert "streamed" not in evaluate(tmp_path / "a.npz", "--re_ranked=false")[0]


@pytest.mark.slow
def test_two_processes_write_what_one_does(extract, trained, tiny_flags, tmp_path):
    script = write_small_script(tmp_path / "extract.py", "extract.py")
    launch = ("launch.py", "--nproc=2", f"--log_dir={tmp_path / 'logs'}", script, *tiny_flags, "--amp=O0")
    flags = (f"--model_weight_file={trained}", f"--save_file={tmp_path / 'two.h5'}")
    assert_done(run_script(*launch, *flags, environment=PROGRAM_PATH))
    with h5py.File(extract()) as one, h5py.File(tmp_path / "two.h5") as two:
        np.testing.assert_allclose(one["global"][()], two["global"][()], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one["image_name"][()], two["image_name"][()])


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        ("evaluate.py", "", "--features"),
        ("evaluate.py", "--features=/", ".h5"),
        ("evaluate.py", "--features=/none.h5", "/none.h5"),
        ("evaluate.py", "--features=empty.npz", "mark 0"),
        ("evaluate.py", "--features=wide.npz --gallery empty.npz", "3 and 2"),
        ("evaluate.py", "--features=apart.npz", "No valid query"),
        ("evaluate.py", "--features=apart.npz --k1=0", "k1"),
        ("evaluate.py", "--features=apart.npz --k2=-1", "k2"),
        ("evaluate.py", "--features=apart.npz --lambda_value=2", "lambda_value"),
        ("evaluate.py", "--features=apart.npz --save_file=/none/results.json", "does not exist"),
        ("evaluate.py", "--features=apart.npz --use_local_distance=true", "no field local"),
        ("evaluate.py", "--features=apart.npz --save_file=apart.npz", ".json"),
        ("extract.py", "--data_path=tiny", "--save_file"),
        ("extract.py", "--data_path=tiny --save_file=f.pth --pretrained=none", ".h5"),
        ("extract.py", "--data_path=tiny --save_file=f.h5 --model_weight_file=/none", "no weight file"),
    ],
)
def test_mistakes_are_one_line(command, tiny_data, tmp_path, monkeypatch, small_trunk, script, flags, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_data)
    empty = {"global": np.zeros((4, 2)), "person_id": np.arange(4), "camera": np.arange(4), "mark": np.ones(4)}
    np.savez("empty.npz", **empty)
    np.savez("wide.npz", **empty | {"global": np.zeros((4, 3)), "mark": np.array([0, 0, 1, 1])})
    np.savez("apart.npz", **empty | {"mark": np.array([0, 0, 1, 1])})
    assert_refused(command(script, *flags.split()), word)
    assert not list(tmp_path.glob("*.json*"))
