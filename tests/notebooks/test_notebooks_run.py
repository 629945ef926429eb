"""Notebooks run from top to bottom, and what their last words claim is so."""

import ast
import contextlib
import json
import pathlib

import pytest

pytestmark = pytest.mark.runs_long

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"


def code(path):
    """The code cells, parsed one by one."""
    cells = json.loads(path.read_text())["cells"]
    return [ast.parse("".join(c["source"]), str(path)) for c in cells if c["cell_type"] == "code"]


def run(path):
    """Executes the code cells in one namespace and in the notebook's folder; returns it."""
    namespace = {}
    with contextlib.chdir(path.parent):
        for cell in code(path):
            exec(compile(cell, str(path), "exec"), namespace)
    return namespace


def test_every_notebook_has_a_test():
    names = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert names == ["extend_context.ipynb", "plan_and_ask.ipynb"]


def test_what_notebooks_import_is_there():
    for path in NOTEBOOKS.glob("*.ipynb"):
        nodes = [node for cell in code(path) for node in ast.walk(cell)]
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), str(path), "exec"), {})


@pytest.mark.slow("what it shows is tested with run_pa and the shipped model")
def test_extend_context_finds_what_it_says(capsys):
    names = run(NOTEBOOKS / "extend_context.ipynb")
    assert names["answer"].text.strip() == names["short"].answer
    assert names["scaled"].text.strip() == names["long"].answer
    assert names["plain"].text.strip() != names["long"].answer
    assert "set rope_scaling" in capsys.readouterr().out


@pytest.mark.slow("what it shows is tested with plan, run_pa and the tables")
def test_plan_and_ask_fits_and_answers():
    names = run(NOTEBOOKS / "plan_and_ask.ipynb")
    assert names["plan"].fits and names["plan"].max_length >= 480
    assert names["answer"].text.strip() == names["passage"].answer
    assert len(names["samples"]) == 4
    assert names["needles"].by_length()[0] == 1
