"""Makes the golden logits and frequencies, on the CPU:

    python tests/golden/models/make.py

It needs transformers 5.23, 5.24 for Qwen3.5, and torch 2.13. Writes, beside itself,
<case>/config.json and <case>/logits.npz (token ids, positions, float32 logits at those positions)
for each case of cases.py, and frequencies.json with frequencies.npz.
Weights are not stored: weights.py makes them again from a seed.
"""

import functools
import json
import pathlib
import random

import numpy as np
import torch
import transformers
from cases import CASES
from transformers import modeling_rope_utils
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from weights import SEED, tensor

HERE = pathlib.Path(__file__).parent
BATCH = 2
KEPT = 24  # positions whose logits are kept


def main() -> None:
    for index, (name, (config, length)) in enumerate(CASES.items()):
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        text = config.get("text_config", config)
        vocab = text.get("vocab_size") or text["padded_vocab_size"]
        tokens = np.random.default_rng(index).integers(0, vocab, (BATCH, length))
        positions = np.unique(np.linspace(0, length - 1, KEPT).round().astype(np.int32))
        with torch.no_grad():
            logits = model_of(config)(torch.from_numpy(tokens)).logits.numpy()[:, positions]
        np.savez_compressed(
            folder / "logits.npz",
            tokens=tokens.astype(np.int32),
            positions=positions,
            logits=logits.astype(np.float32),
        )
        print(f"{name}: logits have a standard deviation of {logits.std():.2f}")
    write_frequencies()


def model_of(config: dict) -> torch.nn.Module:
    """The model in float32 with eager attention, its weights from weights.py."""
    name, chatglm = config["architectures"][0], None
    if name == "ChatGLMModel":
        chatglm, config, name = config, glm_config(config), "GlmForCausalLM"
    cls = getattr(transformers, name)
    parsed = cls.config_class.from_dict(config)
    parsed._attn_implementation = "eager"
    model = cls(parsed).float().eval()
    state = model.state_dict()
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    source = chatglm_source(chatglm) if chatglm else expert_source
    if name.startswith("Qwen3_5"):
        source = functools.partial(expert_source, zero_centered_norms=True)
    weights = {key: torch.from_numpy(source(key, tuple(old.shape))) for key, old in state.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def expert_source(key: str, shape: tuple[int, ...], **norms: bool) -> np.ndarray:
    """A tensor by its name; experts, which transformers stacks, by the names in checkpoints."""
    for end, parts in {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }.items():
        if key.endswith(f"experts.{end}"):
            experts = key.removesuffix(end)
            rows = shape[1] // len(parts)
            names = [[f"{experts}{i}.{part}.weight" for part in parts] for i in range(shape[0])]
            of = [[tensor(SEED, name, (rows, shape[2])) for name in each] for each in names]
            return np.stack([np.concatenate(each) for each in of])
    return tensor(SEED, key, shape, **norms)


def glm_config(c: dict) -> dict:
    """The original layout's config.json as GlmForCausalLM's."""
    return {
        "architectures": ["GlmForCausalLM"],
        "attention_bias": c["add_qkv_bias"],
        "head_dim": c["kv_channels"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["ffn_hidden_size"],
        "max_position_embeddings": c["seq_length"],
        "num_attention_heads": c["num_attention_heads"],
        "num_hidden_layers": c["num_layers"],
        "num_key_value_heads": c["multi_query_group_num"],
        "pad_token_id": c["pad_token_id"],
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": c["layernorm_epsilon"],
        "rope_scaling": c.get("rope_scaling"),
        "rope_theta": 10000.0 * c["rope_ratio"],
        "tie_word_embeddings": c["tie_word_embeddings"],
        "vocab_size": c["padded_vocab_size"],
    }


def chatglm_source(c: dict):
    """Returns what gives GlmForCausalLM's tensors from a checkpoint of the original layout."""
    kv_heads = c["multi_query_group_num"]
    sizes = [c["kv_channels"] * n for n in (c["num_attention_heads"], kv_heads, kv_heads)]
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.layers": "transformer.encoder.layers",
    }

    def source(key: str, shape: tuple[int, ...]) -> np.ndarray:
        for new, old in names.items():
            key = key.replace(new, old)
        for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            if f"self_attn.{projection}" in key:
                key = key.replace(f"self_attn.{projection}", "self_attention.query_key_value")
                fused = tensor(SEED, key, (sum(sizes), *shape[1:]))
                return np.split(fused, np.cumsum(sizes)[:2])[part]
        return tensor(SEED, key, shape)

    return source


class _Float64:
    """torch, with float32 meaning float64: transformers' formulas, exact to 1e-15."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def write_frequencies(draws: int = 100) -> None:
    """Random settings of every kind -> inv_freq and attention_factor by transformers' functions."""
    for module in (modeling_rope_utils, modeling_llama, modeling_glm):
        module.torch = _Float64()
    rng, cases, arrays = random.Random(7), [], []
    for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope"):
        for _ in range(draws):
            config, request = draw(rng, kind)
            if config["architectures"] == ["GlmForCausalLM"]:
                cls, rotary = transformers.GlmConfig, modeling_glm.GlmRotaryEmbedding
            else:
                cls, rotary = transformers.LlamaConfig, modeling_llama.LlamaRotaryEmbedding
            parsed = cls.from_dict(config)
            if kind == "default":
                inv_freq, attention_factor = rotary.compute_default_rope_parameters(parsed)
            else:
                inv_freq, attention_factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](
                    parsed, seq_len=request
                )
            assert inv_freq.dtype == torch.float64
            arrays.append(inv_freq.numpy())
            cases.append(
                {"config": config, "request": request, "attention_factor": attention_factor}
            )
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "frequencies.json").write_text(f"[\n{lines}\n]\n")
    ends = np.cumsum([a.size for a in arrays])
    np.savez_compressed(HERE / "frequencies.npz", inv_freq=np.concatenate(arrays), ends=ends)


