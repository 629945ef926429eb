"""generation_config.json: where answers end, and how the publisher draws them."""

import os
from collections.abc import Mapping
from typing import Any

from lsjax.errors import UserError
from lsjax.files import read_json
from lsjax.positions.scaling import is_positive
from lsjax.sampling import Sampling

NAME = "generation_config.json"
_DRAWN = ("temperature", "top_k", "top_p", "min_p")
# Fields that would change which token comes, and what each says where it changes nothing.
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
    """The object in a model folder's generation_config.json; {} where there is none.

    Raises:
      UserError: it is not a JSON object.
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
    """The ids that `file`, which holds the object, says end an answer.

    Raises:
      UserError: something that is not an id.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(
            f"{file} field 'eos_token_id' must be a token id or a list of them, not {value!r}."
        )
    return tuple(ids)


def suggested_sampling(raw: Mapping[str, Any]) -> Sampling:
    """How the publisher draws tokens: greedily, where do_sample is not true.

    Raises:
      UserError: a field that is not a number, or out of its range.
    """
    names = (*_DRAWN, "repetition_penalty") if raw.get("do_sample") else ("repetition_penalty",)
    values: dict[str, Any] = {"temperature": 1.0} if raw.get("do_sample") else {}
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        whole = name != "top_k" or isinstance(value, int)
        if not whole or not (is_positive(value) or (value == 0 and not isinstance(value, bool))):
            raise UserError(f"{NAME} field {name!r} must be a number from 0, not {value!r}.")
        values[name] = value if name == "top_k" else float(value)
    try:
        return Sampling(**values)
    except UserError as error:
        raise UserError(f"{NAME}: {error}") from None


def unapplied(raw: Mapping[str, Any]) -> list[str]:
    """Fields that ask for something that is not done here, though it would change answers."""
    return [
        name
        for name, neutral in _NEUTRAL.items()
        if raw.get(name) is not None and raw[name] != neutral
    ]
