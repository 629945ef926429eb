"""The kinds of KV compression, and how a flag or an argument names one."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lsjax.compression.policy import CompressionSettings
from lsjax.compression.razor import RazorConfig
from lsjax.compression.streaming_llm import StreamingLLM
from lsjax.runtime.errors import UserError

KINDS = {"razor": RazorConfig, "streaming_llm": StreamingLLM}


def parse_compression(
    given: str | Mapping[str, Any] | CompressionSettings | None,
) -> CompressionSettings | None:
    """Parses `none`, a kind, or an object (or its JSON) of a kind and its settings.

    Raises:
      UserError: the value is something else, or has an unknown setting or one out of range.
    """
    if given is None or given == "none":
        return None
    settings = given if isinstance(given, tuple(KINDS.values())) else _of_mapping(given)
    settings.check()
    return settings


def _of_mapping(given: str | Mapping[str, Any]) -> CompressionSettings:
    if isinstance(given, str) and given.strip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UserError(f"kv_compression {given!r} is not JSON: {error}.") from None
    if isinstance(given, str):
        given = {"kind": given}
    if not isinstance(given, Mapping):
        raise _unknown(given)
    settings = dict(given)
    kind = settings.pop("kind", "razor")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _unknown(kind)
    known = {f.name for f in dataclasses.fields(KINDS[kind])}
    if unknown := sorted(set(settings) - known):
        raise UserError(
            f"kv_compression {kind} has no setting {unknown[0]!r}; use {', '.join(sorted(known))}."
        )
    return KINDS[kind](**settings)


def _unknown(given: Any) -> UserError:
    return UserError(
        f"kv_compression {given!r} is not known; use none, {', '.join(KINDS)}, or settings as in "
        '{"kind": "razor", "window": 2000}.'
    )
