"""config.json of published models -> ModelConfig."""

import dataclasses
import json
import pathlib

import pytest

from lsjax.config import LayerKind, RopeScaling
from lsjax.families import FAMILIES, parse_config, read_config
from lsjax.families.qwen3_5 import DeltaNet
from lsjax.families.qwen_moe import Experts
from lsjax.positions.scaling import override_rope_scaling
from lsjax.runtime.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[1] / "golden" / "configs"

_QWEN2 = {
    "architecture": "Qwen2ForCausalLM",
    "rope_interleaved": False,
    "qkv_bias": True,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "vocab_size": 152064,
    "rotary_dim": 128,
    "eos_token_ids": (151645,),
}
_GLM = {
    "architecture": "ChatGLMModel",
    "num_layers": 40,
    "num_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "vocab_size": 151552,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_interleaved": True,
    "norm_eps": 1.5625e-7,
    "qkv_bias": True,
    "out_bias": False,
    "mlp_bias": False,
    "post_norms": False,
    "eos_token_ids": (151329, 151336, 151338),
}
_LLAMA = {
    "architecture": "LlamaForCausalLM",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_theta": 5e5,
    "head_dim": 128,
    "num_kv_heads": 8,
    "norm_eps": 1e-5,
}
_DELTA_NET = DeltaNet(key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv_width=4)
_SHARED = Experts(256, 8, 512, True, 0.001, shared_width=512)
_QWEN3_5 = {
    "num_heads": 16,
    "head_dim": 256,
    "rotary_dim": 64,
    "rope_theta": 1e7,
    "vocab_size": 248320,
    "qk_norm": True,
    "gated_attention": True,
    "zero_centered_norms": True,
    "max_position_embeddings": 262144,
    "eos_token_ids": (248044,),
}
EXPECTED = {
    "Qwen2-72B-Instruct": _QWEN2
    | {"num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "rope_theta": 1e6, "head_dim": 128},
    "Qwen2.5-7B-Instruct": _QWEN2
    | {"num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "rope_theta": 1e6, "norm_eps": 1e-6},
    "Qwen2.5-7B-Instruct-1M": _QWEN2
    | {
        "max_position_embeddings": 1010000,
        "rope_theta": 1e7,
        "norm_eps": 1e-5,
        "rope_scaling": RopeScaling(
            kind="dual_chunk", chunk_size=262144, local_size=8192, original_length=262144
        ),
        "trained_length": 262144,
        "served_length": 1010000,
    },
    "Qwen3-8B": {
        "architecture": "Qwen3ForCausalLM",
        "qk_norm": True,
        "qkv_bias": False,
        "head_dim": 128,
        "num_kv_heads": 8,
        "max_position_embeddings": 40960,
    },
    "Qwen3-30B-A3B": {
        "architecture": "Qwen3MoeForCausalLM",
        "qk_norm": True,
        "num_kv_heads": 4,
        "max_position_embeddings": 262144,
        "layers": (LayerKind(mlp=Experts(128, 8, 768, True, 0.001)),) * 48,
    },
    "Qwen3.5-9B": _QWEN3_5
    | {
        "architecture": "Qwen3_5ForConditionalGeneration",
        "num_kv_heads": 4,
        "intermediate_size": 12288,
        "layers": (*(LayerKind(recurrence=_DELTA_NET),) * 3, LayerKind()) * 8,
    },
    "Qwen3.5-35B-A3B": _QWEN3_5
    | {
        "architecture": "Qwen3_5MoeForConditionalGeneration",
        "num_kv_heads": 2,
        "hidden_size": 2048,
        "layers": (*(LayerKind(None, _SHARED, _DELTA_NET),) * 3, LayerKind(None, _SHARED)) * 10,
    },
    "Meta-Llama-3-8B-Instruct": _LLAMA
    | {"max_position_embeddings": 8192, "eos_token_ids": (128009,), "rope_scaling": RopeScaling()},
    "Llama-3.1-70B-Instruct": _LLAMA
    | {
        "max_position_embeddings": 131072,
        "eos_token_ids": (128001, 128008, 128009),
        "rope_scaling": RopeScaling(
            kind="llama3",
            factor=8.0,
            original_length=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        "served_length": 131072,
    },
    "glm-4-9b-chat": _GLM
    | {"num_kv_heads": 2, "rope_theta": 5e6, "max_position_embeddings": 131072},
    "glm-4-9b-chat-1m": _GLM
    | {"num_kv_heads": 4, "rope_theta": 1e8, "max_position_embeddings": 1048576},
}
DUAL_CHUNK = "Qwen2.5-7B-Instruct-1M"
UNSCALED = sorted(set(EXPECTED) - {"Llama-3.1-70B-Instruct", DUAL_CHUNK})


def raw(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_published_model(name):
    config = read_config(CONFIGS / f"{name}.json")
    assert {field: getattr(config, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert config.windows == (None,) * config.num_layers
    assert config.dtype == "bfloat16"
    assert not config.tie_embeddings


@pytest.mark.parametrize("name", UNSCALED)
def test_published_models_without_scaling(name):
    config = read_config(CONFIGS / f"{name}.json")
    assert config.rope_scaling == RopeScaling()
    assert config.served_length == config.trained_length == config.max_position_embeddings


def test_every_published_config_is_tested():
    assert {file.stem for file in CONFIGS.glob("*.json")} == set(EXPECTED)


def v5(config):
    """The same config.json in the format of transformers 5."""
    config = dict(config)
    block = {"rope_type": "default"} | (config.pop("rope_scaling", None) or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in config:
            block[name] = config.pop(name)
    dtype = config.pop("torch_dtype")
    return config | {"rope_parameters": block, "dtype": dtype}


@pytest.mark.parametrize("name", [n for n in EXPECTED if not n.startswith(("glm-4", "Qwen3.5"))])
@pytest.mark.parametrize("scaling", ["own", "yarn", "linear"])
def test_both_formats_of_transformers_say_the_same(name, scaling):
    config = raw(name)
    if scaling != "own":
        config.pop("dual_chunk_attention_config", None)
    if scaling != "own":
        config["rope_scaling"] = {"rope_type": scaling, "factor": 4.0}
    assert parse_config(v5(config)) == parse_config(config)


@pytest.mark.parametrize("name", ["Qwen3.5-9B", "Qwen3.5-35B-A3B"])
def test_the_text_alone_is_as_within_a_model_that_sees_images(name, caplog):
    config = raw(name)
    alone = config["architectures"][0].replace("ForConditionalGeneration", "ForCausalLM")
    text = config["text_config"] | {"architectures": [alone]}
    found = parse_config(text)
    assert found == dataclasses.replace(parse_config(config), architecture=alone)
    text["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0}
    assert parse_config(text).served_length == 2**20
    assert not caplog.text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"linear_num_value_heads": 24}, "24 value heads over 16 key heads"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"rope_local_base": 1e4}, "rope_local_base"),
    ],
)
def test_text_that_is_not_supported(change, words):
    config = raw("Qwen3.5-9B")
    with pytest.raises(UserError, match=words):
        parse_config(config | {"text_config": config["text_config"] | change})


def test_rotary_share_of_glm_is_read_from_either_format():
    config = raw("Qwen3-8B") | {"architectures": ["GlmForCausalLM"]}
    assert parse_config(config).rotary_dim == 64
    config["partial_rotary_factor"] = 0.25
    assert parse_config(config).rotary_dim == parse_config(v5(config)).rotary_dim == 32


def test_glm_has_qkv_biases_unless_told_otherwise():
    config = raw("Qwen3-8B") | {"architectures": ["Glm4ForCausalLM"]}
    del config["attention_bias"]
    assert parse_config(config).qkv_bias
    assert not parse_config(config | {"attention_bias": False}).qkv_bias


@pytest.mark.parametrize("factor, served", [(4.0, 131072), (1.5, 49152)])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_length_served_with_scaling(kind, factor, served):
    config = raw("Qwen2.5-7B-Instruct") | {"rope_scaling": {"type": kind, "factor": factor}}
    assert parse_config(config).trained_length == 32768
    assert parse_config(config).served_length == served


def test_yarn_stretches_the_original_length_not_the_config_maximum():
    block = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_config(raw("Qwen3-8B") | {"rope_scaling": block})
    assert (config.trained_length, config.served_length) == (32768, 131072)


def test_dual_chunk_attention_is_what_config_json_says_unless_replaced(caplog):
    config = parse_config(raw(DUAL_CHUNK))
    assert override_rope_scaling(config, "auto") == config
    assert "is kept" in caplog.text
    plain = override_rope_scaling(config, "off")
    assert plain.served_length == plain.trained_length == 262144
    yarn = override_rope_scaling(config, {"rope_type": "yarn", "factor": 2.0})
    assert (yarn.trained_length, yarn.served_length) == (262144, 2 * 262144)
    # The length for which scores begin to grow may be left out.
    raw_block = raw(DUAL_CHUNK)["dual_chunk_attention_config"]
    for original in (0, None):
        block = raw_block | {"original_max_position_embeddings": original}
        other = parse_config(raw(DUAL_CHUNK) | {"dual_chunk_attention_config": block})
        assert other.rope_scaling.original_length is None and other.trained_length == 262144


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "beside yarn; dual chunk attention"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "does not go with sliding windows"),
        ({"dual_chunk_attention_config": {"local_size": 8192}}, "needs the field 'chunk_size'"),
        ({"dual_chunk_attention_config": 262144}, "dual_chunk_attention_config"),
    ],
)
def test_what_does_not_go_with_dual_chunk_attention(change, words):
    with pytest.raises(UserError, match=words):
        parse_config(raw(DUAL_CHUNK) | change)


