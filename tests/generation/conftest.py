"""The golden models, for tests that take them as a fixture."""

import pytest
from helpers.golden_models import build


@pytest.fixture
def model():
    """model(name, kv, chunk, mesh, rope_scaling, eos, layers, segment, block, **changes)."""
    return build
