"""Notebooks run from top to bottom, and what their last words claim is so."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.runs_long

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"


def run(path):
    """Executes the code cells in one namespace, and returns it."""
    namespace = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
    return namespace


def test_every_notebook_has_a_test():
    assert [path.name for path in NOTEBOOKS.glob("*.ipynb")] == ["extend_context.ipynb"]


def test_extend_context_finds_what_it_says(capsys):
    names = run(NOTEBOOKS / "extend_context.ipynb")
    assert names["answer"].text.strip() == names["short"].answer
    assert names["scaled"].text.strip() == names["long"].answer
    assert names["plain"].text.strip() != names["long"].answer
    assert "set rope_scaling" in capsys.readouterr().out
