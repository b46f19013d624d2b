"""The pages in headless Chromium, opened from the disk: .ci/run installs it; elsewhere these tests skip."""

import base64
import json

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import wait_for

from aligned_reid.data import TestImages, open_data
from aligned_reid.evaluation.features import FeatureWriter
from aligned_reid.inference.gallery import Group, Hit
from aligned_reid.inference.html import data_uri, thumbnail
from aligned_reid.inference.pages import write_group_page, write_search_page
from aligned_reid.inference.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; apt-get install chromium")

DRAWN = "document.querySelector('.row .hit')"
NUM_QUERIES, NUM_IMAGES = 3368, 19281  # Market-1501's test


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def source(tiny_data, tmp_path_factory):
    """Features of the drawn people that are their colours."""
    images = TestImages(open_data(tiny_data), size=(32, 16))
    pixels = np.stack([images[index][0] for index in range(len(images))]) / 255.0
    stripes = pixels.reshape(len(pixels), 8, -1)
    path = tmp_path_factory.mktemp("pages") / "features.h5"
    labels = {"person_id": images.person_ids, "camera": images.cameras, "mark": images.marks}
    shapes = {"global": (32 * 16 * 3,), "local": stripes.shape[1:]}
    writer = FeatureWriter(path, images.image_names, labels, {"normalize_feature": True}, shapes)
    writer.write(0, {"global": pixels.reshape(len(pixels), -1), "local": stripes})
    writer.finish()
    return path


@pytest.fixture(scope="module")
def report(source, tiny_data):
    return write_report(source, source.parent / "report", data_path=tiny_data, log=lambda line: None)


def wait_until(browser, condition):
    wait_for(lambda: browser.run(f"Boolean({condition})"))


def open_page(browser, page):
    browser.problems.clear()
    browser.open(page)


def show_queries(browser):
    """Rows are drawn once they are near the window."""
    browser.run("document.getElementById('queries').scrollIntoView({behavior: 'instant'})")
    wait_until(browser, DRAWN)


def first_query(browser):
    show_queries(browser)
    return browser.run("document.querySelector('.row .query').innerText").split()


def test_report_opens_from_the_disk_with_the_worst_query_first(browser, report):
    open_page(browser, report)
    data = json.loads((report.parent / "data.js").read_text().removeprefix("showReport(").rstrip()[:-1])
    assert browser.run("document.querySelectorAll('.row').length") == len(data["queries"])
    assert first_query(browser)[0] == f"{min(data['orders'][0]['ap']) / 10:.1f}%"
    wait_until(browser, "[...document.images].filter((one) => one.naturalWidth).length > 10")
    assert browser.problems == []


def test_queries_are_filtered_by_person_and_camera(browser, report):
    open_page(browser, report)
    person = first_query(browser)[3]
    change = "document.getElementById('tools').dispatchEvent(new Event('input'))"
    browser.run(f"document.getElementById('person').value = '{person}'; {change}")
    assert browser.run("document.querySelectorAll('.row').length") == 2  # one query a camera
    browser.run(f"document.getElementById('camera').value = '2'; {change}")
    assert first_query(browser)[3:6] == [person, "camera", "2"]
    assert browser.run("document.getElementById('count').value").startswith("1 of ")


def test_an_image_opens_its_alignment_and_keys_move_on(browser, report):
    open_page(browser, report)
    show_queries(browser)
    browser.run(f"{DRAWN}.focus()")
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    place = "[...document.activeElement.closest('.hits').children].indexOf(document.activeElement.parentNode)"
    assert browser.run(place) == 1
    browser.run("document.activeElement.click()")
    wait_until(browser, "document.querySelectorAll('#pair rect').length === 64")
    assert browser.run("document.querySelectorAll('#pair .link').length") == 15  # 8 + 8 - 1 pairs of stripes
    assert "Aligned distance" in browser.run("document.getElementById('alignment').textContent")
    title = browser.run("document.getElementById('detail-text').textContent")
    browser.press("ArrowLeft")
    assert browser.run("document.getElementById('detail-text').textContent") != title
    browser.press("Escape")
    wait_until(browser, "!document.getElementById('detail').open")
    assert browser.problems == []


