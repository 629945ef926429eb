"""Keys or values of one layer, in floats, in a byte an entry, or in half a byte."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.cache.layout import narrow_dtype, pinned, to_floats, to_held

# int4: entries that share a scale. Values of 4 bits need a scale of their own more often.
_GROUP = 32
# Sizes of a step that are tried, in parts of the one that just reaches the largest entry. With
# few steps it pays to cut the largest entry off for the sake of the others.
_BYTE_SIZES = tuple(1 + i / 64 for i in range(8))
_HALF_BYTE_SIZES = tuple(1 + i / 64 for i in range(-10, 6, 2))


@flax.struct.dataclass
class Store:
    """Keys or values of one layer, or a block of them; the dtype of `data` says the format.

    Attributes:
      data: [batch, kv_heads, capacity, head_dim] float or int8, or
        [batch, kv_heads, capacity, head_dim / 2] uint8 that hold two entries of 4 bits each: the
        first half of the channels in the low bits.
      scale: bfloat16. int8: [batch, kv_heads, capacity], an entry is data * scale. int4:
        [batch, kv_heads, capacity, groups], one for each 32 channels, an entry is
        (bits - 7.5) * scale. None for floats.

    Either may hold the bits of bfloat16 in its place: see layout.narrow_dtype.
    """

    data: jax.Array
    scale: jax.Array | None

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    def encode(self, x: jax.Array) -> "Store":
        """[batch, kv_heads, length, head_dim] floats in this store's format."""
        if self.data.dtype == jnp.int8:
            steps, scale = _quantise(x, _to_byte, 127, _BYTE_SIZES)
            return Store(steps.astype(jnp.int8), to_held(scale, self.scale.dtype))
        if self.data.dtype == jnp.uint8:
            grouped = x.reshape(*x.shape[:-1], self.scale.shape[-1], -1)
            steps, scale = _quantise(grouped, _to_half_byte, 7.5, _HALF_BYTE_SIZES)
            bits = (steps + 7.5).astype(jnp.uint8).reshape(x.shape)
            low, high = jnp.split(bits, 2, axis=-1)
            return Store(low | high << 4, to_held(scale, self.scale.dtype))
        return Store(to_held(x, self.data.dtype), None)

    def block(self, row: jax.Array | None, start: jax.Array, size: int) -> "Store":
        """Slots start .. start + size - 1 of all rows, or of one."""

        def take(x: jax.Array) -> jax.Array:
            at = (0 if row is None else row, 0, start, *[0] * (x.ndim - 3))
            rows = x.shape[0] if row is None else 1
            return jax.lax.dynamic_slice(x, at, (rows, x.shape[1], size, *x.shape[3:]))

        return jax.tree.map(take, self)

    def widened(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """The entries as floats, and what every key's are still to be multiplied by.

        Returns:
          [batch, kv_heads, capacity, head_dim] in `dtype`, and [batch, kv_heads, capacity]
          float32 or None: a factor of a whole key is cheaper on its score than on its entries.
        """
        if self.data.dtype == jnp.int8:
            return self.data.astype(dtype), to_floats(self.scale, jnp.float32)
        if self.data.dtype == jnp.uint8:
            bits = jnp.concatenate([self.data & 15, self.data >> 4], axis=-1)
            grouped = bits.reshape(*self.scale.shape, -1).astype(jnp.float32) - 7.5
            floats = grouped * to_floats(self.scale, jnp.float32)[..., None]
            return floats.astype(dtype).reshape(bits.shape), None
        return to_floats(self.data, dtype), None

    def floats(self) -> jax.Array:
        """What the store holds, [batch, kv_heads, capacity, head_dim] float32."""
        entries, factor = self.widened(jnp.float32)
        return entries if factor is None else entries * factor[..., None]


def empty_store(shape: tuple[int, int, int, int], dtype: str, platform: str = "cpu") -> Store:
    """Zeros, [batch, kv_heads, capacity, head_dim], in the format that `dtype` names."""
    narrow = narrow_dtype(platform)
    if dtype == "int8":
        return Store(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], narrow))
    if dtype == "int4":
        *rows, head_dim = shape
        groups = head_dim // _group(head_dim)
        data = jnp.zeros((*rows, head_dim // 2), jnp.uint8)
        return Store(data, jnp.zeros((*rows, groups), narrow))
    return Store(jnp.zeros(shape, narrow if dtype == "bfloat16" else dtype), None)


def write(store: Store, new: Store, start: jax.Array, platform: str = "cpu") -> Store:
    """Writes a run of new keys or values into this device's shard of a layer.

    Args:
      store: the shard.
      new: some slots, in the store's format.
      start: the slot of the first, in every row.
      platform: that it runs on: cpu, gpu (or cuda) or tpu.

    Returns:
      The store with the slots written; as it was, where it does not have them all.
    """

    def changed(slots: jax.Array, new: jax.Array, held: jax.Array) -> jax.Array:
        return jnp.where(slots[0] == start, new, held)

    return _rewritten(store, new, None, start, changed, platform)


def write_tokens(
    store: Store,
    new: Store,
    positions: jax.Array,
    start: jax.Array,
    position_of: Callable[[jax.Array], jax.Array],
    platform: str = "cpu",
) -> Store:
    """Writes a few consecutive tokens of each row, those whose positions this device holds.

    Args:
      store: the shard.
      new: a slot for each of them, in the store's format.
      positions: [batch] of each row's first.
      start: [batch] the slot from which on this device's of them lie, one after the other.
      position_of: the positions at which slots stand.
      platform: as of `write`.
    """
    batch, _, length = new.data.shape[:3]

    def put_row(row: jax.Array, store: Store) -> Store:
        def changed(slots: jax.Array, new: jax.Array, held: jax.Array) -> jax.Array:
            token = position_of(slots) - positions[row]
            of_slot = new if length == 1 else jnp.take(new, token, axis=2, mode="clip")
            here = (token >= 0) & (token < length)
            return jnp.where(here.reshape(-1, *[1] * (new.ndim - 3)), of_slot, held)

        return _rewritten(store, new.block(row, 0, length), row, start[row], changed, platform)

    if batch == 1:
        return put_row(0, store)
    # Row by row in place: a scatter to all of them at once copies the store.
    return jax.lax.fori_loop(0, batch, put_row, store)


def _group(head_dim: int) -> int:
    """Channels that share a scale in int4: 32, or the most below that divide the width."""
    return max(n for n in range(1, _GROUP + 1) if head_dim % n == 0)


def _quantise(
    x: jax.Array,
    to_steps: Callable[[jax.Array], jax.Array],
    most: float,
    tried: tuple[float, ...],
) -> tuple[jax.Array, jax.Array]:
    """The steps [..., channels] nearest to x in float32, and their size [...] bfloat16.

    Of some sizes about the one that just reaches the largest channel, the one that leaves the
    least error: with few channels that is often far less (with 8, a third).
    """
    x = x.astype(jnp.float32)[..., None, :]
    largest = jnp.max(jnp.abs(x), axis=-1)
    sizes = (largest / most * jnp.asarray(tried)).astype(jnp.bfloat16)

    def steps_of(sizes: jax.Array) -> jax.Array:
        wide = sizes.astype(jnp.float32)[..., None]
        return to_steps(x / jnp.where(wide > 0, wide, 1.0))

    # In parts of the largest entry, whose square a float32 may not hold.
    off = (steps_of(sizes) * sizes.astype(jnp.float32)[..., None] - x) / jnp.where(
        largest > 0, largest, 1.0
    )[..., None]
    chosen = jnp.argmin(jnp.sum(off**2, axis=-1), axis=-1, keepdims=True)
    best = jnp.take_along_axis(sizes, chosen, axis=-1)
    return steps_of(best)[..., 0, :], best[..., 0]


def _to_byte(quotient: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(quotient), -127, 127)


def _to_half_byte(quotient: jax.Array) -> jax.Array:
    """The 16 levels are halves, so that there are as many above zero as below."""
    return jnp.clip(jnp.floor(quotient) + 0.5, -7.5, 7.5)


def _rewritten(
    store: Store,
    new: Store,
    row: jax.Array | int | None,
    start: jax.Array,
    changed: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    platform: str,
) -> Store:
    """The store with as many slots from `start` on, of all rows or one, as `new` has, changed.

    Args:
      changed: (slots, new, what they hold) -> what they are to hold. Near the end of the store
        the slots begin before `start`.

    A slice of a fixed size is read, changed or not, and put back: nothing else stays in place.
    """
    length = new.data.shape[2]
    slot = jnp.clip(start, 0, store.capacity - length)
    slots = slot + jnp.arange(length)

    def rewrite(old: jax.Array, new: jax.Array) -> jax.Array:
        at = (0 if row is None else row, 0, slot, *[0] * (old.ndim - 3))
        held = pinned(jax.lax.dynamic_slice(old, at, new.shape), platform)
        put = changed(slots, pinned(new, platform), held)
        return pinned(jax.lax.dynamic_update_slice(old, put, at), platform)

    return jax.tree.map(rewrite, store, new)
