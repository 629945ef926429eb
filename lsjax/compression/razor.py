"""What is compressed: settings, and the heads that they choose."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lsjax.cache import Parts, WindowSpec
from lsjax.compression.reach import reaches
from lsjax.compression.scores import HEAD_FILE, HeadScores, read_bounds, read_scores
from lsjax.config import ModelConfig
from lsjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Razor:
    """Settings of RazorAttention; the defaults are the paper's (arXiv 2407.15891).

    On a model axis every device has as many heads of a layer that keep everything; where those
    chosen do not come out even, others keep everything as well.

    With ALiBi a head's reach follows from its slope and its weights. Each keeps what is within it,
    and `epsilon` is all there is to set; it means nothing elsewhere.

    Attributes:
      induction: share of the model's KV heads that keep everything for their induction score.
      echo: the same, for their echo score.
      sinks: first tokens that every head keeps.
      window: last tokens that it keeps, at least,
      window_share: and at least this share of the prompt that there is room for.
      epsilon: with ALiBi, the weight that a head's dropped tokens have together at most.
      streaming: compress a prompt as it comes, chunk by chunk through all layers. No layer is ever
        whole; but tokens of the prompt see less than they would, so that answers are approximate,
        and depend on the chunk.
      heads: file of the head scores; None for retrieval_heads.json in the model's folder.
    """

    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    window: int = 4000
    window_share: float = 0.2
    epsilon: float = 1e-4
    streaming: bool = False
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class Compression:
    """A model's compression, settled.

    Attributes:
      razor: the settings.
      order: of each layer, its KV heads in the order that they are run in: on each shard those
        that reach farthest come first.
      reach: of each layer, for each of a shard's heads in that order, how many of the last tokens
        it keeps: math.inf for all, 0 for a window and a compensation token.
      shards: devices along the model axis.
    """

    razor: Razor
    order: tuple[tuple[int, ...], ...]
    reach: tuple[tuple[float, ...], ...]
    shards: int

    def parts(self, room: int) -> tuple[Parts, ...]:
        """Of each layer, what its heads keep of prompts of up to `room` tokens, and of answers."""
        return tuple(self._parts(reach, room) for reach in self.reach)

    def kept(self, room: int) -> int:
        """KV heads of the model that keep everything of such prompts."""
        return sum(parts.whole for parts in self.parts(room)) * self.shards

    def _parts(self, reach: tuple[float, ...], room: int) -> Parts:
        whole = sum(tokens >= room for tokens in reach)
        windows, rest = [], reach[whole:]
        while rest:
            # Those together that keep at most twice what they would apart.
            count = sum(2 * tokens >= rest[0] for tokens in rest)
            windows.append((count, self._window(rest[0], room)))
            rest = rest[count:]
        return Parts(whole, tuple(windows))

    def _window(self, reach: float, room: int) -> WindowSpec:
        if reach:
            return WindowSpec(0, int(reach), compensates=False)
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
    _check_goes_with(razor, config)
    path = razor.heads or os.path.join(folder, HEAD_FILE)
    if config.alibi:
        reach = reaches(config, read_bounds(path, config), razor.epsilon)
    else:
        scores = read_scores(path, config)
        wanted = choose(scores, config.num_kv_heads, razor.induction, razor.echo)
        reach = np.where(wanted, math.inf, 0)
    return _arranged(razor, reach, shards)


def assumed(razor: Razor, config: ModelConfig, shards: int) -> Compression:
    """The compression of a model whose folder is not at hand: its heads spread evenly.

    Arguments and errors are those of `compression_of`, and the file of heads is read if the
    settings name it.
    """
    if razor.heads:
        return compression_of(razor, "", config, shards)
    check_compresses(config)
    _check_goes_with(razor, config)
    if config.alibi:
        raise UserError(
            "how far the heads of a model with ALiBi reach follows from its weights; name the file "
            f'that scripts/find_retrieval_heads.py writes, as in {{"heads": "{HEAD_FILE}"}}.'
        )
    layers, heads = config.num_layers, config.num_kv_heads
    count = sum(_count(share, layers * heads) for share in (razor.induction, razor.echo))
    wanted = np.zeros((heads, layers), bool)
    wanted.flat[:count] = True
    return _arranged(razor, np.where(wanted.T, math.inf, 0), shards)


def check_compresses(config: ModelConfig) -> None:
    """Refuses a model that is not compressed so.

    Raises:
      UserError: says why.
    """
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


def _arranged(razor: Razor, reach: np.ndarray, shards: int) -> Compression:
    """With [layers, kv_heads] how far heads reach.

    Heads are dealt out to the shards by their reach; those that have the same place on different
    shards all keep what one of them needs.
    """
    ranked = np.argsort(-reach, axis=1, kind="stable")
    dealt = ranked.reshape(len(reach), -1, shards)  # [layers, place, shard]
    farthest = np.take_along_axis(reach, ranked, axis=1).reshape(dealt.shape).max(axis=-1)
    order = dealt.swapaxes(1, 2).reshape(reach.shape)
    return Compression(
        razor, tuple(map(tuple, order.tolist())), tuple(map(tuple, farthest.tolist())), shards
    )


def _check_goes_with(razor: Razor, config: ModelConfig) -> None:
    """Refuses settings that mean nothing for the model."""
    others = {"induction", "echo", "sinks", "window", "window_share"}
    for field in dataclasses.fields(Razor):
        if getattr(razor, field.name) == field.default:
            continue
        if config.alibi and field.name in others:
            raise UserError(
                f"kv_compression: {field.name} goes with rotary positions; with ALiBi a head keeps "
                "what is within its reach, which epsilon sets."
            )
        if not config.alibi and field.name == "epsilon":
            raise UserError(
                "kv_compression: epsilon goes with ALiBi; with rotary positions set window and "
                "window_share."
            )


def _check(razor: Razor) -> None:
    for name in ("induction", "echo", "window_share"):
        share = getattr(razor, name)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"kv_compression: {name} is a share from 0 to 1, not {share!r}.")
    epsilon = razor.epsilon
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise UserError(f"kv_compression: epsilon is between 0 and 1, not {epsilon!r}.")
    for name, least in (("sinks", 0), ("window", 1)):
        count = getattr(razor, name)
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise UserError(
                f"kv_compression: {name} is a number of tokens from {least}, not {count!r}."
            )
    if not isinstance(razor.streaming, bool):
        raise UserError(f"kv_compression: streaming is true or false, not {razor.streaming!r}.")
    if razor.heads is not None and not isinstance(razor.heads, str):
        raise UserError(f"kv_compression: heads names a file, not {razor.heads!r}.")
