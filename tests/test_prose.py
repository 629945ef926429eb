"""What every text of the library keeps to, as far as a machine can tell."""

import re

import pytest
from helpers.programs import ROOT

# A string, which a docstring and the help of a flag begin with, or the first line of a comment,
# which may stand beside code.
BEGINNING = re.compile(r'"[O]f |\A *# [O]f |^(?! *#).*(\n *)?# [O]f ', re.MULTILINE)


@pytest.mark.parametrize("folder", ["lsjax", "scripts", "checkpoints_convert", "tests"])
def test_no_text_begins_with_what_it_is_about(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        found = BEGINNING.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found[0]}"
