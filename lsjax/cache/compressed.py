"""The compressed cache of a layer: a few heads keep all tokens, the others keep a window.

A window head keeps the first tokens, the last tokens, and one compensation token that stands for
all the tokens dropped in between: it has the means of their keys and values, and counts as many
times as there are dropped tokens. With ALiBi a window head keeps only the last tokens, because the
tokens that it drops have next to no weight. Source: RazorAttention (arXiv 2407.15891).
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.cache.kv_cache import LayerCache
from lsjax.cache.store import KVArray
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE, Zigzag


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """The tokens that a window head keeps: the first ones, then a ring buffer of the last ones.

    Attributes:
      sinks: number of first tokens kept.
      last: number of last tokens kept.
      has_compensation: whether a compensation token stands for the dropped tokens.
    """

    sinks: int
    last: int
    has_compensation: bool = True

    @property
    def slots(self) -> int:
        return self.sinks + self.last

    def capacity(self, capacity: int, context: int) -> int:
        """Returns the number of slots to allocate, at most the `capacity` of the full cache.

        Rounded up to a multiple of CAPACITY_MULTIPLE on each of the `context` devices.
        """
        multiple = CAPACITY_MULTIPLE * context
        return min(capacity, -(-self.slots // multiple) * multiple)

    def slot(self, position: jax.Array) -> jax.Array:
        """Returns the slot of a position."""
        behind = self.sinks + (position - self.sinks) % self.last
        return jnp.where(position < self.sinks, position, behind)

    def positions(self, slots: jax.Array, length: jax.Array) -> jax.Array:
        """Returns [..., slots] positions that slots hold after `length` [...] tokens.

        A slot that is still empty gets a position of at least `length`.
        """
        newest = length[..., None] - 1
        rolled = newest - (newest - slots) % self.last
        return jnp.where((slots < self.sinks) | (rolled < self.sinks), slots, rolled)


@flax.struct.dataclass
class CompensationToken:
    """The compensation token of each head, which stands for the tokens that the head has dropped.

    Attributes:
      k, v: [batch, kv_heads, head_dim] float32 means of the dropped keys and values; keys in the
        form that queries attend to.
      count: [batch] number of dropped tokens.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array

    def add(self, k: jax.Array, v: jax.Array, valid: jax.Array) -> "CompensationToken":
        """Adds one dropped token to each row in which `valid` [batch] is true.

        `k` and `v` are [batch, kv_heads, head_dim] float32.
        """
        count = self.count + valid
        share = (valid / jnp.maximum(count, 1))[:, None, None]
        return CompensationToken(
            self.k + share * (k - self.k), self.v + share * (v - self.v), count
        )


@flax.struct.dataclass
class WindowCache:
    """The cache of window heads.

    Attributes:
      k, v: [batch, kv_heads, slots, head_dim]; slots are sharded over the context axis in order,
        not in zigzag order.
      compensation_token: the token that stands for the dropped ones, or None.
      next_evicted: key and value, [batch, kv_heads, head_dim] float32 each, of the token that the
        next token evicts; None if there is no compensation token. They are read after a step's
        write, because XLA copies an array that is read before it is written.
      spec: the window, which says what each slot holds.
    """

    k: KVArray
    v: KVArray
    compensation_token: CompensationToken | None
    next_evicted: tuple[jax.Array, jax.Array] | None
    spec: WindowSpec = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CompressedCache:
    """Keys and values of one layer, with heads in groups.

    On each device of the model axis, heads are in the order of the groups: `whole`, then `windows`.

    Attributes:
      whole: cache of the heads that keep all tokens; None if there are none.
      windows: one cache for each group of heads that share a WindowSpec.
      zigzag: layout of prompt positions along the mesh's context axis.
    """

    whole: LayerCache | None
    windows: tuple[WindowCache, ...]
    zigzag: Zigzag = flax.struct.field(pytree_node=False)

    @property
    def entries(self) -> tuple[LayerCache | WindowCache, ...]:
        """The caches of all head groups, in the order of the heads."""
        return self.windows if self.whole is None else (self.whole, *self.windows)

    def with_entries(self, entries: Sequence[LayerCache | WindowCache]) -> "CompressedCache":
        """Returns the cache with its `entries` replaced."""
        whole, windows = (None, entries) if self.whole is None else (entries[0], entries[1:])
        return self.replace(whole=whole, windows=tuple(windows))


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """Groups of a layer's KV heads by what they keep, per shard and in the order of the heads.

    Attributes:
      whole: number of heads that keep all tokens.
      windows: the number of heads and the window of each other group.
    """

    whole: int
    windows: tuple[tuple[int, WindowSpec], ...]


