"""Baichuan2, at four times its length, against the float64 model of golden/baichuan/make.py."""

import numpy as np
import pytest
from helpers import golden_models
from helpers.golden_models import build, changed_config

from lsjax import UserError
from lsjax.positions.scaling import override_rope_scaling

GOLDEN = golden_models.GOLDEN / "baichuan"


@pytest.mark.parametrize(
    ("name", "chunk"),
    [*(("alibi_8_heads", n) for n in (1, 256)), ("alibi_6_heads", 64), ("rotary", 7)],
)
def test_logits(name, chunk):
    golden = np.load(GOLDEN / f"{name}.npz")
    found = build(name).logits(golden["tokens"], chunk_size=chunk)[0, ::5]
    assert np.abs(found - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("mesh", ["context=4", "model=2"])
def test_alibi_on_a_mesh(mesh):
    golden = np.load(GOLDEN / "alibi_8_heads.npz")
    found = build("alibi_8_heads", mesh=mesh).logits(golden["tokens"], chunk_size=16)[0, ::5]
    assert np.abs(found - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("chunk", [16, pytest.param(1, marks=pytest.mark.slow("16 is quick"))])
def test_alibi_over_an_int8_cache_is_as_near_as_its_steps(chunk):
    """A step is 1/127 of a vector's second largest entry: a rounding is 0.3% of it or less."""
    golden = np.load(GOLDEN / "alibi_8_heads.npz")
    lm = build("alibi_8_heads", "int8", block=64)  # so that most of the text is read as int8
    found = lm.logits(golden["tokens"], chunk_size=chunk)[0, ::5]
    error = np.sqrt(np.mean((found - golden["logits"]) ** 2))
    assert error < 0.01 * golden["logits"].std()


def test_alibi_refuses_rope_scaling():
    config = changed_config("alibi_8_heads", 0)
    with pytest.raises(UserError, match="ALiBi"):
        override_rope_scaling(config, {"rope_type": "linear", "factor": 2.0})
