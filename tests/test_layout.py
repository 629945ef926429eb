"""The layout that docs/design.md shows: floors, and sizes that one can read."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
from helpers.programs import ROOT as REPOSITORY

import lsjax

ROOT = Path(lsjax.__file__).parent
FLOORS = (
    "config runtime",
    "positions tokenizer",
    "distributed families",
    "attention",
    "cache",
    "nn",
    "checkpoint compression",
    "inference",
    "documents",
    "evals planning shipped training",
    "cli language_model",
    "__init__",
)
MOST_ENTRIES, MOST_LINES = 20, 400
# An example of docs/extending.md: the names of what its family brought, and files of later families
# that make use of it.
MOST_FILES = 6
FOLDERS = ("lsjax", "scripts", "checkpoints_convert")
EXAMPLES = {
    "a mixture of experts": (
        r"qwen_moe|qwen3_?moe|experts|router|balance_loss|grouped_product",
        {"lsjax/families/qwen3_5.py"},
    ),
    "a recurrence": (r"qwen3_5|delta_?net|delta_?rule|delta_?inputs|delta_?chunk", set()),
}
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units.split()}


def imported_units(file):
    """Files and folders of lsjax that a module imports, wherever in it that is written."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    only_types = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    skipped = {inner for node in only_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("lsjax."))


def imports():
    """Unit -> the other units that it imports."""
    found = {unit: set() for unit in FLOOR_OF}
    for file in ROOT.rglob("*.py"):
        unit = file.relative_to(ROOT).parts[0].removesuffix(".py")
        found[unit] |= set(imported_units(file)) & FLOOR_OF.keys() - {unit}
    return found


def test_nothing_imports_upward():
    upward = [
        f"{unit} imports {other}"
        for unit, others in imports().items()
        for other in others
        if FLOOR_OF[other] > FLOOR_OF[unit]
    ]
    assert not upward


def test_no_folders_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(imports()).prepare()


def test_every_file_and_folder_has_a_floor():
    present = {p.name.removesuffix(".py") for p in ROOT.iterdir() if not p.name.startswith("__p")}
    assert present == FLOOR_OF.keys()


def test_folders_and_files_stay_small():
    modules = list(ROOT.rglob("*.py"))
    for folder in {file.parent for file in modules}:
        entries = {p.name for p in folder.iterdir()} - {"__init__.py", "__pycache__"}
        assert len(entries) <= MOST_ENTRIES, f"{folder} has {len(entries)} files and folders"
    for file in modules:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, f"{file} has {lines} lines"


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_family_is_named_in_the_few_files_that_the_docs_list(example):
    words, others = EXAMPLES[example]
    files = [
        *(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*.py")),
        *(REPOSITORY / name for name in ("Makefile", "pyproject.toml")),
    ]
    naming = re.compile(words, re.IGNORECASE)
    found = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if naming.search(file.name) or naming.search(file.read_text(encoding="utf-8"))
    }
    docs = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    section = docs.split(f"### An example: {example}\n")[1].split("\n#")[0]
    assert found - others == set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    assert len(found - others) <= MOST_FILES
