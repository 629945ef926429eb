"""Whatever stands in config.json or in a setting: a model, or an error for the user."""

import json
import pathlib

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from lsjax.config import ModelConfig, RopeScaling
from lsjax.distributed.sharding import AXES, parse_mesh
from lsjax.families import parse_config
from lsjax.positions.scaling import KINDS, override_rope_scaling, parse_rope_scaling
from lsjax.runtime.errors import UserError

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "golden" / "configs").glob("*.json"))
RAW = {file.stem: json.loads(file.read_text()) for file in CONFIGS}
ROPE_FIELDS = sorted({name for fields in KINDS.values() for name in fields})

# Numbers as json.loads may return them; whole numbers small, since layers are counted out.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(sorted(KINDS))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
BLOCKS = st.dictionaries(
    st.sampled_from([*ROPE_FIELDS, "type", "rope_type", "rope_theta"]) | st.text(max_size=5),
    VALUES,
    max_size=8,
)
LIKELY_BLOCKS = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(sorted(KINDS))},
    optional={name: st.floats() | st.integers(-1, 10**6) | SCALARS for name in ROPE_FIELDS},
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(BLOCKS | LIKELY_BLOCKS | VALUES)
def test_rope_scaling(block):
    try:
        scaling = parse_rope_scaling(block, 4096)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(scaling, RopeScaling)
        assert scaling.kind in KINDS and 1 <= scaling.factor < float("inf")


@QUICK
@given(BLOCKS | LIKELY_BLOCKS | st.text())
def test_rope_scaling_as_a_setting(block):
    config = parse_config(RAW["Qwen2.5-7B-Instruct"])
    try:
        assert override_rope_scaling(config, block).rope_theta > 0
    except UserError as error:
        assert str(error)


@QUICK
@given(st.sampled_from(sorted(RAW)), st.data())
def test_mutated_config(name, data):
    config = dict(RAW[name])
    for _ in range(data.draw(st.integers(1, 2))):
        field = data.draw(
            st.sampled_from([*config, "rope_parameters", "rope_scaling", "layer_types"])
        )
        if data.draw(st.booleans()):
            config.pop(field, None)
        else:
            config[field] = data.draw(VALUES | BLOCKS | LIKELY_BLOCKS)
    try:
        parsed = parse_config(config)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(parsed, ModelConfig)
        assert len(parsed.windows) == parsed.num_layers
        assert parsed.rotary_dim <= parsed.head_dim
        assert parsed.served_length >= parsed.trained_length > 0


@QUICK
@given(
    st.text(max_size=40)
    | st.lists(
        st.tuples(
            st.sampled_from([*AXES, "x", ""]),
            st.sampled_from(["=", "==", " = ", ":", ""]),
            st.integers(-2, 16).map(str) | st.sampled_from(["", "²", "٣", "1e3"]),
        ).map("".join),
        max_size=4,
    ).map(",".join)
)
def test_mesh(text):
    try:
        sizes = parse_mesh(text)
    except UserError as error:
        assert str(error)
    else:
        assert tuple(sizes) == AXES and all(size >= 1 for size in sizes.values())


@pytest.mark.parametrize("value", [None, [], "config", 3])
def test_not_an_object(value):
    with pytest.raises(UserError):
        parse_config(value)
