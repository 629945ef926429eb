"""A training step on a million tokens, compiled for TPUs: with one layer, so that it is quick."""

import optax
from helpers.published import CONFIGS, with_layers

from lsjax.planning import find_target, target_mesh
from lsjax.training.step import Trainer

LAYERS, MODEL_LAYERS, LENGTH, DEVICES = 1, 28, 2**20, 8


def test_a_chip_of_eight_has_room_for_a_step_of_a_7b_model_on_a_million_tokens():
    config = with_layers(CONFIGS / "Qwen2.5-7B-Instruct.json", LAYERS)
    target = find_target("v5p:2x2x2")
    mesh = target_mesh(target, {"context": DEVICES})
    trainer = Trainer(config, mesh, optax.adamw(1e-5), "bfloat16")
    memory = trainer.lower(1, LENGTH).compile().memory_analysis()
    hidden = 2 * LENGTH * config.hidden_size / DEVICES
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    weights = config.hidden_size * (3 * config.intermediate_size + heads)
    # Each further layer adds its input, float32 weights and moments, bfloat16 weights and grads.
    more = (MODEL_LAYERS - LAYERS) * (hidden + weights * (12 + 4) / DEVICES)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + more
    assert total < 0.85 * target.memory
    # What one layer works in, beside what is kept of each.
    assert memory.temp_size_in_bytes < 32 * hidden
