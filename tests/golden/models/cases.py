"""The golden models: what config.json says, and how many tokens are run.

Every family, with each of its options, each kind of rope in each spelling, and sequences past the
original length; 1, 2, 4 and 8 query heads to a key head.
"""

_HF = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_QWEN2 = _HF | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 2,
    "sliding_window": 8,
    "use_sliding_window": False,
    "rope_theta": 1e6,
}
_QWEN3 = _HF | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 32,
    "max_window_layers": 2,
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_scaling": None,
    "rope_theta": 1e6,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
}
_QWEN3_5 = _HF | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "attention_bias": False,
    "attn_output_gate": True,
    "full_attention_interval": 2,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 12,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1e7,
}
_QWEN3_5_MOE = _QWEN3_5 | {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 24,
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "in_channels": 3,
    "intermediate_size": 16,
    "model_type": "qwen3_5_vision",
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
    "patch_size": 2,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
}
_LLAMA = _HF | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 5e5,
}
_GLM = _HF | {
    "architectures": ["GlmForCausalLM"],
    "model_type": "glm",
    "attention_bias": True,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-7,
    "rope_theta": 1e4,
}
_GLM4 = _GLM | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "rms_norm_eps": 1e-5}
_CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "eos_token_id": [2, 3],
    "ffn_hidden_size": 96,
    "hidden_size": 64,
    "kv_channels": 32,
    "layernorm_epsilon": 1.5625e-7,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "original_rope": True,
    "pad_token_id": 0,
    "padded_vocab_size": 96,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 500,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def _v5(config: dict, **rope) -> dict:
    """The same in the format of transformers 5: everything about rope in one block."""
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype")
    block = {"rope_theta": config["rope_theta"], "rope_type": "default"} | rope
    if "partial_rotary_factor" in config:
        block["partial_rotary_factor"] = config["partial_rotary_factor"]
    kept = {name: value for name, value in config.items() if name not in old}
    return kept | {"rope_parameters": block, "dtype": "float32"}


def _with_images(config: dict) -> dict:
    """The same as the text's part of a model that sees images."""
    name = config["architectures"][0].replace("ForCausalLM", "ForConditionalGeneration")
    text = {key: value for key, value in config.items() if key != "architectures"}
    return {
        "architectures": [name],
        "model_type": config["model_type"].removesuffix("_text"),
        "image_token_id": 90,
        "text_config": text,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "video_token_id": 91,
        "vision_config": _VISION,
        "vision_end_token_id": 92,
        "vision_start_token_id": 93,
    }


_ORIGINAL = {"original_max_position_embeddings": 64}
_YARN = _ORIGINAL | {"factor": 4.0}
_LLAMA3 = _ORIGINAL | {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_WINDOW = {"use_sliding_window": True, "sliding_window": 12, "num_hidden_layers": 3}

# name -> (config.json, tokens)
CASES: dict[str, tuple[dict, int]] = {
    "qwen2": (_QWEN2 | {"num_key_value_heads": 1}, 48),
    "qwen2_tied": (
        _QWEN2 | {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 1},
        48,
    ),
    "qwen2_window": (_QWEN2 | _WINDOW | {"max_window_layers": 1}, 80),
    "qwen2_window_layer_types": (
        _v5(_QWEN2)
        | _WINDOW
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        80,
    ),
    "qwen2_linear_v5": (_v5(_QWEN2, rope_type="linear", factor=2.5), 64),
    "qwen2_yarn_type": (
        _QWEN2
        | {
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "yarn"} | _YARN,
        },
        256,
    ),
    "qwen2_yarn_attention_factor_v5": (
        _v5(_QWEN2, rope_type="yarn", factor=4.0, attention_factor=1.3, **_ORIGINAL),
        256,
    ),
    "qwen3": (_QWEN3, 48),
    "qwen3_bias_tied": (
        _QWEN3 | {"attention_bias": True, "tie_word_embeddings": True, "num_attention_heads": 8},
        48,
    ),
    "qwen3_window": (_QWEN3 | _WINDOW | {"max_window_layers": 2}, 80),
    "qwen3_yarn_mscale": (
        _QWEN3
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "beta_fast": 16,
                "beta_slow": 2,
            }
            | _ORIGINAL
        },
        256,
    ),
    "qwen3_dynamic": (
        _QWEN3
        | {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        256,
    ),
    "llama": (_LLAMA | {"num_key_value_heads": 4}, 48),
    "llama_biases": (_LLAMA | {"attention_bias": True, "mlp_bias": True}, 48),
    "llama_tied_llama3": (
        _LLAMA | {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "llama3"} | _LLAMA3},
        256,
    ),
    "llama_llama3_v5": (_v5(_LLAMA, rope_type="llama3", **_LLAMA3), 256),
    "llama_linear_type": (
        _LLAMA | {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0}},
        256,
    ),
    "llama_dynamic_v5": (
        _v5(_LLAMA, rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 64},
        256,
    ),
    "llama_yarn_untruncated": (
        _LLAMA
        | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False} | _ORIGINAL},
        256,
    ),
    "glm": (_GLM, 64),
    "glm_without_bias_v5": (_v5(_GLM | {"attention_bias": False, "num_key_value_heads": 1}), 64),
    "glm_yarn": (
        _GLM
        | {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        256,
    ),
    "glm4": (_GLM4, 64),
    "glm4_dynamic_v5": (
        _v5(_GLM4, rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 64},
        256,
    ),
    "chatglm": (_CHATGLM, 64),
    "chatglm_1m": (
        _CHATGLM | {"rope_ratio": 10000, "num_attention_heads": 8, "layernorm_epsilon": 1e-5},
        256,
    ),
    "chatglm_linear": (
        _CHATGLM | {"seq_length": 64, "rope_scaling": {"type": "linear", "factor": 4.0}},
        256,
    ),
    "qwen3_moe": (_QWEN3_MOE, 80),
    "qwen3_moe_dense_layers": (
        _v5(_QWEN3_MOE)
        | {
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        }
        | {"num_experts": 12, "tie_word_embeddings": True, "attention_bias": True},
        80,
    ),
    "qwen3_5": (_v5(_QWEN3_5), 160),
    "qwen3_5_with_images": (
        _with_images(
            _v5(
                _QWEN3_5,
                rope_type="yarn",
                mrope_interleaved=True,
                mrope_section=[2, 1, 1],
                **_YARN,
            )
            | {
                "attention_bias": True,
                "layer_types": ["full_attention", "linear_attention", "linear_attention"],
                "linear_conv_kernel_dim": 3,
                "linear_num_value_heads": 8,
                "num_hidden_layers": 3,
                "tie_word_embeddings": True,
            },
        ),
        256,
    ),
    "qwen3_5_moe": (
        _v5(_QWEN3_5_MOE | {"num_hidden_layers": 3, "full_attention_interval": 3}),
        160,
    ),
}
