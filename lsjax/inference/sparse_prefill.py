"""How a flag or an argument sets sparse prefill, and what it does not go with."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lsjax.attention.dispatch import on_gpu
from lsjax.attention.sparse_rule import TILE, SparsePrefill
from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.inference.engine_config import EngineConfig


def parse_sparse_prefill(
    given: str | float | Mapping[str, Any] | SparsePrefill | None,
) -> SparsePrefill | None:
    """Parses `none`, a number alpha, or an object (or its JSON) of settings.

    Raises:
      UserError: the value is something else, or a setting is unknown or out of range.
    """
    if given is None or given == "none":
        return None
    rule = given if isinstance(given, SparsePrefill) else _of_settings(given)
    if not _is_number(rule.alpha) or not 0 <= rule.alpha <= 1:
        raise UserError(f"sparse_prefill: alpha must be from 0 to 1, not {rule.alpha!r}.")
    for name in ("first_layers", "last_tokens", "dense_length"):
        value = getattr(rule, name)
        if not _is_number(value) or value != int(value) or value < 0:
            raise UserError(f"sparse_prefill: {name} must be a number from 0, not {value!r}.")
    return rule


def _of_settings(given: str | float | Mapping[str, Any]) -> SparsePrefill:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise _unknown(given) from None
    if _is_number(given):
        return SparsePrefill(given)
    if not isinstance(given, Mapping) or "alpha" not in given:
        raise _unknown(given)
    known = [f.name for f in dataclasses.fields(SparsePrefill)]
    if unknown := sorted(set(given) - set(known)):
        raise UserError(
            f"sparse_prefill has no setting {unknown[0]!r}; use {', '.join(sorted(known))}."
        )
    return SparsePrefill(**given)


def _unknown(given: Any) -> UserError:
    return UserError(
        f"sparse_prefill {given!r} is not known; use none, a number alpha such as 0.1, or settings "
        'as in {"alpha": 0.1, "first_layers": 2}.'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_sparse_prefill(config: ModelConfig, settings: EngineConfig) -> None:
    """Refuses what sparse prefill does not go with.

    Raises:
      UserError: the message names the first reason.
    """
    reason, platform = None, settings.mesh.devices.flat[0].platform
    if on_gpu(platform):
        reason = "has no kernel for a GPU yet, and a loop would be slower than cuDNN"
    elif settings.compression is not None:
        reason = "does not go with kv_compression, which drops the tokens that it would choose from"
    elif config.alibi:
        reason = "does not go with ALiBi, whose scores depend on distances, which no mean has"
    elif config.rope_scaling.kind == "dual_chunk":
        reason = "does not choose for the several views of dual chunk attention yet"
    elif any(kind.delta_net for kind in config.layers):
        reason = "has not been tested with recurrent layers yet, whose prompts attend in few layers"
    elif all(config.windows):
        reason = "does not go with sliding windows in all layers, which read few keys as it is"
    elif settings.prefill_chunk % TILE:
        reason = f"chooses for {TILE} queries at once; set prefill_chunk to a multiple of as many"
    elif settings.zigzag.piece_length % TILE:
        reason = (
            f"chooses for {TILE} queries at once, which a device must hold; set prefill_chunk to a "
            f"multiple of {2 * TILE} for each device of the context axis"
        )
    if reason:
        raise UserError(f"sparse_prefill {reason}, or leave out sparse_prefill.")


def tile_multiple(devices: int) -> int:
    """Returns what a prefill chunk is a multiple of on so many devices of the context axis."""
    return TILE if devices == 1 else 2 * TILE * devices
