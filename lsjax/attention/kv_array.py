"""Storage of one layer's keys or values as floats, int8 or int4."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention.storage import from_storage, narrow_dtype, to_storage, with_tpu_layout

# int4: channels that share a scale. 4-bit values need a scale for fewer channels than int8 ones.
_GROUP = 32
# Step sizes to try, relative to the one that just represents the largest entry. With the few steps
# of int4 it pays to clip the largest entry, because the others then become more accurate.
BYTE_SIZES = tuple(1 + i / 64 for i in range(8))
_HALF_BYTE_SIZES = tuple(1 + i / 64 for i in range(-10, 6, 2))


@flax.struct.dataclass
class KVArray:
    """Keys or values of one layer, or a block of them; the dtype of `data` determines the format.

    bfloat16 arrays may be stored as their bits in uint16; see storage.narrow_dtype.

    Attributes:
      data: [batch, kv_heads, capacity, head_dim] float or int8; for int4
        [batch, kv_heads, capacity, head_dim / 2] uint8, two entries per byte, with the first half
        of the channels in the low bits.
      scale: bfloat16, or None for floats. For int8 it is [batch, kv_heads, capacity], and an entry
        is data * scale. For int4 it is [batch, kv_heads, capacity, groups], usually one for every
        32 channels, and an entry is (bits - 7.5) * scale.
    """

    data: jax.Array
    scale: jax.Array | None

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    def quantize(self, x: jax.Array) -> "KVArray":
        """Converts floats [batch, kv_heads, length, head_dim] to the format of this array."""
        if self.data.dtype == jnp.int8:
            steps, scale = _quantize(x, _to_byte, 127, BYTE_SIZES)
            return KVArray(steps.astype(jnp.int8), to_storage(scale, self.scale.dtype))
        if self.data.dtype == jnp.uint8:
            grouped = x.reshape(*x.shape[:-1], self.scale.shape[-1], -1)
            steps, scale = _quantize(grouped, _to_half_byte, 7.5, _HALF_BYTE_SIZES)
            bits = (steps + 7.5).astype(jnp.uint8).reshape(x.shape)
            low, high = jnp.split(bits, 2, axis=-1)
            return KVArray(low | high << 4, to_storage(scale, self.scale.dtype))
        return KVArray(to_storage(x, self.data.dtype), None)

    def block(self, row: jax.Array | None, start: jax.Array, size: int) -> "KVArray":
        """Slices out slots start .. start + size - 1, of one row or (None) of all rows."""

        def take(x: jax.Array) -> jax.Array:
            at = (0 if row is None else row, 0, start, *[0] * (x.ndim - 3))
            rows = x.shape[0] if row is None else 1
            return jax.lax.dynamic_slice(x, at, (rows, x.shape[1], size, *x.shape[3:]))

        return jax.tree.map(take, self)

    def dequantize_lazy(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """Converts the entries to floats, but leaves an int8 scale to be applied by the caller.

        Applying the scale of a key to its score is cheaper than applying it to all its entries.

        Returns:
          [batch, kv_heads, capacity, head_dim] in `dtype`, and the factor of each slot,
          [batch, kv_heads, capacity] float32, or None if there is nothing left to apply.
        """
        if self.data.dtype == jnp.int8:
            return self.data.astype(dtype), from_storage(self.scale, jnp.float32)
        if self.data.dtype == jnp.uint8:
            bits = jnp.concatenate([self.data & 15, self.data >> 4], axis=-1)
            grouped = bits.reshape(*self.scale.shape, -1).astype(jnp.float32) - 7.5
            dequantize = grouped * from_storage(self.scale, jnp.float32)[..., None]
            return dequantize.astype(dtype).reshape(bits.shape), None
        return from_storage(self.data, dtype), None

    def dequantize(self) -> jax.Array:
        """Converts the entries to float32, [batch, kv_heads, capacity, head_dim]."""
        entries, factor = self.dequantize_lazy(jnp.float32)
        return entries if factor is None else entries * factor[..., None]


def empty_kv_array(shape: tuple[int, int, int, int], dtype: str, platform: str = "cpu") -> KVArray:
    """Creates zeros of shape [batch, kv_heads, capacity, head_dim] in the format named `dtype`."""
    narrow = narrow_dtype(platform)
    if dtype == "int8":
        return KVArray(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], narrow))
    if dtype == "int4":
        *rows, head_dim = shape
        groups = head_dim // _group(head_dim)
        data = jnp.zeros((*rows, head_dim // 2), jnp.uint8)
        return KVArray(data, jnp.zeros((*rows, groups), narrow))
    return KVArray(jnp.zeros(shape, narrow if dtype == "bfloat16" else dtype), None)


def write(
    store: KVArray,
    new: KVArray,
    start: jax.Array,
    platform: str = "cpu",
    valid: jax.Array | None = None,
) -> KVArray:
    """Writes consecutive slots of all rows into this device's shard of a layer.

    Args:
      store: local shard.
      new: keys or values to write, in the format of `store`.
      start: first slot to write, the same in every row.
      platform: cpu, gpu (or cuda) or tpu.
      valid: [batch, length] which of the slots are written; None for all.

    Returns:
      The store with the slots written; unchanged if any of the slots is outside it.
    """

    def changed(slots: jax.Array, new: jax.Array, held: jax.Array) -> jax.Array:
        here = slots[0] == start
        if valid is not None:
            here = here & valid.reshape(valid.shape[0], 1, -1, *[1] * (new.ndim - 3))
        return jnp.where(here, new, held)

    return _rewritten(store, new, None, start, changed, platform)


def write_tokens(
    store: KVArray,
    new: KVArray,
    positions: jax.Array,
    start: jax.Array,
    position_of: Callable[[jax.Array], jax.Array],
    platform: str = "cpu",
) -> KVArray:
    """Writes a few consecutive tokens per row, as far as their positions are on this device.

    Args:
      store: local shard.
      new: one slot for each token, in the format of `store`.
      positions: [batch] position of each row's first token.
      start: [batch] local slot at which this device's tokens start; they are contiguous there.
      position_of: maps local slots to positions.
      platform: cpu, gpu (or cuda) or tpu.
    """
    batch, _, length = new.data.shape[:3]

    def put_row(row: jax.Array, store: KVArray) -> KVArray:
        def changed(slots: jax.Array, new: jax.Array, held: jax.Array) -> jax.Array:
            token = position_of(slots) - positions[row]
            of_slot = new if length == 1 else jnp.take(new, token, axis=2, mode="clip")
            here = (token >= 0) & (token < length)
            return jnp.where(here.reshape(-1, *[1] * (new.ndim - 3)), of_slot, held)

        return _rewritten(store, new.block(row, 0, length), row, start[row], changed, platform)

    if batch == 1:
        return put_row(0, store)
    # Writing row by row stays in place; a scatter to all rows at once would copy the store.
    return jax.lax.fori_loop(0, batch, put_row, store)


def _group(head_dim: int) -> int:
    """Returns the channels that share an int4 scale: the largest divisor of head_dim up to 32."""
    return max(n for n in range(1, _GROUP + 1) if head_dim % n == 0)


def _quantize(
    x: jax.Array,
    to_steps: Callable[[jax.Array], jax.Array],
    qmax: float,
    clip_ratios: tuple[float, ...],
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 steps [..., channels] nearest to x, and the step size [...] bfloat16.

    Tries step sizes around the one that just represents the largest channel, and takes the one with
    the least squared error. With few channels the error is often far lower (with 8, a third).
    """
    x = x.astype(jnp.float32)[..., None, :]
    largest = jnp.max(jnp.abs(x), axis=-1)
    sizes = (largest / qmax * jnp.asarray(clip_ratios)).astype(jnp.bfloat16)

    def steps_of(sizes: jax.Array) -> jax.Array:
        wide = sizes.astype(jnp.float32)[..., None]
        return to_steps(x / jnp.where(wide > 0, wide, 1.0))

    # Errors are relative to the largest entry, whose square may overflow float32.
    off = (steps_of(sizes) * sizes.astype(jnp.float32)[..., None] - x) / jnp.where(
        largest > 0, largest, 1.0
    )[..., None]
    chosen = jnp.argmin(jnp.sum(off**2, axis=-1), axis=-1, keepdims=True)
    best = jnp.take_along_axis(sizes, chosen, axis=-1)
    return steps_of(best)[..., 0, :], best[..., 0]


