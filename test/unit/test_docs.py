"""README.md, its translation and docs/: commands parse, links lead somewhere, examples run."""

import doctest
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import cv2
import numpy as np
import pytest
from conftest import PATIENCE, ROOT, write_run

from aligned_reid.commands import COMMANDS, prepare
from aligned_reid.config import Config
from aligned_reid.data import TestImages, make_synthetic, open_data
from aligned_reid.data.checks import check_protocol
from aligned_reid.export import InferenceGraph, export_onnx
from aligned_reid.model import AlignedReID

FILES = {path.name: path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
each_page = pytest.mark.parametrize("name", sorted(PAGES))


def commands_of(text: str, pattern: str) -> list[list[str]]:
    """The words after `pattern`, up to a double space, of each command; $variables of shell loops stand for 1."""
    text = re.sub(r"\\\n\s*", "", text)
    return [
        shlex.split(re.sub(r"\$\w+", "1", words)) for words in re.findall(rf"{pattern} ((?:[^\n`#| ]| (?! ))*)", text)
    ]


def train_commands(text: str) -> list[list[str]]:
    """The flags of each command that trains, launched or not."""
    commands = commands_of(text, r"(?:script/train\.py|aligned-reid (?:launch (?:-\S+ )*)?train)")
    return [flags for flags in commands if flags and flags[0].startswith("-")]


def code_lines(text: str) -> list[str]:
    """The lines of indented blocks, without comments."""
    return [re.sub(r"\s+#.*", "", line) for line in re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)]


def python_example(name: str) -> str:
    (example,) = re.findall(r"```python\n(.*?)```", PAGES[name], flags=re.DOTALL)
    return example


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_train_commands_parse():
    commands = [flags for text in PAGES.values() for flags in train_commands(text)]
    assert len(commands) >= 25
    for flags in commands:
        Config.from_arguments(flags)  # exits at a mistake


@pytest.fixture
def known_flags(aligned_reid):
    """The flags that a command's --help lists."""

    @cache
    def of(name):
        asked = "train --help all" if name in ("train", "extract") else f"{name} --help"
        found = {*re.findall(r"--?[a-z]\w*", aligned_reid(*asked.split()).out)}
        return found | ({"--save_file", "--images"} if name == "extract" else set())

    return of


@each_page
def test_commands_and_their_flags_exist(name, known_flags):
    for words in commands_of(PAGES[name], r"(?:^|`|    )aligned-reid"):
        command, arguments = words[0].rstrip(":"), words[1:]
        if command == "prepare" and arguments:
            command, arguments = " ".join(words[:2]), words[2:]
        assert command in COMMANDS.keys() | {f"prepare {kind}" for kind in prepare.KINDS}
        if command not in ("prepare", "launch"):
            given = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
            assert given <= known_flags(command), words


def test_both_languages_show_the_same_commands():
    assert code_lines(PAGES["README.zh-CN.md"]) == code_lines(PAGES["README.md"])
    assert python_example("README.zh-CN.md") == python_example("README.md")


@each_page
def test_named_files_exist(name):
    for path in re.findall(
        r"(?:script/(?!dataset/|experiment/)|test/|docs/|benchmark/)[\w/]+\.(?:py|sh|md|png|jsonl)", PAGES[name]
    ):
        assert (ROOT / path).is_file(), path


@each_page
def test_links_between_pages_lead_somewhere(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = FILES[name].parent / (path or name)
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_readme_is_short_with_a_picture_and_a_link_to_every_page():
    assert min(cv2.imread(str(ROOT / "docs" / "report.png")).shape[:2]) > 500
    for language in ("README.md", "README.zh-CN.md"):
        assert all(f"docs/{path.name}" in PAGES[language] for path in (ROOT / "docs").glob("*.md"))
        assert PAGES[language].count("\n") <= 150


def test_architecture_names_every_folder():
    folders = {path.parent.name for path in (ROOT / "aligned_reid").rglob("*.py")}
    assert [name for name in folders if f"{name}/" not in PAGES["architecture.md"]] == []


def test_nothing_is_prepared_into_its_source():
    pattern = r"(?:script/prepare_\w+\.py|aligned-reid prepare \w+) --source (\S+) .*--save_dir (\S+)"
    commands = [pair for text in PAGES.values() for pair in re.findall(pattern, text)]
    assert len(commands) >= 5
    assert all(source != save_dir for source, save_dir in commands)


def test_the_ablation_page_has_the_table_of_its_results():
    command = [sys.executable, str(ROOT / "benchmark" / "ablation.py"), "--table"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert table in PAGES["ablation.md"]


def test_example_of_a_custom_split_makes_a_data_set(tmp_path, monkeypatch):
    drawn = make_synthetic(tmp_path / "drawn", 8, 2, 3, seed=1)
    (tmp_path / "mine").mkdir()
    shutil.copytree(drawn / "images", tmp_path / "mine" / "images")
    for distractor in (tmp_path / "mine" / "images").glob("00000000_*"):
        distractor.unlink()
    monkeypatch.chdir(tmp_path)
    exec(python_example("datasets.md"), {})
    test = TestImages(open_data(tmp_path / "mine"))
    check_protocol(test.person_ids, test.cameras, test.marks)
    assert len(set(test.person_ids)) == 4


def test_example_of_inference_reads_a_graph(small_trunk, tiny_data, tmp_path, monkeypatch):
    graph = InferenceGraph(AlignedReID(None, pretrained="none"), local=False, uint8_input=True, normalize_feature=False)
    export_onnx(graph, tmp_path / "aligned_reid.onnx", (256, 128), opset=17, batch_size=None)
    shutil.copy(next((tiny_data / "images").iterdir()), tmp_path / "person.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(python_example("evaluation.md"), found)
    assert found["global_feat"].shape == (1, 2048)


def test_examples_of_the_python_page_run(small_trunk, tiny_data, tmp_path, monkeypatch):
    write_run(tmp_path / "exp" / "first", "market1501", {"at_fmr": {"0.001": {"threshold": 0.86}}})
    drawn = sorted((tiny_data / "images").iterdir())
    (tmp_path / "photos").mkdir()
    for name, path in zip(("a.jpg", "b.jpg", *(f"photos/{number}.jpg" for number in range(12))), drawn, strict=False):
        shutil.copy(path, tmp_path / name)
    cv2.imwrite(str(tmp_path / "street.jpg"), np.zeros((160, 160, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(PAGES["python.md"].replace("```", ""), {}, "python.md", None, 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(example).failed == 0
