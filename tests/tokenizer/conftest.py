"""Small tokenizers of every supported kind."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the committed tokenizers."""
    return GOLDEN


@pytest.fixture(scope="session")
def expected() -> dict:
    """What the reference libraries make of each committed tokenizer."""
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
