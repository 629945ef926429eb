"""Rotary frequencies against published figures and against transformers."""

import json
import pathlib

import numpy as np
import pytest

from lsjax.config import ModelConfig
from lsjax.families import parse_config
from lsjax.positions.frequencies import rotary_frequencies

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
CASES = json.loads((MODELS / "frequencies.json").read_text())
ARRAYS = np.load(MODELS / "frequencies.npz")
EXPECTED = np.split(ARRAYS["inv_freq"], ARRAYS["ends"][:-1])
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def kind_of(config):
    return (config.get("rope_parameters") or config["rope_scaling"])["rope_type"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_settings_as_transformers_has_them(kind):
    drawn = [(c, e) for c, e in zip(CASES, EXPECTED, strict=True) if kind_of(c["config"]) == kind]
    assert len(drawn) == 100
    for case, expected in drawn:
        inv_freq, factor = rotary_frequencies(parse_config(case["config"]), case["request"])
        # transformers computes longrope in float32 throughout.
        rtol = 1e-6 if kind == "longrope" else 1e-9
        np.testing.assert_allclose(inv_freq, expected, rtol=rtol, err_msg=str(case))
        assert factor == pytest.approx(case["attention_factor"], rel=1e-9), case


def config(theta, scaling, max_position_embeddings=32768) -> ModelConfig:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 96,
        "max_position_embeddings": max_position_embeddings,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "vocab_size": 96,
    }
    return parse_config(raw)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_yarn_of_qwen():
    inv_freq, factor = rotary_frequencies(config(1e6, YARN), 131072)
    plain, _ = rotary_frequencies(config(1e6, None), 1)
    assert factor == pytest.approx(1.138629436, rel=1e-9)
    figures = {23: 6.97830585e-3, 30: 1.06436098e-3, 40: 4.44569853e-5, 63: 3.10234440e-7}
    for channel, figure in figures.items():
        assert inv_freq[channel] == pytest.approx(figure, rel=1e-8)
    # Channels 0 to 23 keep their frequencies; from 40 on these are four times lower.
    np.testing.assert_array_equal(inv_freq[:24], plain[:24])
    np.testing.assert_allclose(inv_freq[40:], plain[40:] / 4, rtol=1e-12)
    assert np.all(inv_freq[24:40] < plain[24:40]) and np.all(inv_freq[24:40] > plain[24:40] / 4)


def test_llama3_of_llama_3_1():
    inv_freq, factor = rotary_frequencies(config(5e5, LLAMA3, 131072), 131072)
    assert factor == 1.0
    figures = {
        28: 3.21144599e-3,
        29: 2.16657076e-3,
        32: 5.24846161e-4,
        35: 9.55621235e-5,
        36: 7.78465527e-5,
        40: 3.42810220e-5,
        63: 3.06892599e-7,
    }
    for channel, figure in figures.items():
        assert inv_freq[channel] == pytest.approx(figure, rel=1e-8)


def test_dynamic_stretches_theta_with_the_request():
    dynamic = config(1e6, {"type": "dynamic", "factor": 4.0})
    inv_freq, _ = rotary_frequencies(dynamic, 131072)
    assert inv_freq[1] ** -64 == pytest.approx(13540197.304, rel=1e-9)
    plain, _ = rotary_frequencies(config(1e6, None), 1)
    for short in (1, 32768):
        np.testing.assert_allclose(rotary_frequencies(dynamic, short)[0], plain, rtol=1e-14)


def test_ntk_is_a_larger_theta():
    inv_freq, factor = rotary_frequencies(config(1e6, {"rope_type": "ntk", "factor": 4.0}), 1)
    larger, _ = rotary_frequencies(config(1e6 * 4 ** (128 / 126), None), 1)
    np.testing.assert_allclose(inv_freq, larger, rtol=1e-13)
    assert factor == 1.0


NTK = {"rope_type": "ntk", "factor": 4.0}


@pytest.mark.parametrize("block", [None, YARN, LLAMA3, NTK, {"type": "linear", "factor": 4.0}])
def test_only_dynamic_longrope_and_auto_depend_on_the_request(block):
    parsed = config(1e6, block)
    short, long = (rotary_frequencies(parsed, length) for length in (10, 10**6))
    np.testing.assert_array_equal(short[0], long[0])
    assert short[1] == long[1]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 1 + 0.1 * np.log(4)),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (1 + 0.2 * np.log(4)) / (1 + 0.1 * np.log(4))),
        ({"mscale": 2.0}, 1 + 0.1 * np.log(4)),
    ],
)
def test_attention_factor_of_yarn(options, expected):
    _, factor = rotary_frequencies(config(1e6, YARN | options), 1)
    assert factor == pytest.approx(expected, rel=1e-12)


def test_yarn_steps_where_both_ends_of_its_ramp_meet():
    block = YARN | {"beta_fast": 2, "beta_slow": 2, "truncate": False}
    inv_freq, _ = rotary_frequencies(config(1e6, block), 1)
    plain, _ = rotary_frequencies(config(1e6, None), 1)
    # 64 ln(32768 / (2 * 2 pi)) / ln(1e6) = 36.4
    np.testing.assert_allclose(plain / inv_freq, np.where(np.arange(64) <= 36, 1, 4))


@pytest.mark.parametrize("ratio, theta", [(500, 5e6), (10000, 1e8)])
def test_rope_ratio_of_chatglm(ratio, theta):
    raw = json.loads((MODELS / "chatglm" / "config.json").read_text()) | {"rope_ratio": ratio}
    inv_freq, _ = rotary_frequencies(parse_config(raw), 1)
    assert inv_freq.size == raw["kv_channels"] // 4  # half the channels, in pairs
    assert inv_freq[1] ** -8 == pytest.approx(theta, rel=1e-12)
