"""RazorAttention: its settings, and the choice of the heads that keep all tokens."""

import dataclasses
import hashlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.cache import (
    CacheSpec,
    HeadGroups,
    HeadSplit,
    KVCache,
    LayerCache,
    RecurrentState,
    WindowSpec,
    compress,
    empty_entry,
)
from lsjax.compression.alibi_span import alibi_spans
from lsjax.compression.policy import Compression, check_no_windows, check_tokens, has_type
from lsjax.compression.reorder_heads import moved_channels, query_heads, reorder_heads
from lsjax.compression.scores import HEAD_FILE, HeadScores, read_bounds, read_scores
from lsjax.config import LayerKind, ModelConfig
from lsjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class RazorConfig:
    """Settings of RazorAttention; the defaults are the paper's (arXiv 2407.15891).

    They concern the layers of attention. Recurrent layers keep their state.

    With a model axis, every device has the same number of heads per layer that keep all tokens. If
    the chosen heads do not divide evenly, more heads keep all tokens.

    With ALiBi a head's span follows from its slope and its weights. Each head keeps the tokens
    within its span, which `epsilon` sets; induction, echo, sinks, window and window_share do not
    apply.

    Attributes:
      induction: share of the KV heads that keep all tokens because of their induction score.
      echo: share of the KV heads that keep all tokens because of their echo score.
      sinks: number of first tokens that every head keeps.
      window: minimum number of last tokens that every head keeps.
      window_share: minimum share of the prompt capacity that the window covers.
      epsilon: largest total attention weight of the tokens that a head drops (ALiBi only).
      streaming: whether to compress a prompt during prefill, chunk by chunk through all layers. No
        layer's full cache is then in memory, but tokens of the prompt see fewer keys, so outputs
        are approximate and depend on the chunk size.
      heads: file of head scores; None for retrieval_heads.json in the model folder.
    """

    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    window: int = 4000
    window_share: float = 0.2
    epsilon: float = 1e-4
    streaming: bool = False
    heads: str | None = None

    def check(self) -> None:
        """Refuses settings out of range with a UserError."""
        for name in ("induction", "echo", "window_share"):
            share = getattr(self, name)
            if not has_type(share, (int, float)) or not 0 <= share <= 1:
                raise UserError(f"kv_compression: {name} is a share from 0 to 1, not {share!r}.")
        epsilon = self.epsilon
        if not has_type(epsilon, (int, float)) or not 0 < epsilon < 1:
            raise UserError(f"kv_compression: epsilon is between 0 and 1, not {epsilon!r}.")
        check_tokens("sinks", self.sinks, 0)
        check_tokens("window", self.window, 1)
        if not isinstance(self.streaming, bool):
            raise UserError(f"kv_compression: streaming is true or false, not {self.streaming!r}.")
        if self.heads is not None and not isinstance(self.heads, str):
            raise UserError(f"kv_compression: heads names a file, not {self.heads!r}.")

    def resolve(self, folder: str, config: ModelConfig, shards: int) -> "RazorAttention":
        """Chooses how much each head keeps, from the model's head scores (ALiBi: score bounds).

        Args:
          folder: model folder.
          config: model configuration.
          shards: number of devices on the model axis, which must divide the KV heads.

        Raises:
          UserError: the file of head scores is missing, damaged or another model's; or the model
            does not support RazorAttention or one of the settings.
        """
        check_no_windows("razor", config)
        _check_goes_with(self, config)
        path = self.heads or os.path.join(folder, HEAD_FILE)
        if config.alibi:
            alibi_span = alibi_spans(config, read_bounds(path, config), self.epsilon)
        else:
            scores = read_scores(path, config)
            wanted = choose(scores, config.num_kv_heads, self.induction, self.echo)
            alibi_span = np.where(wanted, math.inf, 0)
        return _arranged(self, config, alibi_span, shards)

    def estimate(self, config: ModelConfig, shards: int) -> "RazorAttention":
        """Spreads the heads that keep everything over the layers, for want of a model folder.

        If the settings name a file of head scores, it is used instead. ALiBi models need such a
        file. Errors are as in `resolve`.
        """
        if self.heads:
            return self.resolve("", config, shards)
        check_no_windows("razor", config)
        _check_goes_with(self, config)
        if config.alibi:
            raise UserError(
                "how far the heads of a model with ALiBi reach follows from its weights; name the "
                'file that scripts/find_retrieval_heads.py writes, as in {"heads": '
                f'"{HEAD_FILE}"}}.'
            )
        layers, heads = len(config.attention_layers), config.num_kv_heads
        count = sum(_count(share, layers * heads) for share in (self.induction, self.echo))
        wanted = np.zeros((heads, layers), bool)
        wanted.flat[:count] = True
        return _arranged(self, config, np.where(wanted.T, math.inf, 0), shards)


