"""Tokens of a cache in the order of their positions, however the cache lies on the mesh.

A saved document is read and written in such slices.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.attention.kv_array import KVArray, write_tokens
from lsjax.cache.full import FullCache

_SLICE_SPEC = PartitionSpec(None, None, "model")

# Entries and scales of consecutive tokens, [layers, 2, kv_heads, tokens, ...]; keys come first. No
# scales for floats.
TokenSlice = KVArray

Layers = tuple[FullCache, ...]


def take_tokens(
    mesh: Mesh, layers: Layers, specs: Layers, start: jax.Array, size: int
) -> TokenSlice:
    """Reads the tokens start .. start + size - 1 of the first row.

    Tokens that a layer no longer holds are arbitrary. `specs` are the partition specs of `layers`.
    """

    def on_device(layers: Layers, start: jax.Array) -> TokenSlice:
        device = jax.lax.axis_index("context")

        def take(x: jax.Array, cache: FullCache) -> jax.Array:
            zigzag = cache.zigzag
            position = (start + jnp.arange(size)) % (cache.k.capacity * zigzag.devices)
            slot = zigzag.num_local_slots_before(device, position)
            found = jnp.take(x[0], slot, axis=1, mode="clip")
            if zigzag.devices == 1:
                return found
            mine = (zigzag.device(position) == device).reshape(1, -1, *[1] * (x.ndim - 3))
            return jax.lax.psum(jnp.where(mine, found, 0), "context")

        def both(cache: FullCache) -> TokenSlice:
            return _stacked(
                jax.tree.map(functools.partial(take, cache=cache), x) for x in (cache.k, cache.v)
            )

        return _stacked(map(both, layers))

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=_SLICE_SPEC,
        check_vma=False,
    )(layers, start)


def put_tokens(
    mesh: Mesh, layers: Layers, specs: Layers, tokens: TokenSlice, start: jax.Array, platform: str
) -> Layers:
    """Writes the tokens from `start` on to every row; the inverse of `take_tokens`."""

    def on_device(layers: Layers, tokens: TokenSlice, start: jax.Array) -> Layers:
        return tuple(
            _written(cache, jax.tree.map(lambda x, i=i: x[i], tokens), start, platform)
            for i, cache in enumerate(layers)
        )

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, _SLICE_SPEC, PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )(layers, tokens, start)


def _stacked(trees: Iterable[TokenSlice]) -> TokenSlice:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _written(cache: FullCache, tokens: TokenSlice, start: jax.Array, platform: str) -> FullCache:
    """Writes [2, kv_heads, tokens, ...] to this device's shard of a layer."""
    zigzag, held = cache.zigzag, cache.k.capacity
    capacity, size = held * zigzag.devices, tokens.data.shape[2]
    device, batch = jax.lax.axis_index("context"), cache.k.data.shape[0]

    def put(store: KVArray, new: KVArray, at: jax.Array) -> KVArray:
        first = jnp.broadcast_to(at, (batch,))
        slot = zigzag.num_local_slots_before(device, jnp.maximum(first, 0))
        position_of = functools.partial(zigzag.position, device)
        return write_tokens(store, new, first, slot, position_of, platform)

    def put_both(store: KVArray, index: int) -> KVArray:
        for at in range(max(size - capacity, 0), size, held):
            new = jax.tree.map(lambda x, at=at: x[index, :, at : at + held], tokens)
            new = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), new)
            first = (start + at) % capacity
            store = put(put(store, new, first), new, first - capacity)  # a lap may end among them
        return store

    return cache.replace(k=put_both(cache.k, 0), v=put_both(cache.v, 1))