def _to_byte(quotient: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(quotient), -127, 127)


def _to_half_byte(quotient: jax.Array) -> jax.Array:
    """Rounds to the 16 levels -7.5, -6.5 .. 7.5: as many above zero as below."""
    return jnp.clip(jnp.floor(quotient) + 0.5, -7.5, 7.5)


def _rewritten(
    store: KVArray,
    new: KVArray,
    row: jax.Array | int | None,
    start: jax.Array,
    changed: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    platform: str,
) -> KVArray:
    """Rewrites as many slots as `new` has, from `start` on, of one row or (None) of all rows.

    Always reads a slice of fixed size and writes it back, changed or not: XLA does nothing else in
    place.

    Args:
      changed: (slots, new entries, old entries) -> entries to write. Near the end of the store the
        slots begin before `start`.
    """
    length = new.data.shape[2]
    slot = jnp.clip(start, 0, store.capacity - length)
    slots = slot + jnp.arange(length)

    def rewrite(old: jax.Array, new: jax.Array) -> jax.Array:
        at = (0 if row is None else row, 0, slot, *[0] * (old.ndim - 3))
        held = with_tpu_layout(jax.lax.dynamic_slice(old, at, new.shape), platform)
        put = changed(slots, with_tpu_layout(new, platform), held)
        return with_tpu_layout(jax.lax.dynamic_update_slice(old, put, at), platform)

    return jax.tree.map(rewrite, store, new)
