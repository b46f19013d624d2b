"""The rooms of the library: a file imports its own room and earlier ones, and no two files import each other."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

PACKAGE = ROOT / "aligned_reid"

# In the direction that data flows. A file belongs to the most specific room that fits its name.
LINE = """
errors stop files lock cli recipes flags config distributed device
data.plain_pickle data.partitions data.transforms data.prepare data
distance losses weights model objective training evaluation
preflight release run export rank launcher inference synthetic commands
"""
ROOMS = LINE.split()


def imports_of(path):
    """The modules of the package that a file imports anywhere in it, named without "aligned_reid."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("aligned_reid.") for name in found if name.startswith("aligned_reid.")}


def room_of(module):
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}
IMPORTS = {module: imports_of(path) & MODULES.keys() for module, path in MODULES.items()}


def test_nothing_imports_a_later_room():
    wrong = [
        f"{module} imports {imported}"
        for module, imported_modules in IMPORTS.items()
        for imported in imported_modules
        if ROOMS.index(room_of(imported)) > ROOMS.index(room_of(module))
    ]
    assert wrong == []


def test_files_do_not_import_each_other():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError


def test_only_commands_import_the_drawn_people():
    importers = {module for module, names in IMPORTS.items() if "synthetic" in map(room_of, names)}
    assert {room_of(module) for module in importers} == {"synthetic", "commands"}
