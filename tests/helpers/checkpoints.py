"""Small random checkpoints of every family, written by the safetensors library itself."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lsjax.distributed.sharding import make_mesh, parse_mesh
from lsjax.families import family_of, parse_config
from lsjax.nn.parameters import abstract_parameters

_HF = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}
_CHATGLM = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "padded_vocab_size": 64,
    "seq_length": 128,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "eos_token_id": 1,
}
# Fused tensors are in the last three, biases in all but Qwen3's; Qwen2's head is tied.
CONFIGS = {
    "Qwen2ForCausalLM": _HF | {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": _HF,
    "LlamaForCausalLM": _HF | {"attention_bias": True, "mlp_bias": True},
    "GlmForCausalLM": _HF | {"attention_bias": True},
    "Glm4ForCausalLM": _HF | {"attention_bias": True},
    "ChatGLMModel": _CHATGLM,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def on_each_mesh(architectures: Iterable[str], meshes: Sequence[Sequence[str]]) -> list:
    """Parameters (architecture, *meshes): all of them, of which the quick ones have each once."""
    slow = pytest.mark.slow("architecture and mesh are each met in another pair")
    return [
        pytest.param(name, *given, marks=() if j == i % len(meshes) else slow)
        for i, name in enumerate(architectures)
        for j, given in enumerate(meshes)
    ]


def mesh(text: str = ""):
    return make_mesh(parse_mesh(text))


def make_tensors(architecture: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    config = parse_config(CONFIGS[architecture] | {"architectures": [architecture]})
    shapes = abstract_parameters(config, mesh(), "float32")
    random = np.random.default_rng(0)
    tensors = {}
    for tensor in family_of(config).tensors(config):
        parts = [random.standard_normal(shapes[path].shape) for path in tensor.params]
        tensors[tensor.name] = np.concatenate(parts).astype(DTYPES[dtype])
    return tensors


def write_folder(
    folder: Path, architecture: str, tensors: dict[str, np.ndarray], files: int = 1
) -> Path:
    """Writes a Hugging Face folder; `files` > 1 splits the tensors and adds the index."""
    folder.mkdir()
    raw = CONFIGS[architecture] | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    (folder / "tokenizer.json").write_bytes(b'{"model": "\xe4\xb8\x96"}\r\n')
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t in tensors if weight_map[t] == name}, folder / name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_folder(folder: Path, architecture: str = "Qwen3ForCausalLM", files: int = 1) -> Path:
    return write_folder(folder, architecture, make_tensors(architecture), files)
