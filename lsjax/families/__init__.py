"""Model families: the differences between them, expressed as data."""

import os
from collections.abc import Mapping
from typing import Any

from lsjax.config import ModelConfig
from lsjax.families.baichuan import BAICHUAN
from lsjax.families.family import Family, Tensor
from lsjax.families.fields import Fields
from lsjax.families.glm import CHATGLM, GLM
from lsjax.families.llama import LLAMA
from lsjax.families.qwen import QWEN2, QWEN3
from lsjax.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from lsjax.families.qwen_moe import QWEN3_MOE
from lsjax.positions.scaling import check_scaling, with_dual_chunk
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import read_json

__all__ = [
    "FAMILIES",
    "Family",
    "Tensor",
    "family_of",
    "parse_config",
    "read_config",
    "read_raw_config",
    "refuse_gguf",
]

FAMILIES = {
    name: family
    for family in (QWEN2, QWEN3, QWEN3_MOE, QWEN3_5, QWEN3_5_MOE, LLAMA, GLM, CHATGLM, BAICHUAN)
    for name in family.architectures
}


def family_of(config: ModelConfig) -> Family:
    """Returns the family that a parsed model belongs to."""
    return FAMILIES[config.architecture]


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Parses the JSON object of a config.json into a ModelConfig.

    Raises:
      UserError: the architecture is unknown, the checkpoint is quantized, or a field is missing,
        invalid or contradictory.
    """
    if not isinstance(raw, Mapping):
        raise UserError("config.json must hold a JSON object.")
    _refuse_quantized(raw)
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise UserError(
            f"config.json lacks the field 'architectures'; supported are {', '.join(FAMILIES)}."
        )
    name = names[0]
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"config.json names the architecture {name!r}, which is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    fields = Fields(raw)
    config = FAMILIES[name].parse(fields, name)
    config = with_dual_chunk(config, fields.dual_chunk())
    fields.warn_unused()
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"config.json asks for {config.num_heads} query heads over {config.num_kv_heads} KV "
            "heads; the first must be a multiple of the second."
        )
    if config.rotary_dim % 2 or not 2 <= config.rotary_dim <= config.head_dim:
        raise UserError(
            f"config.json rotates {config.rotary_dim} of {config.head_dim} channels; it must be an "
            "even number up to head_dim."
        )
    if config.rope_theta <= 1:
        raise UserError(f"config.json's rope_theta must be above 1, not {config.rope_theta}.")
    return check_scaling(config)


def _refuse_quantized(raw: Mapping[str, Any]) -> None:
    for field in ("quantization_config", "compression_config"):
        if raw.get(field):
            block = raw[field] if isinstance(raw[field], Mapping) else {}
            method = block.get("quant_method") or field
            raise UserError(
                f"config.json says {method}, a quantized checkpoint, which is not supported; use "
                "the model's release in bfloat16, float16 or float32."
            )


def refuse_gguf(path: str) -> None:
    """Refuses a GGUF file, and a folder that holds one instead of a config.json.

    Raises:
      UserError: says how to convert it.
    """
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        files = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    else:
        files = [path]
    for file in files:
        if file.endswith(".gguf"):
            raise UserError(
                f"{file} is a GGUF file; convert it with `lsjax-convert --input_dir {file} "
                f"--output_dir {file.removesuffix('.gguf')}`, and give that folder."
            )


def read_raw_config(file: str) -> Any:
    """Reads the JSON of a config.json.

    Raises:
      UserError: the file is missing, or no JSON.
    """
    try:
        return read_json(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a model folder holds config.json.") from None


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Reads a config.json, given its path or its model folder.

    Raises:
      UserError: the file is missing or invalid.
    """
    path = os.fspath(path)
    refuse_gguf(path)
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    raw = read_raw_config(file)
    try:
        return parse_config(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
