"""The KV cache: a pytree of one entry a layer, float or int8, sharded over the sequence.

Keys stand in it as they are attended to, already rotated. What is read is what was written: in
int8 a chunk's own keys are attended to in int8 too, so that an answer does not depend on where
the prompt was cut into chunks.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig

CACHE_DTYPES = ("float32", "bfloat16", "int8")


@flax.struct.dataclass
class Store:
    """Keys or values of one layer.

    Attributes:
      data: [batch, kv_heads, capacity, head_dim], float or int8.
      scale: [batch, kv_heads, capacity] float32 for int8: a value is data * scale. None for float.
    """

    data: jax.Array
    scale: jax.Array | None

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    def encode(self, x: jax.Array) -> "Store":
        """[batch, kv_heads, length, head_dim] floats in this store's format."""
        if self.scale is None:
            return Store(data=x.astype(self.data.dtype), scale=None)
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
        steps = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
        return Store(data=steps.astype(jnp.int8), scale=scale)

    def block(self, start: jax.Array, size: int) -> "Store":
        """Positions start .. start + size - 1."""
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=2), self)


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer."""

    k: Store
    v: Store


KVCache = tuple[LayerCache, ...]


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Everything that decides a cache's size.

    Attributes:
      batch: rows.
      capacity: tokens that a row can hold.
      dtype: one of CACHE_DTYPES.
    """

    batch: int
    capacity: int
    dtype: str

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of the whole cache, over all devices."""
        per_head = config.head_dim * jnp.dtype(self.dtype).itemsize
        per_head += 4 if self.dtype == "int8" else 0
        heads = 2 * config.num_layers * config.num_kv_heads
        return heads * self.batch * self.capacity * per_head


def empty_cache(config: ModelConfig, spec: CacheSpec) -> KVCache:
    """A cache of zeros; to be called under jit with the cache's shardings as out_shardings."""
    shape = (spec.batch, config.num_kv_heads, spec.capacity, config.head_dim)

    def store() -> Store:
        scale = jnp.zeros(shape[:-1], jnp.float32) if spec.dtype == "int8" else None
        return Store(data=jnp.zeros(shape, spec.dtype), scale=scale)

    return tuple(LayerCache(k=store(), v=store()) for _ in range(config.num_layers))


def write(store: Store, x: jax.Array, positions: jax.Array, first: jax.Array) -> Store:
    """Writes new keys or values into this device's shard of a layer.

    Args:
      store: the shard; it holds global positions first .. first + capacity - 1.
      x: [batch, kv_heads, length, head_dim] floats.
      positions: [batch, length] global positions, consecutive along the length. Several tokens
        stand at the same positions in every row (a prefill chunk); a single one may stand at a
        different position in each (decode).
      first: global position of the shard's first slot.

    Returns:
      The store with those of the positions written that it holds.
    """
    new, start = store.encode(x), positions[:, 0] - first
    if x.shape[2] > 1:
        return jax.tree.map(lambda old, n: _write_run(old, n, start[0], axis=2), store, new)
    return jax.tree.map(
        lambda old, n: jax.vmap(lambda o, m, s: _write_run(o, m, s, axis=1))(old, n, start),
        store,
        new,
    )


def _write_run(old: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """Writes `new` at start .. along `axis`, leaving out what falls outside `old`.

    A slice of a fixed size is read, changed and put back, since the run may straddle the shard.
    """
    size, room = new.shape[axis], old.shape[axis]
    window = min(size, room)
    at = jnp.clip(start, 0, room - window)
    held = jax.lax.dynamic_slice_in_dim(old, at, window, axis)
    # Slot at + j takes new[at + j - start]: a shift of `new`, whose edges are discarded below.
    index = at + jnp.arange(window) - start
    taken = jnp.take(new, jnp.clip(index, 0, size - 1), axis=axis)
    inside = (index >= 0) & (index < size)
    inside = inside.reshape([-1 if i == axis else 1 for i in range(old.ndim)])
    return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(inside, taken, held), at, axis)
