"""Measurements that are kept cell by cell."""

import json
from types import SimpleNamespace

import pytest

from lsjax.evals.cells import Cells, read_cells
from lsjax.evals.needle import NeedleMap, needle_map
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path
from lsjax.tokenizer import load_tokenizer


def test_a_later_run_finds_the_cells_of_an_earlier_one(tmp_path):
    path = str(tmp_path / "cells.json")
    Cells(path, {"model": "a"}).add({"x": 1})
    cells = Cells(path, {"model": "a"})
    assert cells.missing(["y", "x", "z"]) == ["y", "z"]
    cells.add({"y": [0.5]})
    assert read_cells(path) == {"x": 1, "y": [0.5]}
    # An option that there was none of, and that is not used.
    assert Cells(path, {"model": "a", "option": "None"}).missing(["x", "z"]) == ["z"]


@pytest.mark.parametrize(
    ("measured", "words"),
    [({"model": "b"}, "another model .a, not b."), ({"model": "a", "n": 3}, "another n")],
)
def test_cells_of_something_else_are_refused(tmp_path, measured, words):
    path = str(tmp_path / "cells.json")
    Cells(path, {"model": "a"}).add({"x": 1})
    with pytest.raises(UserError, match=words):
        Cells(path, measured)


def test_a_file_without_cells_is_refused(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"lengths": [1]}))
    with pytest.raises(UserError, match="does not hold the results"):
        Cells(str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="no file"):
        read_cells(str(tmp_path / "none.json"))


def test_needles_go_on_after_an_interruption():
    cells, asked = Cells(), []

    class Model:
        tokenizer = load_tokenizer(shipped_model_path())

        def generate(self, prompts, *_, **__):
            asked.extend(prompts)
            if len(asked) == 5:
                raise KeyboardInterrupt
            keys = [prompt.split("The pass key is ")[1][:5] for prompt in prompts]
            return [SimpleNamespace(text=key if len(asked) < 7 else "0") for key in keys]

    arguments = (Model(), [200, 300], [0.0, 1.0], 2)
    with pytest.raises(KeyboardInterrupt):
        needle_map(*arguments, cells=cells)
    assert len(cells.values) == 4
    found = needle_map(*arguments, cells=cells)
    assert len(asked) == 5 + 4 and len(set(asked)) == 8
    assert found == NeedleMap((200, 300), (0.0, 1.0), ((1.0, 1.0), (0.5, 0.0)))
    assert NeedleMap.of(cells.values) == found
    more = cells.values | {"400 0.5 0": True}  # other depths at another length
    assert NeedleMap.of(more).by_length() == [1.0, 0.25, 1.0]
