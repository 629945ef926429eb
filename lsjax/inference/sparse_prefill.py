"""How a flag or an argument sets sparse prefill, and what it does not go with."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lsjax.attention.dispatch import HAS_TRITON, on_gpu
from lsjax.attention.sparse.rule import TILE, SparsePrefill
from lsjax.compression.policy import has_type
from lsjax.config import ModelConfig
from lsjax.inference.engine_config import EngineConfig
from lsjax.runtime.errors import UserError

_NUMBER = (int, float)


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
    if not has_type(rule.alpha, _NUMBER) or not 0 <= rule.alpha <= 1:
        raise UserError(f"sparse_prefill: alpha must be from 0 to 1, not {rule.alpha!r}.")
    for name, value in dataclasses.asdict(rule).items():
        if name == "alpha":
            continue
        if not has_type(value, _NUMBER) or value != int(value) or value < 0:
            raise UserError(f"sparse_prefill: {name} must be a number from 0, not {value!r}.")
    return rule


def _of_settings(given: str | float | Mapping[str, Any]) -> SparsePrefill:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise _unknown(given) from None
    if has_type(given, _NUMBER):
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
        f"sparse_prefill {given!r} is not known; use none, a number alpha such as 0.05, or "
        'settings as in {"alpha": 0.05, "first_layers": 2}.'
    )


def check_sparse_prefill(config: ModelConfig, platform: str, settings: EngineConfig) -> None:
    """Refuses what sparse prefill does not go with on a platform: cpu, gpu (or cuda) or tpu.

    Raises:
      UserError: the message names the first reason.
    """
    reason = why_not_sparse(config, platform, settings)
    if reason is None and settings.prefill_chunk % TILE:
        reason = f"chooses for {TILE} queries at once; set prefill_chunk to a multiple of as many"
    elif reason is None and settings.zigzag.piece_length % TILE:
        reason = (
            f"chooses for {TILE} queries at once, which a device must hold; set prefill_chunk to a "
            f"multiple of {2 * TILE} for each device of the context axis"
        )
    if reason:
        raise UserError(f"sparse_prefill {reason}, or leave out sparse_prefill.")


def why_not_sparse(config: ModelConfig, platform: str, settings: EngineConfig) -> str | None:
    """Says why prefill of a model cannot be sparse on a platform; None if it can."""
    if on_gpu(platform) and not HAS_TRITON:
        return "needs a JAX with Pallas' Triton on a GPU, where a loop would be slower than cuDNN"
    if on_gpu(platform) and settings.kv_cache_dtype == "int4":
        return "has no kernel for int4 on a GPU, where a loop would be slower than cuDNN"
    if settings.compression is not None:
        return "does not go with kv_compression, which drops the tokens that it would choose from"
    if config.alibi:
        return "does not go with ALiBi, whose scores depend on distances, which no mean has"
    scaling = config.rope_scaling
    if scaling.kind == "dual_chunk" and (scaling.chunk_size - scaling.local_size) % TILE:
        return (
            f"chooses blocks of {TILE} keys, of which dual chunk attention rotates each as one; "
            f"make chunk_size - local_size a multiple of {TILE}"
        )
    if all(config.attention_windows):
        return "does not go with sliding windows in all layers, which read few keys as it is"
    return None


def tile_multiple(devices: int) -> int:
    """Returns what a prefill chunk is a multiple of on so many devices of the context axis."""
    return TILE if devices == 1 else 2 * TILE * devices
