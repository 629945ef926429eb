"""ALiBi's slopes against an independent implementation."""

import json
import pathlib

import numpy as np
import pytest

from lsjax.positions.alibi import alibi_slopes

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "alibi" / "slopes.json").read_text()
)


@pytest.mark.parametrize("heads", GOLDEN)
def test_slopes_are_those_of_bloom(heads):
    np.testing.assert_allclose(alibi_slopes(int(heads)), GOLDEN[heads], rtol=1e-6)
