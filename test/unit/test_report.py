"""The report of a test: what it finds, what it writes, and whom it refuses."""

import base64
import json
import shutil

import h5py
import numpy as np
import pytest
import simplejpeg
import torch
from conftest import TINY, refusal

from aligned_reid.config import Config
from aligned_reid.data import TestImages, make_synthetic, open_data
from aligned_reid.distance import alignment_path
from aligned_reid.evaluation.features import FeatureWriter, read_features
from aligned_reid.evaluation.verification import count_pairs
from aligned_reid.inference.charts import histogram_chart, training_charts
from aligned_reid.inference.findings import Split, nearest_images, rank1_by_cameras
from aligned_reid.inference.grid import align_pairs
from aligned_reid.inference.html import THUMBNAIL_BYTES, THUMBNAIL_SIDE, thumbnail
from aligned_reid.inference.report import write_report
from aligned_reid.run import run


def write_features(path, data, *, local=True):
    """Features that know the person, with noise."""
    images = TestImages(open_data(data))
    noise = np.random.default_rng(1)
    persons = np.unique(images.person_ids, return_inverse=True)[1]
    feats = {"global": (32,), **({"local": (4, 8)} if local else {})}
    labels = {"person_id": images.person_ids, "camera": images.cameras, "mark": images.marks}
    writer = FeatureWriter(path, images.image_names, labels, {"normalize_feature": True}, feats)
    values = {name: noise.normal(size=(persons.max() + 1, *shape))[persons] for name, shape in feats.items()}
    writer.write(0, {name: one + noise.normal(size=one.shape) for name, one in values.items()})
    writer.finish()
    return path


@pytest.fixture(scope="session")
def features(tiny_data, tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "features.h5", tiny_data)


def data_of(report):
    text = (report / "data.js").read_text()
    return json.loads(text.removeprefix("showReport(").rstrip()[:-1])


SMALL = Split(*map(np.array, ([1, 2], [1, 1, 2, 3], [1, 1], [1, 2, 2, 2], [0, 1], [2, 3, 4, 5])))
SMALL_DIST = np.array([[0.1, 0.4, 0.5, 0.2], [0.9, 0.3, 0.6, 0.7]], np.float32)


def test_removed_images_are_shown_but_not_counted():
    found = nearest_images(SMALL_DIST, SMALL)
    assert [one.tolist() for one in found] == [[0, 3, 1, 2], [1, 2, 3, 0]]


@pytest.mark.parametrize("num_removed", [3, 40])
def test_ten_hits_are_shown_behind_any_number_of_removed_images(num_removed):
    ids, cameras = np.ones(60, int), np.where(np.arange(60) < num_removed, 1, 2)
    split = Split(np.array([1]), ids, np.array([1]), cameras, np.array([0]), np.arange(1, 61))
    (found,) = nearest_images(np.arange(60, dtype=np.float32)[None], split)
    removed = list(range(min(num_removed, 20)))
    assert found.tolist() == removed + list(range(num_removed, num_removed + 10))


def test_rank1_by_cameras_leaves_out_persons_that_a_camera_did_not_see():
    assert rank1_by_cameras(SMALL_DIST, SMALL) == {(1, 2): 0.0}
    assert rank1_by_cameras(SMALL_DIST[:, ::-1], SMALL) == {(1, 2): 0.5}


def test_alignments_are_those_of_alignment_path():
    torch.manual_seed(0)
    x, y = torch.randn(20, 5, 3), torch.randn(20, 7, 3)
    found = align_pairs(x, y)
    for pair in range(20):
        expected = alignment_path(x[pair], y[pair])
        assert np.cumsum([0, *found.moves[pair]]).tolist() == [i for i, _ in expected.cells]
        assert found.distance[pair] == pytest.approx(float(expected.distance), rel=1e-5)
        np.testing.assert_allclose(found.cost[pair], expected.cost, rtol=1e-4, atol=1e-5)


def test_histogram_leaves_out_a_distant_few():
    dist = np.append(np.linspace(1, 2, 9999, dtype=np.float32), np.float32(50))[None]
    labels = np.arange(10000) % 2
    counts = count_pairs(dist, np.array([1]), labels, np.array([5]), labels)
    for line in histogram_chart("title", counts, 1.5)["lines"]:
        assert 1 < float(line["values"][-1].split(":")[0]) < 2
    one = count_pairs(dist[:, :2], np.array([1]), labels[:2], np.array([5]), labels[:2])
    assert len(histogram_chart("title", one, None)["lines"]) == 2  # a pair of each kind is enough


def test_thumbnails_have_a_limit():
    jpeg = thumbnail(np.random.default_rng(0).integers(0, 256, (900, 300, 3), np.uint8))
    assert len(jpeg) <= THUMBNAIL_BYTES
    assert simplejpeg.decode_jpeg_header(jpeg)[:2] == (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 3)


