"""Reads generation_config.json: end-of-answer tokens and the publisher's sampling settings."""

import os
from collections.abc import Mapping
from typing import Any

from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import read_json

NAME = "generation_config.json"
# Fields that would change which token is chosen, each with the value that has no effect.
_NEUTRAL = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "epsilon_cutoff": 0,
    "eta_cutoff": 0, "exponential_decay_length_penalty": None, "force_words_ids": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1,
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "penalty_alpha": 0, "sequence_bias": None, "stop_strings": None, "suppress_tokens": None,
    "top_h": None, "typical_p": 1, "watermarking_config": None,
}  # fmt: skip


def read_generation_config(folder: str) -> dict[str, Any]:
    """Returns the JSON object in a model folder's generation_config.json, {} if there is no file.

    Raises:
      UserError: the file cannot be read or does not hold a JSON object.
    """
    file = os.path.join(folder, NAME)
    try:
        found = read_json(file)
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(found).__name__}.")
    return found


def eos_token_ids(raw: Mapping[str, Any], file: str) -> tuple[int, ...]:
    """Returns the token ids that end an answer.

    Args:
      raw: the JSON object in `file`.
      file: name of the file, for error messages.

    Raises:
      UserError: a value is not a token id.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(
            f"{file} field 'eos_token_id' must be a token id or a list of them, not {value!r}."
        )
    return tuple(ids)


def unapplied(raw: Mapping[str, Any]) -> list[str]:
    """Returns the fields that would change answers but are not applied here."""
    return [
        name
        for name, neutral in _NEUTRAL.items()
        if raw.get(name) is not None and raw[name] != neutral
    ]
