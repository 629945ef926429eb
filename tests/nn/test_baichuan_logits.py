"""Baichuan2, at four times its length, against the float64 model of golden/baichuan/make.py."""

import json
import pathlib

import numpy as np
import pytest
from golden.models.parameters import golden_parameters

from lsjax import UserError
from lsjax.cache import kv_cache
from lsjax.families import parse_config
from lsjax.language_model import LanguageModel
from lsjax.positions.scaling import override_rope_scaling
from lsjax.settings import Settings
from lsjax.sharding import make_mesh, parse_mesh

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "baichuan"


def load(name, kv="float32", mesh=""):
    config = parse_config(json.loads((GOLDEN / f"{name}.json").read_text()))
    settings = Settings("", config, make_mesh(parse_mesh(mesh)), "float32", kv, 64, frozenset())
    return LanguageModel(settings, golden_parameters(config))


@pytest.mark.parametrize("name", ["alibi_8_heads", "alibi_6_heads", "rotary"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_logits(name, chunk):
    golden = np.load(GOLDEN / f"{name}.npz")
    found = load(name).logits(golden["tokens"], chunk_size=chunk)[0, ::5]
    assert np.abs(found - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("mesh", ["context=4", "model=2"])
def test_alibi_on_a_mesh(mesh):
    golden = np.load(GOLDEN / "alibi_8_heads.npz")
    found = load("alibi_8_heads", mesh=mesh).logits(golden["tokens"], chunk_size=16)[0, ::5]
    assert np.abs(found - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_alibi_over_an_int8_cache_is_as_near_as_its_steps(chunk, monkeypatch):
    """A step is 1/127 of a vector's second largest entry: a rounding is 0.3% of it or less."""
    monkeypatch.setattr(kv_cache, "BLOCK", 64)  # so that most of the text is read as int8
    golden = np.load(GOLDEN / "alibi_8_heads.npz")
    found = load("alibi_8_heads", kv="int8").logits(golden["tokens"], chunk_size=chunk)[0, ::5]
    error = np.sqrt(np.mean((found - golden["logits"]) ** 2))
    assert error < 0.01 * golden["logits"].std()


def test_alibi_refuses_rope_scaling():
    config = load("alibi_8_heads").config
    with pytest.raises(UserError, match="ALiBi"):
        override_rope_scaling(config, {"rope_type": "linear", "factor": 2.0})