def test_training_curves_are_the_logs_last_lines():
    log = "Ep 1, 2.00s, FPS 1.0, ids/s 2.0, gp 50.00%, gL 0.9000, loss 2.0000\nother\n"
    log += "Ep 2, 2.00s, FPS 1.0, ids/s 2.0, gp 60.00%, gL 0.7000, loss 1.0000\n"
    log += "Ep 2, 2.00s, gp 80.00%, gL 0.5000, loss 0.5\n"
    losses, right = training_charts(log)
    assert [line["values"] for line in losses["lines"]] == [["1: 2", "2: 0.5"], ["1: 0.9", "2: 0.5"]]
    assert right["lines"][0]["values"] == ["1: 0.5", "2: 0.8"]
    assert training_charts("no epochs") == []


def test_report_holds_queries_alignments_and_thumbnails(features, tiny_data, tmp_path):
    page = write_report(features, tmp_path / "report", data_path=tiny_data)
    data = data_of(page.parent)
    keys = ["global", "global_local", "global_re_ranked", "global_local_re_ranked"]
    assert [order["key"] for order in data["orders"]] == keys
    for order in data["orders"]:
        assert len(order["ap"]) == len(order["hits"]) == len(data["queries"])
        assert all(one[1::2] == sorted(one[1::2]) for one in order["hits"])
    assert {path.name for path in page.parent.glob("images/*")} == {f"{n}.jpg" for n in range(len(data["name"]))}
    pairs = json.loads((page.parent / "pairs" / "0.js").read_text().removeprefix("addPairs(0,").rstrip()[:-1])
    costs, moves, distance = pairs["0"][str(data["orders"][1]["hits"][0][0])]
    assert len(base64.b64decode(costs)) == 16
    assert (moves.count("d"), moves.count("r")) == (3, 3)
    assert 0 < distance < 7
    assert "Content-Security-Policy" in page.read_text()
    assert "Global + local distance, re-ranked" in page.read_text()


def test_report_without_local_features_has_no_alignments(tiny_data, tmp_path):
    features = write_features(tmp_path / "features.h5", tiny_data, local=False)
    for _ in range(2):  # an earlier report is replaced
        page = write_report(features, tmp_path / "report", data_path=tiny_data, re_ranked=False)
        data = data_of(page.parent)
        assert ([order["key"] for order in data["orders"]], data["stripes"]) == (["global"], 0)
        assert not list((page.parent / "pairs").iterdir())


def test_single_file_holds_everything(features, tiny_data, tmp_path):
    page = write_report(features, tmp_path / "report", data_path=tiny_data, single_file=True)
    assert list(page.parent.iterdir()) == [page]
    assert page.read_text().count("data:image/jpeg") > 10


def test_report_of_a_run_extracts_once_and_shows_its_training(small_trunk, tiny_data, tmp_path, capfd):
    flags = [f"--data_path={tiny_data}", *TINY, "--total_epochs=2", "-llw=1", f"--exp_dir={tmp_path / 'run'}"]
    run(Config.from_arguments(flags))
    capfd.readouterr()
    lines = []
    page = write_report(tmp_path / "run", tmp_path / "run" / "report", device="cpu", log=lines.append)
    assert "Triplets in the right order" in page.read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{results['global']['mAP']:.2%}" in lines[-1]
    assert any("features.h5" in line for line in lines) and capfd.readouterr().out == ""
    written = (tmp_path / "run" / "features.h5").stat().st_mtime_ns
    write_report(tmp_path / "run", tmp_path / "run" / "report", device="cpu", log=lines.append)
    assert (tmp_path / "run" / "features.h5").stat().st_mtime_ns == written
    other = make_synthetic(tmp_path / "other", 12, 2, 2, seed=1)
    page = write_report(tmp_path / "run", tmp_path / "other_report", data_path=other, device="cpu", log=lines.append)
    assert set(data_of(page.parent)["name"]) <= {path.name for path in (other / "images").iterdir()}
    assert len(read_features(tmp_path / "run" / "features.h5")) == len(TestImages(open_data(other)))


def test_a_report_that_failed_can_be_repeated_in_its_folder(features, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    lost = data / "images" / read_features(features).image_names[-1]
    lost.unlink()
    assert lost.name in refusal(write_report, features, tmp_path / "report", data_path=data)
    assert write_report(features, tmp_path / "report", data_path=tiny_data).stat().st_size > 0


def test_mistakes_are_one_line(features, tiny_data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "config.json").write_text("{}")
    nameless = shutil.copy(features, tmp_path / "nameless.h5")
    with h5py.File(nameless, "r+") as file:
        del file["image_name"]
    out = tmp_path / "out"
    assert "--data_path" in refusal(write_report, features, out)
    assert "config.json" in refusal(write_report, tmp_path, out)
    for source, out_dir, reason in (
        (tmp_path / "none.h5", out, "does not exist"),
        (nameless, out, "image_name"),
        (features, tmp_path / "full", "other files"),
        (features, nameless, "--out"),
        (features, nameless / "out", "--out"),
    ):
        assert reason in refusal(write_report, source, out_dir, data_path=tiny_data)