WINDOW = {"use_sliding_window": True, "sliding_window": 4096}


def test_sliding_window_needs_its_switch():
    off = raw("Qwen2.5-7B-Instruct") | {"sliding_window": 4096, "max_window_layers": 0}
    assert parse_config(off).windows == (None,) * 28
    assert parse_config(off | WINDOW).windows == (4096,) * 28


def test_sliding_window_starts_at_max_window_layers():
    config = raw("Qwen3-8B") | WINDOW | {"max_window_layers": 30}
    assert parse_config(config).windows == (None,) * 30 + (4096,) * 6


def test_layer_types_win_over_max_window_layers():
    types = ["full_attention", "sliding_attention"] * 18
    config = raw("Qwen3-8B") | WINDOW | {"layer_types": types, "max_window_layers": 36}
    assert parse_config(config).windows == (None, 4096) * 18


@pytest.mark.parametrize("types", [["full_attention"], ["global"] * 36, [["full_attention"]] * 36])
def test_wrong_layer_types(types):
    with pytest.raises(UserError, match="layer_types"):
        parse_config(raw("Qwen3-8B") | WINDOW | {"layer_types": types})


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPT2LMHeadModel", ["x"], None])
def test_unknown_architecture_lists_the_supported(name):
    with pytest.raises(UserError) as error:
        parse_config({"architectures": [name]})
    for known in FAMILIES:
        assert known in str(error.value)


