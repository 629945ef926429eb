"""A tiny model and a corpus, and train.py run on them."""

import json

from helpers import programs

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "torch_dtype": "float32",
}


def arguments(folder, *flags):
    """What train.py is given; the corpus is made in the folder if it is not there."""
    config, data = folder / "config.json", folder / "data.jsonl"
    if not config.exists():
        config.write_text(json.dumps(CONFIG))
        ids = [[(7 * i + i * j) % 264 for j in range(20 + i)] for i in range(30)]
        data.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    return ["--config", config, "--data", data, "--seq_length", 32, "--learning_rate", 1e-3, *flags]


def train(folder, *flags):
    return programs.run("train.py", *arguments(folder, *flags))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """Step -> its loss, each step once."""
    steps = [(line["step"], line["loss"]) for line in log(folder) if "loss" in line]
    assert len(dict(steps)) == len(steps)
    return dict(steps)
