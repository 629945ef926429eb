"""Small GGUF files, written by the gguf package from Hugging Face tensors as llama.cpp does it."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from golden.models.weights import SEED, tensor

from lsjax.checkpoint.hf_checkpoint import abstract_tensor
from lsjax.distributed.sharding import abstract_mesh
from lsjax.families import family_of, parse_config
from lsjax.nn.parameters import abstract_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
F32, F16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "Q8_0"))
_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Glm4ForCausalLM": gguf.MODEL_ARCH.GLM4,
}


def golden_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "models" / name / "config.json").read_text())


def hf_tensors(raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a golden model as its Hugging Face checkpoint names them."""
    return dict(_hf_tensors(json.dumps(raw)))


@functools.cache
def _hf_tensors(raw: str) -> dict[str, np.ndarray]:
    config = parse_config(json.loads(raw))
    shapes = abstract_parameters(config, abstract_mesh((1, 1, 1)), "float32")
    return {
        t.name: tensor(SEED, t.name, abstract_tensor(t, shapes).shape)
        for t in family_of(config).tensors(config)
    }


def write_gguf(
    path: Path,
    raw: Mapping[str, Any],
    kind: gguf.GGMLQuantizationType = F32,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """Writes a golden model.

    Args:
      path: file to write.
      raw: its config.json, without RoPE scaling.
      kind: type of the matrices; vectors are float32.
      metadata: more keys, or other values; {arch} stands for the architecture.
      extra: more tensors, by their GGUF names.
      without: GGUF name of a tensor that is left out.
    """
    config = parse_config(raw)
    architecture = _ARCHITECTURES[config.architecture]
    metadata = dict(metadata or {})
    arch = metadata.pop("general.architecture", gguf.MODEL_ARCH_NAMES[architecture])
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        "general.type": "model",
        "{arch}.block_count": config.num_layers,
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": config.intermediate_size,
        "{arch}.attention.head_count": config.num_heads,
        "{arch}.attention.head_count_kv": config.num_kv_heads,
        "{arch}.attention.key_length": config.head_dim,
        "{arch}.attention.value_length": config.head_dim,
        "{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        "{arch}.rope.freq_base": config.rope_theta,
        "{arch}.rope.dimension_count": config.rotary_dim,
    }
    for key, value in (keys | metadata).items():
        _add(writer, key.replace("{arch}", arch), value)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name, values in hf_tensors(raw).items():
        module, _, suffix = name.rpartition(".")
        new = f"{names.get_name(module)}.{suffix}"
        if arch == "llama" and module.endswith("q_proj"):
            values = permute(values, config.num_heads)
        elif arch == "llama" and module.endswith("k_proj"):
            values = permute(values, config.num_kv_heads)
        if new != without:
            _add_tensor(writer, new, values, kind)
    for name, values in (extra or {}).items():
        _add_tensor(writer, name, values, F32)
    return _finish(writer, path)


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> Path:
    """Writes a file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp gives Llama's queries and keys: LlamaModel.permute."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    kind = kind if values.ndim > 1 else F32
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
