"""Parses `rope_scaling` of Hugging Face's config.json into RopeScaling.

Both spellings of the kind (`type`, `rope_type`) and both formats are read: the `rope_scaling`
block of transformers 4 and the `rope_parameters` block of transformers 5.
"""

import dataclasses
import json
import numbers
from collections.abc import Mapping
from typing import Any

from lsjax.config import ModelConfig, RopeScaling
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note

# For each kind: field of the JSON block -> (field of RopeScaling, whether it is required).
_FACTOR = {"factor": ("factor", True)}
KINDS: dict[str, dict[str, tuple[str, bool]]] = {
    "default": {},
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "yarn": _FACTOR
    | {
        "original_max_position_embeddings": ("original_length", False),
        "attention_factor": ("attention_factor", False),
        "beta_fast": ("beta_fast", False),
        "beta_slow": ("beta_slow", False),
        "mscale": ("mscale", False),
        "mscale_all_dim": ("mscale_all_dim", False),
        "truncate": ("truncate", False),
    },
    "ntk": _FACTOR,
    "longrope": {
        "short_factor": ("short_factor", True),
        "long_factor": ("long_factor", True),
        "original_max_position_embeddings": ("original_length", False),
        "attention_factor": ("attention_factor", False),
        "factor": ("factor", False),
    },
    "llama3": _FACTOR
    | {
        "original_max_position_embeddings": ("original_length", True),
        "low_freq_factor": ("low_freq_factor", True),
        "high_freq_factor": ("high_freq_factor", True),
    },
    "dual_chunk": {
        "chunk_size": ("chunk_size", True),
        "local_size": ("local_size", True),
        "original_max_position_embeddings": ("original_length", False),
    },
}
# Fields read elsewhere: they determine what is rotated, not how it is scaled.
_SHARED = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
# Fields for which transformers writes null if they are not set.
_NULLABLE = ("attention_factor", "mscale", "mscale_all_dim")
_AT_LEAST_ONE = ("factor", "original_max_position_embeddings")
_TOKENS = ("chunk_size", "local_size")