NEEDED = {
    "Qwen2.5-7B-Instruct": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    ),
    "glm-4-9b-chat-1m": (
        "hidden_size",
        "ffn_hidden_size",
        "num_layers",
        "num_attention_heads",
        "multi_query_group_num",
        "kv_channels",
        "seq_length",
        "padded_vocab_size",
        "layernorm_epsilon",
    ),
}
NEEDED_FIELDS = [(name, field) for name, fields in NEEDED.items() for field in fields]


@pytest.mark.parametrize("name, field", NEEDED_FIELDS)
@pytest.mark.parametrize("value", ["missing", None, "12", True, -1, [1]])
def test_a_needed_field_is_missing_or_wrong(name, field, value):
    config = raw(name)
    if value == "missing":
        del config[field]
    else:
        config[field] = value
    with pytest.raises(UserError, match=f"'{field}'"):
        parse_config(config)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_key_value_heads": 3}, "28 query heads over 3 KV heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"torch_dtype": "float8"}, "float8"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"partial_rotary_factor": 0.01}, "rotates 1 of 128"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ],
)
def test_a_setting_that_cannot_work(change, words):
    with pytest.raises(UserError, match=words):
        parse_config(raw("Qwen2.5-7B-Instruct") | change)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rmsnorm", False),
        ("add_bias_linear", True),
        ("post_layer_norm", False),
        ("apply_residual_connection_post_layernorm", True),
        ("multi_query_attention", False),
        ("multi_query_attention", None),
    ],
)
def test_an_older_chatglm_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        parse_config(raw("glm-4-9b-chat") | {field: value})


def test_read_config_names_the_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=str(tmp_path)):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw("Qwen3-8B")))
    assert read_config(tmp_path) == parse_config(raw("Qwen3-8B"))


def test_fields_that_nothing_reads_are_listed(caplog):
    parse_config(raw("Qwen2.5-7B-Instruct") | {"num_experts": 8, "logit_scale": 2.0, "unset": None})
    assert "config.json sets logit_scale, num_experts, which nothing here reads" in caplog.text


@pytest.mark.parametrize("name", EXPECTED)
def test_published_files_set_nothing_that_is_ignored(name, caplog):
    read_config(CONFIGS / f"{name}.json")
    assert not caplog.text
