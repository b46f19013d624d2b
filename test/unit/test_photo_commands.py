"""aligned-reid compare, search and group, as a user runs them."""

import csv
import json
import shutil
import sys

import pytest
from conftest import Finished

from aligned_reid.commands import main


@pytest.fixture
def aligned_reid(monkeypatch, capfd, tiny_run):
    """Run `aligned-reid <name> ...` with the tiny model, in this process."""

    def run(name, *arguments):
        flags = [f"--model={tiny_run}", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["aligned-reid", name, *flags, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Finished(exit_.value.code, *capfd.readouterr())

    return run


def some(photos, num=2):
    return sorted(photos.glob("*.jpg"))[:num]


def test_compare_prints_a_sentence_or_json(aligned_reid, photos):
    done = aligned_reid("compare", *some(photos))
    assert done.status == 0
    assert done.out.startswith("same person: ") and "aligned distance" in done.out
    assert "tensors loaded" in done.err
    content = json.loads(aligned_reid("compare", *some(photos), "--json").out)
    assert content["same_person"] == (content["distance"] < content["threshold"]) and content["path"][0] == [0, 0]


def test_search_prints_a_table(aligned_reid, photos):
    done = aligned_reid("search", some(photos)[0], f"--gallery={photos}", "--k=3")
    lines = done.out.splitlines()
    assert done.status == 0 and len(lines) == 5
    assert lines[2].split()[0] == "1" and lines[2].split()[2] in ("likely", "uncertain")


def test_search_serves_the_good_photos_and_exits_with_2(aligned_reid, photos, tmp_path):
    (photos / "cut\noff.jpg").write_bytes(some(photos)[0].read_bytes()[:300])
    (tmp_path / "empty.jpg").touch()
    done = aligned_reid("search", *some(photos), tmp_path / "empty.jpg", f"--gallery={photos}", "--k=2", "--json")
    assert done.status == 2
    content = json.loads(done.out)
    assert [len(query["hits"]) for query in content["queries"]] == [2, 2] and content["threshold"] == 0.5
    errors = done.err.splitlines()
    assert "2 of the images" in errors[-1]
    assert r"cut\noff.jpg" in errors[1] and "empty.jpg" in errors[2] and len(errors) == 4


def test_a_gallery_of_only_the_query_is_refused(aligned_reid, photos):
    (query,) = some(photos, 1)
    for other in set(photos.rglob("*.jpg")) - {query}:
        other.unlink()
    done = aligned_reid("search", query, f"--gallery={photos}")
    assert done.status == 2 and "no other photo" in done.err.splitlines()[-1]


def test_group_writes_a_table_and_copies(aligned_reid, photos, tmp_path):
    shutil.copy(some(photos)[0], photos / "two\nlines.jpg")
    persons, copies = tmp_path / "persons.csv", tmp_path / "copies"
    done = aligned_reid("group", photos, "--threshold=0.01", f"--csv={persons}", f"--copy_to={copies}")
    assert done.status == 0 and "13 photos of 12 persons" in done.out and r"two\nlines.jpg" not in done.out
    with open(persons, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["person"] for row in rows[:3]] == ["1", "1", "2"]
    assert all((tmp_path / row["path"]).is_file() for row in rows)
    assert sorted(path.name for path in (copies / "00001").iterdir()) == [some(photos)[0].name, "two\nlines.jpg"]
    assert len(list(copies.iterdir())) == 12
    again = aligned_reid("group", photos, "--json")
    assert sum(len(group["paths"]) for group in json.loads(again.out)) == 13


def test_a_page_of_groups_replaces_its_own_thumbnails_only(aligned_reid, photos, tmp_path):
    page, own = tmp_path / "groups.html", tmp_path / "groups_images" / "0.jpg"
    own.parent.mkdir()
    own.write_bytes(b"a photo")
    done = aligned_reid("group", photos, f"--html={page}")
    assert done.status == 2 and "groups_images" in done.err and own.read_bytes() == b"a photo"
    own.unlink()
    for _ in range(2):
        assert aligned_reid("group", photos, f"--html={page}").status == 0
    assert own.is_file() and page.stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("compare", ["{photos}/none.jpg", "{photos}/none.jpg"], "missing"),
        ("compare", ["{first}", "{first}" + 300 * "x"], "too long"),
        ("search", ["{first}", "--gallery={photos}" + 300 * "x"], "folder"),
        ("compare", ["{first}", "{first}", "--save_file={photos}/gone/a.png"], "gone"),
        ("search", ["{first}", "--gallery={photos}/gone"], "gone"),
        ("search", ["{first}", "--gallery={photos}", "--k=0"], "--k"),
        ("search", ["{first}", "{first}", "--gallery={photos}", "--html=a.html"], "--html"),
        ("search", ["{photos}", "--gallery={photos}"], "folder"),
        ("group", ["{photos}", "--copy_to={photos}"], "--copy_to"),
        ("group", ["{photos}", "--copy_to={photos}/new"], "--copy_to"),
        ("group", ["{photos}", "--copy_to={first}/new"], "--copy_to"),
        ("group", ["{photos}", "--html={photos}/groups.html"], "--html"),
        ("group", ["{photos}", "--threshold=nan"], "--threshold"),
        ("group", ["{photos}", "--csv={photos}"], "--csv"),
        ("group", ["{photos}", "--csv={first}"], ".csv"),
        ("group", ["{photos}", "--device=tpu"], "tpu"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(aligned_reid, photos, name, arguments, word):
    filled = [one.format(photos=photos, first=some(photos)[0]) for one in arguments]
    done = aligned_reid(name, *filled)
    assert done.status == 2 and word in done.err.splitlines()[-1]
    assert "Traceback" not in done.err and done.out == ""