def compress(
    cache: LayerCache, lengths: jax.Array, parts: HeadGroups, shards: int, zigzag: Zigzag
) -> CompressedCache:
    """Compresses a layer's cache: drops the tokens that window heads do not keep.

    Args:
      cache: full cache of a layer.
      lengths: [batch] number of tokens in each row.
      parts: head groups of each shard.
      shards: number of shards that the heads are split into.
      zigzag: layout of positions in `cache`.
    """
    heads = cache.k.data.shape[1] // shards

    def slice_heads(first: int, count: int, tree):
        def take(x: jax.Array) -> jax.Array:
            apart = x.reshape(x.shape[0], shards, heads, *x.shape[2:])
            return apart[:, :, first : first + count].reshape(x.shape[0], -1, *x.shape[2:])

        return jax.tree.map(take, tree)

    whole = slice_heads(0, parts.whole, cache) if parts.whole else None
    windows, first = [], parts.whole
    for count, spec in parts.windows:
        windows.append(
            _window(*slice_heads(first, count, (cache.k, cache.v)), lengths, zigzag, spec)
        )
        first += count
    return CompressedCache(whole, tuple(windows), zigzag)


def _window(
    k: KVArray, v: KVArray, lengths: jax.Array, zigzag: Zigzag, spec: WindowSpec
) -> WindowCache:
    """Builds the window cache from the full keys and values of its heads."""
    each = k.capacity // zigzag.devices
    slots = jnp.arange(spec.capacity(k.capacity, zigzag.devices))
    at = spec.positions(slots, lengths)  # [batch, slots]
    index = zigzag.device(at) * each + zigzag.num_local_slots_before(zigzag.device(at), at)

    def gather_slots(x: jax.Array) -> jax.Array:
        where = jnp.minimum(index, x.shape[2] - 1).reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, where, axis=2)

    kept_k, kept_v = (jax.tree.map(gather_slots, x) for x in (k, v))
    if not spec.has_compensation:
        return WindowCache(kept_k, kept_v, None, None, spec)
    # The position of each slot, device by device.
    device, slot = jnp.divmod(jnp.arange(k.capacity), each)
    position = zigzag.position(device, slot)
    dropped = (position >= spec.sinks) & (position < lengths[:, None] - spec.last)
    count = jnp.sum(dropped, axis=1)

    def mean(store: KVArray) -> jax.Array:
        total = jnp.sum(jnp.where(dropped[:, None, :, None], store.dequantize(), 0), axis=2)
        return total / jnp.maximum(count, 1)[:, None, None]

    next_evicted = tuple(floats_at(x, spec.slot(lengths)) for x in (kept_k, kept_v))
    return WindowCache(
        kept_k, kept_v, CompensationToken(mean(k), mean(v), count), next_evicted, spec
    )


def floats_at(store: KVArray, slot: jax.Array) -> jax.Array:
    """Returns the dequantized entries at `slot` [batch], [batch, kv_heads, head_dim] float32.

    A row whose slot is outside `store` gets zeros.
    """
    inside = (slot >= 0) & (slot < store.capacity)
    at = jnp.clip(slot, 0, store.capacity - 1)

    def take(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1, axis=1))(x, at)

    found = jax.tree.map(take, store).dequantize()[:, :, 0]
    return jnp.where(inside[:, None, None], found, 0)