@dataclasses.dataclass(frozen=True)
class RazorAttention(Compression):
    """The resolved compression of a model.

    Attributes:
      razor: settings.
      order: for each layer, its KV heads in the order in which the model runs them; on each shard
        the heads with the longest span come first.
      alibi_span: for each layer and each head of a shard, in that order, the number of last tokens
        that it keeps: math.inf for all tokens, 0 for a window and a compensation token. A
        recurrent layer has no heads, here and in `order`.
      shards: number of devices on the model axis.
    """

    razor: RazorConfig
    order: tuple[tuple[int, ...], ...]
    alibi_span: tuple[tuple[float, ...], ...]
    shards: int

    reorders_heads = True

    @property
    def by_layer(self) -> bool:
        return not self.razor.streaming

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.razor)

    def empty_cache(self, config: ModelConfig, spec: CacheSpec, platform: str) -> KVCache:
        lengths = jax.ShapeDtypeStruct((spec.batch,), "int32")

        def empty(kind: LayerKind, split: HeadSplit) -> HeadGroups | RecurrentState:
            if kind.recurrence:
                return empty_entry(config, spec, platform, kind)
            whole = jax.eval_shape(lambda: empty_entry(config, spec, platform, kind))
            shapes = jax.eval_shape(lambda c, n: self.compress(c, n, split), whole, lengths)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        splits = [self.split(i, spec.prompt_capacity) for i in range(config.num_layers)]
        kinds = list(zip(config.layers, splits, strict=True))
        layers = {kind: empty(*kind) for kind in set(kinds)}
        return tuple(layers[kind] for kind in kinds)

    def compress(self, cache: LayerCache, lengths: jax.Array, split: HeadSplit) -> HeadGroups:
        return compress(cache, lengths, split, self.shards)

    def split(self, layer: int, prompt_capacity: int) -> HeadSplit:
        alibi_span = self.alibi_span[layer]
        whole = sum(tokens >= prompt_capacity for tokens in alibi_span)
        windows, rest = [], alibi_span[whole:]
        while rest:
            # Heads share a group if none of them keeps more than twice its own span.
            count = sum(2 * tokens >= rest[0] for tokens in rest)
            windows.append((count, self._window(rest[0], prompt_capacity)))
            rest = rest[count:]
        return HeadSplit(whole, tuple(windows))

    def head_order(self, layer: int) -> tuple[int, ...]:
        return self.order[layer]

    @property
    def identity(self) -> str:
        r = self.razor
        by_head = [
            [span for _, span in sorted(zip(order, spans * self.shards, strict=True))]
            for order, spans in zip(self.order, self.alibi_span, strict=True)
        ]
        heads = hashlib.sha256(repr(by_head).encode()).hexdigest()[:8]
        return f"razor, {r.sinks}+{r.window} tokens or {r.window_share:g}, heads {heads}"

    def moved_channels(self, config: ModelConfig) -> dict[str, tuple[int, np.ndarray]]:
        return moved_channels(config, self.order)

    def query_heads(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        return query_heads(config, self.order)

    def reorder_heads(self, params: dict, config: ModelConfig) -> dict:
        return reorder_heads(params, config, self.order)

    def summary(self, config: ModelConfig, prompt_capacity: int) -> str:
        splits = [self.split(i, prompt_capacity) for i in range(config.num_layers)]
        full = sum(split.whole for split in splits) * self.shards
        total = sum(map(len, self.order))
        sizes = sorted({spec.slots for split in splits for _, spec in split.windows})
        ends = " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]]))
        rest = f", the others {ends} tokens" if sizes else ""
        return f"{full} KV heads of {total} keep everything{rest}"

    def warning(self, config: ModelConfig) -> str | None:
        if not self.razor.streaming or config.alibi:
            return None
        return (
            "kv_compression streaming is approximate: tokens of the prompt see windows too, and "
            "the answer depends on prefill_chunk"
        )

    def _window(self, alibi_span: float, prompt_capacity: int) -> WindowSpec:
        if alibi_span:
            return WindowSpec(0, int(alibi_span), has_compensation=False)
        r = self.razor
        return WindowSpec(r.sinks, max(r.window, math.ceil(prompt_capacity * r.window_share)))


def choose(scores: HeadScores, kv_heads: int, induction: float, echo: float) -> np.ndarray:
    """Returns [attention layers, kv_heads], whether each KV head keeps all tokens.

    A KV head's score is the highest score of its query heads. For each kind of score, the best KV
    heads of the whole model are chosen; their number is the share times all KV heads, rounded up.
    """
    layers, heads = scores.echo.shape
    chosen = np.zeros(layers * kv_heads, bool)
    for rows, share in ((scores.induction, induction), (scores.echo, echo)):
        best = rows.reshape(layers, kv_heads, heads // kv_heads).max(axis=-1).ravel()
        chosen[np.argsort(-best, kind="stable")[: _count(share, best.size)]] = True
    return chosen.reshape(layers, kv_heads)


def _count(share: float, heads: int) -> int:
    return math.ceil(share * heads - 1e-9)


def _arranged(
    razor: RazorConfig, config: ModelConfig, alibi_span: np.ndarray, shards: int
) -> RazorAttention:
    """Builds the compression from [attention layers, kv_heads] spans of heads.

    Heads are assigned to shards round-robin, by descending span. Heads with the same index on
    different shards all keep the longest span among them.
    """
    ranked = np.argsort(-alibi_span, axis=1, kind="stable")
    dealt = ranked.reshape(len(alibi_span), -1, shards)  # [layers, place, shard]
    farthest = np.take_along_axis(alibi_span, ranked, axis=1).reshape(dealt.shape).max(axis=-1)
    order = dealt.swapaxes(1, 2).reshape(alibi_span.shape)

    def by_layer(rows: np.ndarray) -> tuple[tuple, ...]:
        of_layer = dict(zip(config.attention_layers, map(tuple, rows.tolist()), strict=True))
        return tuple(of_layer.get(i, ()) for i in range(config.num_layers))

    return RazorAttention(razor, by_layer(order), by_layer(farthest), shards)


def _check_goes_with(razor: RazorConfig, config: ModelConfig) -> None:
    """Refuses settings that do not apply to the model."""
    others = {"induction", "echo", "sinks", "window", "window_share"}
    for field in dataclasses.fields(RazorConfig):
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
