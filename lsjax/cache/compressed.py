"""The cache of a layer whose heads differ in reach: a few keep everything, the rest a window.

A head of short reach keeps the first tokens, the last ones, and one compensation token that stands
for all those dropped between: the means of their keys and values, weighing as much as they are.
Source: RazorAttention (arXiv 2407.15891).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.cache.kv_cache import LayerCache
from lsjax.cache.store import Store
from lsjax.cache.zigzag import GRANULE, Zigzag


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """What a head of short reach keeps: the first tokens, and the last ones in a ring behind them.

    Attributes:
      sinks: tokens kept from the first on.
      last: of the last tokens, how many are kept.
    """

    sinks: int
    last: int

    @property
    def slots(self) -> int:
        return self.sinks + self.last

    def capacity(self, capacity: int, context: int) -> int:
        """Slots that are set up for rows of `capacity` slots in all: never more than those."""
        granule = GRANULE * context
        return min(capacity, -(-self.slots // granule) * granule)

    def slot(self, position: jax.Array) -> jax.Array:
        """Where a position is kept."""
        behind = self.sinks + (position - self.sinks) % self.last
        return jnp.where(position < self.sinks, position, behind)

    def positions(self, slots: jax.Array, length: jax.Array) -> jax.Array:
        """Which of `length` [...] tokens slots keep, [..., slots]; some later one for none yet."""
        newest = length[..., None] - 1
        turned = newest - (newest - slots) % self.last
        return jnp.where((slots < self.sinks) | (turned < self.sinks), slots, turned)


@flax.struct.dataclass
class Dropped:
    """The compensation token of each head: what stands for the tokens that it has dropped.

    Attributes:
      k, v: [batch, kv_heads, head_dim] float32, their means, keys as they are attended to.
      count: [batch] how many they are.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array

    def with_one_more(self, k: jax.Array, v: jax.Array, valid: jax.Array) -> "Dropped":
        """[batch, kv_heads, head_dim] float32 dropped as well, where `valid` [batch] says so."""
        count = self.count + valid
        share = (valid / jnp.maximum(count, 1))[:, None, None]
        return Dropped(self.k + share * (k - self.k), self.v + share * (v - self.v), count)


@flax.struct.dataclass
class WindowCache:
    """What the heads of short reach keep.

    Attributes:
      k, v: [batch, kv_heads, slots, head_dim], dealt out over the context axis slot by slot.
      oldest: keys and values, [batch, kv_heads, head_dim] float32 each, of the token that the next
        one drives out: read after a step's write, since XLA copies a store that is read before it.
      dropped: what stands for the rest.
      spec: which slot keeps what.
    """

    k: Store
    v: Store
    oldest: tuple[jax.Array, jax.Array]
    dropped: Dropped
    spec: WindowSpec = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CompressedCache:
    """Keys and values of one layer; either part is None where no head is of its kind.

    On each device of the model axis the heads that keep everything come first.

    Attributes:
      whole: of the heads that keep everything.
      window: of the others.
    """

    whole: LayerCache | None
    window: WindowCache | None


def compress(
    cache: LayerCache, lengths: jax.Array, kept: int, shards: int, zigzag: Zigzag, spec: WindowSpec
) -> CompressedCache:
    """Drops what the heads of short reach do not keep.

    Args:
      cache: a layer's, with all positions.
      lengths: [batch] tokens of each row.
      kept: how many heads of each shard, the first ones, keep everything.
      shards: parts that the heads lie in.
      zigzag: how positions lie in it.
      spec: what the others keep.
    """
    heads = cache.k.data.shape[1] // shards

    def some(part: slice, tree):
        def take(x: jax.Array) -> jax.Array:
            apart = x.reshape(x.shape[0], shards, heads, *x.shape[2:])[:, :, part]
            return apart.reshape(x.shape[0], -1, *x.shape[2:])

        return jax.tree.map(take, tree)

    whole = some(slice(kept), cache) if kept else None
    if kept == heads:
        return CompressedCache(whole, None)
    k, v = some(slice(kept, None), (cache.k, cache.v))
    each = k.capacity // zigzag.devices
    slots = jnp.arange(spec.capacity(k.capacity, zigzag.devices))
    at = spec.positions(slots, lengths)  # [batch, slots]
    index = zigzag.device(at) * each + zigzag.slots_before(zigzag.device(at), at)
    # Which position lies where, device after device.
    device, slot = jnp.divmod(jnp.arange(k.capacity), each)
    position = zigzag.position(device, slot)
    dropped = (position >= spec.sinks) & (position < lengths[:, None] - spec.last)
    count = jnp.sum(dropped, axis=1)

    def keep(x: jax.Array) -> jax.Array:
        where = jnp.minimum(index, x.shape[2] - 1).reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, where, axis=2)

    def mean(store: Store) -> jax.Array:
        total = jnp.sum(jnp.where(dropped[:, None, :, None], store.floats(), 0), axis=2)
        return total / jnp.maximum(count, 1)[:, None, None]

    dropped_tokens = Dropped(mean(k), mean(v), count)
    k, v = (jax.tree.map(keep, x) for x in (k, v))
    oldest = tuple(floats_at(x, spec.slot(lengths)) for x in (k, v))
    return CompressedCache(whole, WindowCache(k, v, oldest, dropped_tokens, spec))


def floats_at(store: Store, slot: jax.Array) -> jax.Array:
    """[batch, kv_heads, head_dim] float32 in each row's slot; zeros where that is not here."""
    inside = (slot >= 0) & (slot < store.capacity)
    at = jnp.clip(slot, 0, store.capacity - 1)

    def take(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1, axis=1))(x, at)

    found = jax.tree.map(take, store).floats()[:, :, 0]
    return jnp.where(inside[:, None, None], found, 0)
