"""What a decode step of a mixture of experts moves to and from a device's memory.

Programs are compiled with two numbers of layers. What the further ones add is taken for the rest of
the model's.
"""

import dataclasses
import json
from unittest import mock

import jax
import pytest
from helpers.deployments import deployment as deployment_of
from helpers.pallas import Kernels, traced_decode
from helpers.published import CONFIGS, with_layers
from helpers.traffic import Traffic, decode_traffic, total

from lsjax.cache.float_tail import BLOCK
from lsjax.inference.engine import Engine
from lsjax.nn import experts
from lsjax.planning import find_target, target_mesh

LENGTHS, OUTPUT = (32_768, 262_144), 256
QWEN3, QWEN3_5 = CONFIGS / "Qwen3-30B-A3B.json", CONFIGS / "Qwen3.5-35B-A3B.json"


def fields(path):
    config = json.loads(path.read_text(encoding="utf-8"))
    return config.get("text_config", config)


def experts_bytes(c, count, itemsize):
    return count * 3 * c["hidden_size"] * c["moe_intermediate_size"] * itemsize


def least(path, length, itemsize):
    """What each active weight and what is visible of an int8 cache take once.

    Returns:
      Traffic of the layers after which kinds of layers repeat, and of head and embedding.
    """
    c = fields(path)
    hidden, head_dim, kv_heads = c["hidden_size"], c["head_dim"], c["num_key_value_heads"]
    repeats = c.get("full_attention_interval", 1)
    heads = c["num_attention_heads"] * (3 if c.get("attn_output_gate") else 2) + 2 * kv_heads
    matrices = hidden * heads * head_dim
    matrices += repeats * 3 * hidden * c.get("shared_expert_intermediate_size", 0)
    state = 0
    if repeats > 1:
        keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
        values = c["linear_num_value_heads"] * c["linear_value_head_dim"]
        matrices += (repeats - 1) * hidden * (2 * keys + 3 * values)
        state = (repeats - 1) * values * c["linear_key_head_dim"] * 4
    chosen = repeats * experts_bytes(c, c["num_experts_per_tok"], itemsize)
    routers = repeats * c["num_experts"] * hidden * 2
    cache = 2 * kv_heads * (head_dim + 2) * length
    read = matrices * itemsize + chosen + routers + cache + state
    return Traffic(read, state), Traffic((c["vocab_size"] + 1) * hidden * itemsize, 0)


def counted(path, layers, target, mesh, weights):
    """Counts what a device moves for the last token of each of LENGTHS."""
    deployment = deployment_of(mesh, "bfloat16", "int8", 512, 1, OUTPUT)
    deployment = dataclasses.replace(deployment, weight_dtype=weights)
    devices = target_mesh(find_target(target), deployment.sizes)
    engine = Engine(with_layers(path, layers), dataclasses.replace(deployment, mesh=devices))
    spec = deployment.cache_spec_for(LENGTHS[-1] - OUTPUT)
    traced = traced_decode(engine, spec)
    with jax.set_mesh(devices):
        text = traced.lower().compile().as_text()
    _, context, model = mesh
    found = []
    for length in LENGTHS:
        # The last block of tokens is in floats, on each device of a context.
        visible = {spec.capacity // context: (length - BLOCK) // context, BLOCK: BLOCK}
        kernels, share = Kernels(traced, visible), 1 / (context * model)  # has a chosen expert
        found.append(total(decode_traffic(text, kernels, engine.settings.segment, share)))
    return found


@pytest.mark.as_users_compile
@pytest.mark.parametrize(
    ("path", "target", "mesh", "weights"),
    [
        (QWEN3, "h100-80gb:1", (1, 1, 1), "auto"),
        (QWEN3, "h100-80gb:1", (1, 1, 1), "int8"),
        (QWEN3, "v5e:2x4", (1, 4, 2), "auto"),
        (QWEN3, "v5e:2x4", (1, 4, 2), "int8"),
        (QWEN3_5, "h100-80gb:1", (1, 1, 1), "auto"),
    ],
)
def test_decode_reads_what_it_needs_once(path, target, mesh, weights):
    repeats = fields(path).get("full_attention_interval", 1)
    few = max(repeats, 2)
    counts = (counted(path, layers, target, mesh, weights) for layers in (few, 2 * few))
    for length, few_layers, twice in zip(LENGTHS, *counts, strict=True):
        needed, rest = least(path, length, 1 if weights == "int8" else 2)
        times = fields(path)["num_hidden_layers"] // repeats
        needed = (needed * times + rest) * (1 / (mesh[1] * mesh[2]))
        layer = (twice + few_layers * -1) * (1 / few)
        model = few_layers + layer * (times * repeats - few)
        moved = model.read + model.written
        ratio = moved / (needed.read + needed.written)
        print(
            f"{path.stem} {target} {weights} {length:,}: needs {needed.read / 1e9:.3f} GB; "
            f"reads {model.read / 1e9:.3f}, {model.read / needed.read:.3f}x, "
            f"{layer.read / 1e6:.1f} MB a layer; "
            f"writes {model.written / 1e9:.3f}, {ratio:.3f}x with those needed"
        )
        assert model.read > 0.99 * needed.read  # else the count is wrong
        assert ratio < 1.2


def test_all_experts_would_be_counted():
    with mock.patch.object(experts, "_run_chosen", experts._run_sorted):
        step, _ = counted(QWEN3, 1, "h100-80gb:1", (1, 1, 1), "auto")
    c = fields(QWEN3)
    assert step.read > experts_bytes(c, c["num_experts"], 2)