def draw(rng: random.Random, kind: str) -> tuple[dict, int]:
    """A config.json with random rope settings, and the tokens that a request asks for."""
    original = rng.choice([512, 2048, 8192, 32768, rng.randrange(256, 100_000)])
    theta = round(10 ** rng.uniform(4, 8), 1)
    block = {"rope_type": kind}
    if kind != "default":
        block["factor"] = rng.choice([1.0, 2, 4.0, 8.0, round(rng.uniform(1, 64), 3)])
    if kind in ("yarn", "llama3", "longrope"):
        block["original_max_position_embeddings"] = original
    if kind == "llama3":
        block["low_freq_factor"] = rng.choice([1.0, round(rng.uniform(0.5, 4), 2)])
        block["high_freq_factor"] = block["low_freq_factor"] + round(rng.uniform(0.1, 8), 2)
    if kind == "yarn":
        options = {
            "attention_factor": round(rng.uniform(0.5, 2), 4),
            "beta_fast": rng.choice([16, 32, round(rng.uniform(8, 64), 2)]),
            "beta_slow": rng.choice([1, 2, round(rng.uniform(0.5, 4), 2)]),
            "mscale": round(rng.uniform(0.1, 2), 3),
            "mscale_all_dim": round(rng.uniform(0.1, 2), 3),
            "truncate": rng.random() < 0.5,
        }
        block |= {name: value for name, value in options.items() if rng.random() < 0.4}
    architecture = rng.choice(["LlamaForCausalLM", "GlmForCausalLM"])
    config = {
        "architectures": [architecture],
        "hidden_act": "silu",
        "head_dim": rng.choice([16, 32, 64, 96, 128]),
        "hidden_size": 256,
        "intermediate_size": 96,
        "max_position_embeddings": rng.choice([original, 4 * original]),
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    }
    shared = {"rope_theta": theta}
    if architecture == "GlmForCausalLM":
        shared["partial_rotary_factor"] = rng.choice([0.25, 0.5, 1.0])
    if kind == "longrope":
        pairs = int(config["head_dim"] * shared.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            block[name] = [round(rng.uniform(1, 40), 3) for _ in range(pairs)]
        if rng.random() < 0.3:
            block["attention_factor"] = round(rng.uniform(0.5, 2), 4)
        if rng.random() < 0.3:
            del block["factor"]
    if rng.random() < 0.5:
        config["rope_parameters"] = block | shared
    else:
        config |= shared | {"rope_scaling": block}
    return config, rng.randrange(1, 8 * original)


if __name__ == "__main__":
    main()