def test_single_file_shows_alignments_too(browser, source, tiny_data, tmp_path):
    page = write_report(source, tmp_path, data_path=tiny_data, single_file=True, log=lambda line: None)
    open_page(browser, page)
    show_queries(browser)
    browser.run(f"{DRAWN}.click()")
    wait_until(browser, "document.querySelectorAll('#pair rect').length === 64")
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_report_fits_a_phone(browser, report, dark):
    browser.resize(390, 844, dark=dark)
    open_page(browser, report)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    light = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light != dark
    browser.resize(1280, 900)


def test_a_whole_market1501_test_draws_only_the_rows_near_the_window(browser, report, tmp_path):
    random = np.random.default_rng(1)
    order = json.loads((report.parent / "data.js").read_text().removeprefix("showReport(").rstrip()[:-1])["orders"][0]
    hits = [random.integers(NUM_QUERIES, NUM_IMAGES, 28).tolist() for _ in range(NUM_QUERIES)]
    ap = random.integers(0, 1001, NUM_QUERIES).tolist()
    data = {
        "stripes": 8,
        "pairQueries": 32,
        "person": random.integers(1, 751, NUM_IMAGES).tolist(),
        "camera": random.integers(1, 7, NUM_IMAGES).tolist(),
        "name": [f"{number:08d}_0001_00000000.jpg" for number in range(NUM_IMAGES)],
        "thumbnails": [data_uri(thumbnail(np.zeros((128, 64, 3), np.uint8)))] * NUM_IMAGES,
        "queries": list(range(NUM_QUERIES)),
        "orders": [{**order, "key": f"global{number}", "ap": ap, "hits": hits} for number in range(4)],
    }
    (tmp_path / "data.js").write_text(f"showReport({json.dumps(data)})")
    page = tmp_path / "index.html"
    page.write_bytes(report.read_bytes())
    open_page(browser, page)
    assert first_query(browser)
    for share in (0.5, 1, 0.25):
        browser.run(f"scrollTo({{top: {share} * document.body.scrollHeight, behavior: 'instant'}})")
        middle = "document.elementFromPoint(600, 400).closest('.row')"
        wait_until(browser, f"{middle} && {middle}.querySelector('.hit')")
        assert browser.run("document.querySelectorAll('.hit').length") < 1000
    assert browser.problems == []


def test_photos_with_hostile_names_are_harmless(browser, tmp_path):
    hostile = [
        '<img src=x onerror="document.title=1">.jpg',
        "a\nb.jpg",
        "' onclick='x.jpg",
        "{{ 7 * 7 }}.jpg",
        "王 芳.jpg",
    ]
    paths = [tmp_path / name for name in hostile]
    for path in paths:
        path.write_bytes(cv2.imencode(".jpg", np.full((64, 32, 3), 90, np.uint8))[1].tobytes())
    gone = tmp_path / "gone.jpg"
    hits = [Hit(path, 0.5 * number, number < 2) for number, path in enumerate([*paths, gone])]
    write_search_page(tmp_path / "search.html", paths[0], hits)
    write_group_page(tmp_path / "groups.html", [Group(1, paths), Group(2, [gone])])
    for page, number in (("search.html", 7), ("groups.html", 6)):
        open_page(browser, tmp_path / page)
        assert browser.run("document.querySelectorAll('.hit').length") == number
        assert browser.run("document.querySelectorAll('[onerror], [onclick], script').length") == 0
        titles = browser.run("[...document.querySelectorAll('.hit')].map((one) => one.title).join('|')")
        assert "<img src=x" in titles and "{{ 7 * 7 }}" in titles and r"a\nb.jpg" in titles
        wait_until(browser, "[...document.images].filter((one) => one.naturalWidth).length >= 5")
        assert browser.problems == []
    assert base64.b64encode(b"\xff\xd8\xff").decode() in (tmp_path / "search.html").read_text()
