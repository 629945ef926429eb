"""Tokens of a cache in the order of their positions, however the cache lies on the mesh.

A saved document is read and written in such slices.
"""

import functools
import math
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lsjax.attention.kv_array import KVArray
from lsjax.cache.full import FullCache
from lsjax.distributed.sharding import put_on_mesh

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


def from_slices(layers: Layers, slices: Iterable[tuple[int, TokenSlice]]) -> Layers:
    """Returns layers that hold saved tokens in every row; the inverse of `take_tokens`.

    Slices are put in the order of slots on the host, and each array is transferred in one piece.
    Nothing is compiled, and a CPU takes the arrays over as they are.

    Args:
      layers: shapes and shardings of empty layers.
      slices: start and tokens of each slice, in order; bfloat16 may come as its bits.
    """
    alike: dict[int, list[int]] = {}  # layers by their capacity
    for i, layer in enumerate(layers):
        alike.setdefault(layer.k.capacity, []).append(i)
    held = {
        capacity: _HeldLayers(layers[those[0]], those, every=len(alike) == 1)
        for capacity, those in alike.items()
    }
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        writes: list[Future] = []  # of a slice; the next one is read meanwhile
        for start, tokens in slices:
            _wait_for(writes)
            writes = [x for some in held.values() for x in some.put(tokens, start, threads)]
        _wait_for(writes)

    def filled(i: int, layer: FullCache) -> FullCache:
        k, v = held[layer.k.capacity].on_mesh(i, layer.k)
        return layer.replace(k=k, v=v)

    return tuple(filled(i, layer) for i, layer in enumerate(layers))


class _HeldLayers:
    """Entries and scales of layers of one capacity on the host, in the order of slots."""

    def __init__(self, layer: FullCache, those: list[int], every: bool):
        self._those, self._taken = those, slice(None) if every else those
        # Slots of all devices, by position within a lap.
        self._slots = np.argsort(layer.zigzag.permutation(layer.k.capacity))
        self._arrays = jax.tree.map(
            lambda x: _zeros((len(those), 2, *x.shape[1:]), x.dtype), layer.k
        )

    def put(self, tokens: TokenSlice, start: int, threads: ThreadPoolExecutor) -> list[Future]:
        """Begins to write tokens, each thread to some of the layers."""
        capacity, stop = len(self._slots), start + tokens.data.shape[3]
        first = max(start, stop - capacity)
        slots = self._slots[np.arange(first, stop) % capacity]
        if np.all(np.diff(slots) == 1):
            slots = slice(slots[0], slots[-1] + 1)

        def write(some: np.ndarray) -> None:
            def put_in(held: np.ndarray, x: np.ndarray) -> None:
                x = np.asarray(x).view(held.dtype)[self._taken, :, :, first - start :]
                held[some[0] : some[-1] + 1, :, :, slots] = x[some[0] : some[-1] + 1]

            jax.tree.map(put_in, self._arrays, tokens)

        parts = np.array_split(np.arange(len(self._those)), os.cpu_count())
        return [threads.submit(write, part) for part in parts if len(part)]

    def on_mesh(self, layer: int, like: KVArray) -> tuple[KVArray, KVArray]:
        i = self._those.index(layer)

        def put(x: jax.ShapeDtypeStruct, held: np.ndarray, half: int) -> jax.Array:
            return put_on_mesh(np.broadcast_to(held[i, half], x.shape), x.sharding)

        k, v = (jax.tree.map(functools.partial(put, half=n), like, self._arrays) for n in range(2))
        return k, v


def _wait_for(writes: list[Future]) -> None:
    for write in writes:
        write.result()


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns zeros in pages of their own, which JAX takes over on a CPU without a copy."""
    size = math.prod(shape)
    pages = mmap.mmap(-1, max(size * np.dtype(dtype).itemsize, 1), mmap.MAP_PRIVATE)
    return np.frombuffer(pages, dtype, size).reshape(shape)


def _stacked(trees: Iterable[TokenSlice]) -> TokenSlice:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
