"""Compares decode of a mixture of experts with a dense model of the same active size.

    python scripts/bench_experts.py --dtype float32

Both have random weights and one shape but for the MLP: that of the dense model is as wide as the
experts that are chosen for a token together. They run in turn in one process, and the median of the
ratios is printed.
"""

import json
import os
import statistics
import sys
import tempfile

from absl import flags

import lsjax
from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.cli.program import run_program

FLAGS = flags.FLAGS

flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of weights and activations.")
flags.DEFINE_integer("experts", 128, "Number of experts.", lower_bound=1)
flags.DEFINE_integer("experts_per_token", 8, "Experts chosen for a token.", lower_bound=1)
flags.DEFINE_integer("width", 96, "Width of an expert's MLP.", lower_bound=1)
flags.DEFINE_integer("repeats", 9, "Number of times that each model decodes.", lower_bound=1)
_SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_PROMPT, _OUTPUT = 64, 65


def main(_: list[str]) -> None:
    of_experts = _SHAPE | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": FLAGS.width,
        "moe_intermediate_size": FLAGS.width,
        "num_experts": FLAGS.experts,
        "num_experts_per_tok": FLAGS.experts_per_token,
        "norm_topk_prob": True,
    }
    dense = _SHAPE | {
        "architectures": ["Qwen3ForCausalLM"],
        "intermediate_size": FLAGS.width * FLAGS.experts_per_token,
    }
    models = {"experts": _load(of_experts), "dense": _load(dense)}
    times = {name: [] for name in models}
    for i in range(FLAGS.repeats + 1):
        for name, lm in models.items():
            (answer,) = lm.generate(list(range(1, _PROMPT + 1)), _OUTPUT, ignore_eos=True)
            if i:  # the first call compiles
                times[name].append(answer.stats.decode_seconds / (_OUTPUT - 1))
    for name, seconds in times.items():
        print(f"{name:<10}{1e3 * statistics.median(seconds):>10.2f} ms a token")
    ratios = [a / b for a, b in zip(times["experts"], times["dense"], strict=True)]
    print(f"experts / dense {statistics.median(ratios):.2f}")


def _load(config: dict) -> lsjax.LanguageModel:
    """Loads random weights; they are gone from the disk after it."""
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "shape.json")
        with open(name, "w", encoding="utf-8") as file:
            json.dump(config, file)
        write_random_checkpoint(name, folder)
        return lsjax.load(folder, dtype=FLAGS.dtype)


if __name__ == "__main__":
    sys.exit(run_program(main))
