"""Makes the golden logits of Baichuan2 with a model of its own, in float64 NumPy:

    python tests/golden/baichuan/make.py

transformers has no class for this family. Writes <case>.json (a config.json) and <case>.npz.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "models"))
from weights import SEED, tensor  # noqa: E402

BASE = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 96,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
KEPT = 5  # one position in so many
LENGTH = 256  # four times what the models were made for
CASES = {
    "alibi_8_heads": BASE | {"num_attention_heads": 8, "model_max_length": 64},
    "alibi_6_heads": BASE | {"num_attention_heads": 6, "model_max_length": 64},
    "rotary": BASE | {"num_attention_heads": 4, "max_position_embeddings": 64},
}


def weight(name, *shape):
    return tensor(SEED, name, shape).astype(np.float64)


def slope(head, heads):
    """Head by head, as the paper's text gives it."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def norm(x, name, eps):
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x / rms * weight(name, x.shape[-1])


def turn(x):
    """Rotary over halves: channel i turns with channel i + d/2, as complex numbers."""
    length, half = x.shape[0], x.shape[1] // 2
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def attention(x, name, config):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    packed = x @ weight(f"{name}.W_pack.weight", 3 * hidden, hidden).T
    q, k, v = (part.reshape(len(x), heads, -1) for part in np.split(packed, 3, axis=1))
    out = np.zeros_like(v)
    for h in range(heads):
        qh, kh = q[:, h], k[:, h]
        if "max_position_embeddings" in config:
            qh, kh = turn(qh), turn(kh)
        for i in range(len(x)):
            scores = kh[: i + 1] @ qh[i] / np.sqrt(qh.shape[1])
            if "max_position_embeddings" not in config:
                scores -= slope(h, heads) * (i - np.arange(i + 1))
            p = np.exp(scores - scores.max())
            out[i, h] = p @ v[: i + 1, h] / p.sum()
    return out.reshape(len(x), -1) @ weight(f"{name}.o_proj.weight", hidden, hidden).T


def mlp(x, name, config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    gate = x @ weight(f"{name}.gate_proj.weight", inner, hidden).T
    up = x @ weight(f"{name}.up_proj.weight", inner, hidden).T
    return (gate / (1 + np.exp(-gate)) * up) @ weight(f"{name}.down_proj.weight", hidden, inner).T


def logits(tokens, config):
    hidden, vocab, eps = config["hidden_size"], config["vocab_size"], config["rms_norm_eps"]
    x = weight("model.embed_tokens.weight", vocab, hidden)[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = x + attention(
            norm(x, f"{layer}.input_layernorm.weight", eps), f"{layer}.self_attn", config
        )
        x = x + mlp(
            norm(x, f"{layer}.post_attention_layernorm.weight", eps), f"{layer}.mlp", config
        )
    head = weight("lm_head.weight", vocab, hidden)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    return norm(x, "model.norm.weight", eps) @ head.T


def main():
    for index, (name, config) in enumerate(CASES.items()):
        tokens = np.random.default_rng(index).integers(0, config["vocab_size"], LENGTH)
        (HERE / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
        kept = logits(tokens, config)[::KEPT].astype(np.float32)
        np.savez_compressed(HERE / f"{name}.npz", tokens=tokens.astype(np.int32), logits=kept)
        print(name, kept.std())


if __name__ == "__main__":
    main()
