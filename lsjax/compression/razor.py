"""What is compressed: settings, and the heads that they choose."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lsjax.cache import WindowSpec
from lsjax.compression.scores import HEAD_FILE, HeadScores, read_scores
from lsjax.config import ModelConfig
from lsjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Razor:
    """Settings of RazorAttention; the defaults are the paper's (arXiv 2407.15891).

    On a model axis every device has as many heads of a layer that keep everything; where those
    chosen do not come out even, others keep everything as well.

    Attributes:
      induction: share of the model's KV heads that keep everything for their induction score.
      echo: the same, for their echo score.
      sinks: first tokens that every head keeps.
      window: last tokens that it keeps, at least,
      window_share: and at least this share of the prompt that there is room for.
      heads: file of the head scores; None for retrieval_heads.json in the model's folder.
    """

    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    window: int = 4000
    window_share: float = 0.2
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class Compression:
    """A model's compression, settled.

    Attributes:
      razor: the settings.
      order: of each layer, its KV heads in the order that they are run in: on each shard those
        that keep everything come first.
      kept: of each layer, how many of each shard's heads keep everything.
      shards: devices along the model axis.
    """

    razor: Razor
    order: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    shards: int

    def window(self, room: int) -> WindowSpec:
        """What the other heads keep of prompts of up to `room` tokens, and of the answers."""
        r = self.razor
        return WindowSpec(r.sinks, max(r.window, math.ceil(room * r.window_share)))


def parse_compression(given: str | Mapping[str, Any] | Razor | None) -> Razor | None:
    """`none`, `razor`, or an object (or its JSON) with the settings of Razor that differ.

    Raises:
      UserError: something else, an unknown setting, or a value out of range.
    """
    if given is None or isinstance(given, Razor) or given == "none":
        razor = None if given == "none" else given
    else:
        if isinstance(given, str) and given.strip().startswith("{"):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise UserError(f"kv_compression {given!r} is not JSON: {error}.") from None
        if given == "razor":
            given = {}
        if not isinstance(given, Mapping):
            raise UserError(
                f"kv_compression {given!r} is not known; use none, razor, or settings as in "
                '{"window": 2000}.'
            )
        known = {f.name for f in dataclasses.fields(Razor)}
        if unknown := sorted(set(given) - known):
            raise UserError(
                f"kv_compression has no setting {unknown[0]!r}; use {', '.join(sorted(known))}."
            )
        razor = Razor(**given)
    if razor is not None:
        _check(razor)
    return razor


def compression_of(razor: Razor, folder: str, config: ModelConfig, shards: int) -> Compression:
    """Settles which heads keep everything.

    Args:
      razor: the settings.
      folder: the model's.
      config: the model.
      shards: devices along the model axis, which divide the KV heads.

    Raises:
      UserError: no scores, another model's, or a model that is not compressed so.
    """
    check_compresses(config)
    path = razor.heads or os.path.join(folder, HEAD_FILE)
    wanted = choose(read_scores(path, config), config.num_kv_heads, razor.induction, razor.echo)
    order, kept = zip(*(_dealt(row, shards) for row in wanted), strict=True)
    return Compression(razor, order, kept, shards)


def assumed(razor: Razor, config: ModelConfig, shards: int) -> Compression:
    """The compression of a model whose head scores are not at hand: its heads spread evenly.

    Arguments and errors are those of `compression_of`.
    """
    check_compresses(config)
    layers, heads = config.num_layers, config.num_kv_heads
    count = sum(_count(share, layers * heads) for share in (razor.induction, razor.echo))
    wanted = np.zeros((heads, layers), bool)
    wanted.flat[:count] = True
    order, kept = zip(*(_dealt(row, shards) for row in wanted.T), strict=True)
    return Compression(razor, order, kept, shards)


def check_compresses(config: ModelConfig) -> None:
    """Refuses a model that is not compressed so.

    Raises:
      UserError: says why.
    """
    if config.alibi:
        raise UserError(
            "kv_compression razor goes with rotary positions: with ALiBi a head's reach follows "
            "from its slope; use kv_compression none."
        )
    if any(config.windows):
        raise UserError(
            "kv_compression razor does not go with sliding windows, whose layers keep no more than "
            "their window sees; use kv_compression none."
        )


def choose(scores: HeadScores, kv_heads: int, induction: float, echo: float) -> np.ndarray:
    """[layers, kv_heads] whether a KV head keeps everything.

    A KV head has the highest score of its query heads; of all KV heads of the model the first by
    either score, as many as the shares say, rounded up.
    """
    layers, heads = scores.echo.shape
    chosen = np.zeros(layers * kv_heads, bool)
    for rows, share in ((scores.induction, induction), (scores.echo, echo)):
        best = rows.reshape(layers, kv_heads, heads // kv_heads).max(axis=-1).ravel()
        chosen[np.argsort(-best, kind="stable")[: _count(share, best.size)]] = True
    return chosen.reshape(layers, kv_heads)


def _count(share: float, heads: int) -> int:
    return math.ceil(share * heads - 1e-9)


def _dealt(wanted: np.ndarray, shards: int) -> tuple[tuple[int, ...], int]:
    """A layer's heads in the order to run them in, and how many of each shard keep everything.

    Those wanted are dealt out to the shards; where they do not come out even, others fill up.
    """
    ranked = np.argsort(~wanted, kind="stable")
    kept = -(-int(wanted.sum()) // shards)
    first, rest = ranked[: kept * shards], ranked[kept * shards :]
    parts = zip(first.reshape(shards, kept), rest.reshape(shards, -1), strict=True)
    return tuple(int(head) for part in parts for piece in part for head in piece), kept


def _check(razor: Razor) -> None:
    for name in ("induction", "echo", "window_share"):
        share = getattr(razor, name)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"kv_compression: {name} is a share from 0 to 1, not {share!r}.")
    for name, least in (("sinks", 0), ("window", 1)):
        count = getattr(razor, name)
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise UserError(
                f"kv_compression: {name} is a number of tokens from {least}, not {count!r}."
            )
    if razor.heads is not None and not isinstance(razor.heads, str):
        raise UserError(f"kv_compression: heads names a file, not {razor.heads!r}.")
