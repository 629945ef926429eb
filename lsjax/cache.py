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


# Stands in the int8 data where the vector's largest entry is, which `peak` holds.
_PEAK = -128


@flax.struct.dataclass
class Store:
    """Keys or values of one layer.

    In int8 every entry is a whole number of steps, x = scale * steps. The largest entry of a
    vector may be far from the others (keys have channels like that), and a step fit for it would
    be too coarse for them: so it stands beside the int8 data, in 16 bits, and the step fits the
    rest. That and a 16-bit scale cost 4 bytes a token and head, what a float32 scale alone would.

    Attributes:
      data: [batch, kv_heads, capacity, head_dim], float, or int8 steps with -128 at the peak.
      scale: [batch, kv_heads, capacity] bfloat16 for int8, else None.
      peak: [batch, kv_heads, capacity] int16 steps of the largest entry for int8, else None.
    """

    data: jax.Array
    scale: jax.Array | None
    peak: jax.Array | None

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    def encode(self, x: jax.Array) -> "Store":
        """[batch, kv_heads, length, head_dim] floats in this store's format."""
        if self.scale is None:
            return Store(data=x.astype(self.data.dtype), scale=None, peak=None)
        x = x.astype(jnp.float32)
        size = jnp.abs(x)
        at_peak = jnp.arange(x.shape[-1]) == jnp.argmax(size, axis=-1, keepdims=True)
        rest = jnp.max(jnp.where(at_peak, 0.0, size), axis=-1)
        scale = jnp.maximum(rest / 127, jnp.max(size, axis=-1) / 32767)
        # Rounded to bfloat16 upwards, so that 127 steps still reach the largest of the rest.
        scale = (scale * (1 + 2.0**-8)).astype(jnp.bfloat16)
        wide = scale.astype(jnp.float32)
        steps = jnp.round(x / jnp.where(wide > 0, wide, 1.0)[..., None])
        peak = jnp.sum(jnp.where(at_peak, steps, 0.0), axis=-1)
        data = jnp.where(at_peak, _PEAK, steps)
        return Store(data=data.astype(jnp.int8), scale=scale, peak=peak.astype(jnp.int16))

    def block(self, start: jax.Array, size: int) -> "Store":
        """Positions start .. start + size - 1."""
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=2), self)

    def steps(self, dtype: jnp.dtype) -> jax.Array:
        """The data as floats; in int8 still to be multiplied by the scale."""
        if self.scale is None:
            return self.data.astype(dtype)
        peak = self.peak.astype(dtype)[..., None]
        return jnp.where(self.data == _PEAK, peak, self.data.astype(dtype))


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
        per_head += 4 if self.dtype == "int8" else 0  # scale and peak
        heads = 2 * config.num_layers * config.num_kv_heads
        return heads * self.batch * self.capacity * per_head


def empty_cache(config: ModelConfig, spec: CacheSpec) -> KVCache:
    """A cache of zeros; to be called under jit with the cache's shardings as out_shardings."""
    shape = (spec.batch, config.num_kv_heads, spec.capacity, config.head_dim)

    def store() -> Store:
        scale = jnp.zeros(shape[:-1], jnp.bfloat16) if spec.dtype == "int8" else None
        peak = jnp.zeros(shape[:-1], jnp.int16) if spec.dtype == "int8" else None
        return Store(data=jnp.zeros(shape, spec.dtype), scale=scale, peak=peak)

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
