"""What the README and the examples of docs/ say is what the code does."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2

from aligned_reid.config import Config, markdown_table
from aligned_reid.data import TestImages, check_protocol, make_synthetic, open_data
from aligned_reid.export import InferenceGraph, export_onnx
from aligned_reid.model import AlignedReID

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATASETS = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def examples_in(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_table_of_flags_is_the_parsers():
    assert markdown_table() in README


def test_commands_that_train_take_their_flags():
    text = re.sub(r"\\\n\s*", "", README + DATASETS + RESULTS)
    commands = [shlex.split(flags) for flags in re.findall(r"script/train\.py (-[^\n`#|]*)", text)]
    assert len(commands) >= 30
    for flags in commands:
        Config.from_arguments(flags)  # a mistake would exit


def test_results_have_the_table_of_the_ablation():
    command = [sys.executable, str(ROOT / "benchmark" / "ablation.py"), "--table"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout in RESULTS


def test_files_that_it_names_exist():
    for path in re.findall(r"(?:script|test|docs|benchmark)/[\w/]+\.(?:py|sh|md|png)", README):
        assert (ROOT / path).is_file(), path
    assert Config().ids_per_batch == 32


def test_nothing_is_prepared_into_its_source():
    commands = re.findall(r"script/prepare_\w+\.py --source (\S+) .*--save_dir (\S+)", README + DATASETS)
    assert len(commands) >= 6
    assert all(source != save_dir for source, save_dir in commands)


def test_all_rooms_are_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "aligned_reid").rglob("*.py")} - {"__init__.py"}
    assert sorted(name for name in files if name not in text) == []


def test_the_example_for_a_division_of_ones_own_makes_a_data_set(tmp_path, monkeypatch):
    drawn = make_synthetic(tmp_path / "drawn", 8, 2, 3, seed=1)
    (tmp_path / "mine").mkdir()
    shutil.copytree(drawn / "images", tmp_path / "mine" / "images")
    for distractor in (tmp_path / "mine" / "images").glob("00000000_*"):
        distractor.unlink()
    monkeypatch.chdir(tmp_path)
    (example,) = examples_in(DATASETS)
    exec(example, {})
    test = TestImages(open_data(tmp_path / "mine"))
    check_protocol(test.person_ids, test.cameras, test.marks)
    assert len(set(test.person_ids)) == 4


def test_its_picture_is_a_picture():
    picture = cv2.imread(str(ROOT / "docs" / "matches.png"))
    assert picture is not None
    assert picture.shape[0] > 500


def test_its_example_reads_a_graph(small_trunk, tiny_data, tmp_path, monkeypatch):
    graph = InferenceGraph(AlignedReID(None, pretrained="none"), local=False, uint8_input=True, normalize_feature=False)
    export_onnx(graph, tmp_path / "aligned_reid.onnx", (256, 128), opset=17, batch_size=None)
    shutil.copy(next((tiny_data / "images").iterdir()), tmp_path / "person.jpg")
    monkeypatch.chdir(tmp_path)
    (example,) = examples_in(README)
    found: dict = {}
    exec(example, found)
    assert found["global_feat"].shape == (1, 2048)