def is_positive(value: Any) -> bool:
    """Returns whether a value is a number above 0 and at most 1e12; JSON may hold 1e999 and NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value <= 1e12


def parse_rope_scaling(
    block: Mapping[str, Any] | None, max_position_embeddings: int
) -> RopeScaling:
    """Parses a `rope_scaling` (or `rope_parameters`) block.

    Args:
      block: the parsed JSON object; None or {} means no scaling.
      max_position_embeddings: default for original_max_position_embeddings in a yarn or longrope
        block, as in transformers.

    Raises:
      UserError: a kind is unknown, a field is missing or null, or a value is invalid.
    """
    if block is None:
        return RopeScaling()
    if not isinstance(block, Mapping):
        raise UserError(
            f"rope_scaling must be a JSON object such as "
            f'{{"rope_type": "yarn", "factor": 4.0}} or null, not {block!r}.'
        )
    kind = _kind(block)
    fields = KINDS[kind]
    nested = [name for name, value in block.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"rope_scaling has a block of its own for {', '.join(nested)}, which is not supported; "
            "one block for all layers is."
        )
    unread = sorted(set(block) - set(fields) - set(_SHARED))
    if unread:
        note(f"rope_scaling of kind {kind!r} does not use {', '.join(unread)}: it has no effect.")
    values: dict[str, Any] = {}
    if kind == "dual_chunk" and block.get("original_max_position_embeddings") in (0, None):
        fields = {name: fields[name] for name in _TOKENS}  # 0 and null mean the same as no field
    for name, (target, required) in fields.items():
        if name not in block or (block[name] is None and name in _NULLABLE):
            if required:
                raise UserError(
                    f"rope_scaling of kind {kind!r} needs the field {name!r}; its fields are "
                    f"{', '.join(fields)}."
                )
            continue
        values[target] = _check(kind, name, block[name])
    if "original_length" in values:
        values["original_length"] = int(values["original_length"])
    elif kind in ("yarn", "longrope"):
        values["original_length"] = max_position_embeddings
    if kind == "longrope":
        values.setdefault("factor", max_position_embeddings / values["original_length"])
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(
            "rope_scaling of kind 'llama3' needs high_freq_factor greater than low_freq_factor, "
            f"not {values['high_freq_factor']} and {values['low_freq_factor']}."
        )
    if kind == "dual_chunk" and values["local_size"] >= values["chunk_size"]:
        raise UserError(
            "dual chunk attention needs a local_size below its chunk_size, not "
            f"{values['local_size']} and {values['chunk_size']}."
        )
    _warn_of_contradiction(kind, values, max_position_embeddings)
    return RopeScaling(kind=kind, **values)


def _warn_of_contradiction(kind: str, values: Mapping[str, Any], max_position_embeddings: int):
    """Notes that the lengths imply a factor other than the given one.

    Equal lengths imply nothing: yarn is usually written so. llama3's factor stretches wavelengths,
    not the length.
    """
    if kind not in ("yarn", "longrope"):
        return
    implied = max_position_embeddings / values["original_length"]
    if implied != 1 and abs(implied / values["factor"] - 1) > 1e-3:
        note(
            f"rope_scaling's factor {values['factor']:g} is used, though max_position_embeddings "
            f"{max_position_embeddings} / original_max_position_embeddings "
            f"{values['original_length']} = {implied:g} says another."
        )


def override_rope_scaling(
    config: ModelConfig, rope_scaling: str | Mapping[str, Any] | None
) -> ModelConfig:
    """Returns the model configuration with the RoPE scaling that a user asks for.

    Args:
      config: model configuration from config.json.
      rope_scaling: an object as in config.json; its JSON; "off" for no scaling; "auto" for the
        scaling that each request's length needs (if config.json has a scaling, that one is kept);
        or None to keep config.json's.

    Raises:
      UserError: the block is invalid (see parse_rope_scaling and check_scaling), the text is
        neither JSON nor one of these words, rope_theta is not above 1, or the model has ALiBi.
    """
    if rope_scaling is None:
        return config
    if config.alibi:
        raise UserError(
            f"{config.architecture} has ALiBi, which nothing scales: leave rope_scaling out; "
            "allow_untrained_length runs past the trained length."
        )
    if rope_scaling == "auto":
        if config.rope_scaling.kind not in ("default", "auto"):
            kind = config.rope_scaling.kind
            note(f"rope_scaling auto changes nothing: config.json has {kind}, which is kept.")
            return config
        return dataclasses.replace(config, rope_scaling=RopeScaling(kind="auto"))
    if isinstance(rope_scaling, str):
        rope_scaling = {} if rope_scaling == "off" else parse_json(rope_scaling)
    scaling = parse_rope_scaling(rope_scaling, config.max_position_embeddings)
    if config.rope_scaling.kind == "dual_chunk" != scaling.kind:
        # What config.json calls the longest sequence is served by dual chunk attention alone.
        config = dataclasses.replace(config, max_position_embeddings=config.trained_length)
        scaling = parse_rope_scaling(rope_scaling, config.max_position_embeddings)
    theta = rope_scaling.get("rope_theta") if rope_scaling else None
    theta = config.rope_theta if theta is None else _check(scaling.kind, "rope_theta", theta)
    if theta <= 1:
        raise UserError(f"rope_scaling field 'rope_theta' must be above 1, not {theta}.")
    return check_scaling(dataclasses.replace(config, rope_scaling=scaling, rope_theta=theta))


def with_dual_chunk(config: ModelConfig, block: Mapping[str, Any] | None) -> ModelConfig:
    """Returns the configuration with the dual chunk attention of config.json, if it has any.

    Args:
      config: model configuration without it.
      block: the file's dual_chunk_attention_config, or None.

    Raises:
      UserError: a field is missing or invalid, or the model's positions are others than rotations
        by its trained frequencies.
    """
    if block is None:
        return config
    kind = "ALiBi" if config.alibi else config.rope_scaling.kind
    if kind != "default":
        raise UserError(
            f"config.json sets dual_chunk_attention_config beside {kind}; dual chunk attention "
            "keeps distances within those that the model was trained for, so that nothing is left "
            "to scale: leave one of the two out."
        )
    block = {**block, "rope_type": "dual_chunk"}
    scaling = parse_rope_scaling(block, config.max_position_embeddings)
    return dataclasses.replace(config, rope_scaling=scaling)


def check_scaling(config: ModelConfig) -> ModelConfig:
    """Checks that the layers of a model can be scaled as its rope_scaling says.

    Returns:
      The configuration, unchanged.

    Raises:
      UserError: a list of longrope has another length than one factor per pair of rotated channels,
        or the model has sliding windows and dual chunk attention.
    """
    scaling = config.rope_scaling
    if scaling.kind == "dual_chunk" and any(config.windows):
        raise UserError(
            "dual chunk attention does not go with sliding windows, which see no earlier chunk; "
            'use rope_scaling "off", or a model without windows.'
        )
    if scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            found, pairs = len(getattr(scaling, name)), config.rotary_dim // 2
            if found != pairs:
                raise UserError(
                    f"rope_scaling field {name!r} must hold {pairs} numbers, one for each pair of "
                    f"rotated channels, not {found}."
                )
    return config


def parse_json(text: str) -> Any:
    """Parses a rope_scaling given as JSON.

    Raises:
      UserError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(
            f"rope_scaling {text!r} is neither 'off', 'auto' nor JSON ({error}); write it as in "
            'config.json: {"rope_type": "yarn", "factor": 4.0}.'
        ) from None


def _kind(block: Mapping[str, Any]) -> str:
    given = {name: block[name] for name in ("rope_type", "type") if name in block}
    if len(given) == 2 and given["rope_type"] != given["type"]:
        raise UserError(
            f"rope_scaling names two kinds: rope_type is {given['rope_type']!r} but type is "
            f"{given['type']!r}; keep one of them."
        )
    if not given:
        # In transformers 5 the block of an unscaled model may hold only rope_theta.
        if set(block) <= set(_SHARED):
            return "default"
        raise UserError(
            f"rope_scaling does not say its kind: add the field 'rope_type', one of "
            f"{', '.join(KINDS)}."
        )
    kind = next(iter(given.values()))
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"rope_scaling of kind {kind!r} is not known; use one of {', '.join(KINDS)}."
        )
    return kind


def _check(kind: str, name: str, value: Any) -> Any:
    if name == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"rope_scaling field 'truncate' must be true or false, not {value!r}.")
        return value
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list) or not value or not all(map(is_positive, value)):
            raise UserError(f"rope_scaling field {name!r} must be a list of numbers above 0.")
        return tuple(map(float, value))
    if not is_positive(value):
        raise UserError(
            f"rope_scaling of kind {kind!r}: the field {name!r} must be a number above 0 (and at "
            f"most 1e12), not {value!r}."
        )
    if name in _AT_LEAST_ONE and value < 1:
        raise UserError(f"rope_scaling field {name!r} must be at least 1, not {value!r}.")
    if name in _TOKENS:
        if value != int(value):
            raise UserError(f"rope_scaling field {name!r} is a number of tokens, not {value!r}.")
        return int(value)
    return float(value)
