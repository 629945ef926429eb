"""What notebooks show of results: well-formed tables that hold the figures."""

import xml.etree.ElementTree as ET

import lsjax
from lsjax.evals.needle import NeedleMap
from lsjax.inference.options import resolve_options


def cells(shown):
    """The texts of all cells, row by row, of one table or of several."""
    tree = ET.fromstring(f"<div>{shown._repr_html_()}</div>")
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def test_a_completion_shows_its_text_as_it_is_and_its_cost():
    figures = dict.fromkeys(lsjax.Stats.__dataclass_fields__, 0) | {"cache_bytes": 1536}
    found = lsjax.Completion("a <b> & c", (5, 6), "length", 1234, lsjax.Stats(**figures))
    rows = dict(cells(found))
    assert rows["answer"] == "a <b> & c" and rows["KV cache"] == "1.5 KiB"
    assert rows["tokens"] == "1,234 of prompt, 2 generated (length)"


def test_a_plan_shows_what_fits_and_the_bytes_per_device():
    plan = lsjax.plan("examples/glm-4-9b-chat-1m.json", "h100-80gb:1", max_input_length=131072)
    rows = {row[0]: row[1:] for row in cells(plan)}
    assert rows["asked for"] == ["131,072 tokens and 256 of output: fits"]
    assert rows["decode"][0].endswith("GiB") and len(rows["prefill"]) == 4


def test_options_show_the_effective_configuration():
    rows = dict(cells(resolve_options(lsjax.shipped_model_path(), kv_cache_dtype="int8")))
    assert rows["KV cache"] == "int8" and rows["served length"] == "512 tokens"
    assert rows["devices"].startswith("1 x cpu") and rows["prefill chunk"] == "512 tokens"


def test_a_needle_map_shows_a_row_per_length():
    shown = cells(NeedleMap((512, 2048), (0.0, 0.5), ((1.0, 0.25), (0.0, 1.0))))
    assert shown == [
        ["tokens", "0% deep", "50% deep"],
        ["512", "100%", "25%"],
        ["2,048", "0%", "100%"],
    ]
