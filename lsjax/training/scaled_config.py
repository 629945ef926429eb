"""A config.json with the rope scaling that a model was trained with."""

from collections.abc import Mapping
from typing import Any

from lsjax.config import ModelConfig
from lsjax.families import parse_config
from lsjax.positions.scaling import override_rope_scaling, parse_json
from lsjax.runtime.errors import UserError

# Keys that transformers 5 keeps inside the RoPE block, and transformers 4 beside it.
_BESIDE = ("rope_theta", "partial_rotary_factor")


def scaled_config(
    hf_config: Mapping[str, Any], rope_scaling: str | None
) -> tuple[dict[str, Any], ModelConfig]:
    """Returns the config.json to export, and the model configuration that it describes.

    Args:
      hf_config: the object in config.json.
      rope_scaling: JSON as in config.json, "off", or None to keep the scaling of hf_config.

    Raises:
      UserError: rope_scaling is invalid or "auto", or this config.json cannot express it.
    """
    config = parse_config(hf_config)
    wanted = override_rope_scaling(config, rope_scaling)
    if rope_scaling is None:
        return dict(hf_config), wanted
    if rope_scaling == "auto":
        raise UserError(
            "rope_scaling auto chooses for each request, and a model is trained with one scaling; "
            'say which, as in {"rope_type": "yarn", "factor": 4.0}.'
        )
    block = {} if rope_scaling == "off" else parse_json(rope_scaling)
    hf_config = {k: v for k, v in hf_config.items() if k != "dual_chunk_attention_config"}
    if wanted.max_position_embeddings != config.max_position_embeddings:
        hf_config["max_position_embeddings"] = wanted.max_position_embeddings
    if hf_config.get("rope_parameters"):  # transformers 5
        kept = {k: v for k, v in hf_config["rope_parameters"].items() if k in _BESIDE}
        said = {**kept, **(block or {"rope_type": "default"}), "rope_theta": wanted.rope_theta}
        others = {k: v for k, v in hf_config.items() if k != "rope_scaling"}
        scaled = {**others, "rope_parameters": said}
    else:
        said = {k: v for k, v in block.items() if k not in _BESIDE} or None
        scaled = {**hf_config, "rope_scaling": said}
        if wanted.rope_theta != config.rope_theta:
            scaled["rope_theta"] = wanted.rope_theta
    if parse_config(scaled) != wanted:
        raise UserError(
            f"a config.json of {wanted.architecture} cannot express rope_scaling {rope_scaling}; "
            "leave it out."
        )
    return scaled, wanted
