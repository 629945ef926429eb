"""Compressed documents: read layer by layer, and saved as what each head keeps.

A layer is read with all of its keys, then compressed, so no token that is compressed misses a key.
Every later token sees what is kept, and all tokens in between.

On disk each group of heads of a layer has an array of entries, [2, heads, tokens, ...], keys before
values, and one of scales. Heads with a compensation token have an array of it, [2, heads,
head_dim]. Heads are in the order of the checkpoint, and tokens in that of their positions, so
nothing depends on the mesh.
"""

from collections.abc import Callable

import jax
import numpy as np

from lsjax.attention.kv_array import KVArray
from lsjax.cache import (
    CacheSpec,
    CompensationToken,
    FullCache,
    HeadGroups,
    KVCache,
    RecurrentState,
    WindowCache,
    from_snapshot,
    shared_layers,
    snapshot,
    snapshot_bytes,
    states_of,
    with_states,
)
from lsjax.distributed.sharding import put_on_mesh
from lsjax.documents.folder import DocumentFolder
from lsjax.inference.engine import Engine
from lsjax.inference.layerwise_prefill import layer_progress
from lsjax.positions.rotary import RotaryTables

Layers = tuple[HeadGroups | RecurrentState, ...]
_BOTH = (0, 1)  # keys and values


def read_layers(
    engine: Engine,
    params: dict,
    tables: RotaryTables,
    ids: tuple[int, ...],
    spec: CacheSpec,
    on_prefill: Callable[[int], None],
) -> Layers:
    """Returns what the layers keep of tokens; `spec` is that of the compressed cache."""
    if not ids:
        return _only_read(engine, engine.new_cache(spec))
    chunk = engine.settings.prefill_chunk
    tokens = np.zeros((spec.batch, -(-len(ids) // chunk) * chunk), np.int32)
    tokens[:, : len(ids)] = ids
    lengths = np.full(spec.batch, len(ids), np.int32)
    on_chunk = layer_progress(engine.config, chunk, len(ids), on_prefill)
    cache, _ = engine.prefill_by_layer(params, tables, tokens, lengths, spec, on_chunk)
    return _only_read(engine, cache)


def save_layers(engine: Engine, layers: Layers, tokens: int, folder: DocumentFolder) -> None:
    """Writes what the layers keep of the first `tokens` tokens."""
    for i, layer in enumerate(layers):
        if isinstance(layer, RecurrentState):
            continue
        for n, group in enumerate(layer.groups):
            order, slots = _order_of_heads(engine, i, layer, n), _slots(group, tokens)
            where = np.ix_(_BOTH, order, slots)
            entries = np.stack([np.asarray(x.data[0]) for x in (group.k, group.v)])
            folder.write_array(f"{i}/{n}/entries", entries[where])
            if group.k.scale is not None:
                scales = np.stack([np.asarray(x.scale[0]) for x in (group.k, group.v)])
                folder.write_array(f"{i}/{n}/scales", scales[where])
            if token := _compensation_token(group):
                means = np.stack([np.asarray(x[0]) for x in (token.k, token.v)])
                folder.write_array(f"{i}/{n}/compensation", means[:, order])
    states = states_of(layers)
    folder.finish(tokens, (tokens, snapshot(states)) if states else None)


def open_layers(engine: Engine, spec: CacheSpec, tokens: int, folder: DocumentFolder) -> Layers:
    """Returns what `save_layers` has written, on the mesh of an engine.

    Raises:
      UserError: an array is missing or damaged.
    """
    layers, empty = [], _only_read(engine, engine.cache_shapes(spec))
    for i, layer in enumerate(empty):
        if isinstance(layer, RecurrentState):
            layers.append(layer)
            continue
        groups = tuple(
            _open_group(group, f"{i}/{n}", _order_of_heads(engine, i, layer, n), tokens, folder)
            for n, group in enumerate(layer.groups)
        )
        layers.append(layer.replace(groups=groups))
    if states := states_of(empty):
        content = folder.read_snapshot(tokens, snapshot_bytes(states))
        return with_states(layers, from_snapshot(states, content))
    return tuple(layers)


def _open_group(
    group: FullCache | WindowCache,
    name: str,
    order: np.ndarray,
    tokens: int,
    folder: DocumentFolder,
) -> FullCache | WindowCache:
    """Opens a group, of which shapes and shardings are given; see open_layers."""

    def read(kind: str, like: jax.ShapeDtypeStruct, *axes: np.ndarray) -> list[jax.Array]:
        where = np.ix_(_BOTH, *axes)
        shape = *map(len, (_BOTH, *axes)), *like.shape[1 + len(axes) :]
        held = np.zeros((2, *like.shape[1:]), like.dtype)
        held[where] = folder.read_array(f"{name}/{kind}", shape).view(like.dtype)
        return [put_on_mesh(np.broadcast_to(x, like.shape), like.sharding) for x in held]

    slots, scales = _slots(group, tokens), (None, None)
    entries = read("entries", group.k.data, order, slots)
    if group.k.scale is not None:
        scales = read("scales", group.k.scale, order, slots)
    k, v = map(KVArray, entries, scales)
    group = group.replace(k=k, v=v)
    if (token := _compensation_token(group)) is None:
        return group
    k, v = read("compensation", token.k, order)
    count = np.full(token.count.shape, max(tokens - group.spec.slots, 0), token.count.dtype)
    token = CompensationToken(k, v, put_on_mesh(count, token.count.sharding))
    return group.replace(compensation_token=token)


def _only_read(engine: Engine, cache: KVCache) -> Layers:
    """Returns what rows share of the layers, and the states of recurrent ones, which they copy."""
    shared = shared_layers(cache, engine.config.layers)
    return tuple(layer or state for layer, state in zip(shared, cache, strict=True))


def _compensation_token(group: FullCache | WindowCache) -> CompensationToken | None:
    return group.compensation_token if isinstance(group, WindowCache) else None


def _order_of_heads(engine: Engine, i: int, layer: HeadGroups, n: int) -> np.ndarray:
    """Returns where the heads of a group stand in its arrays, in the order of the checkpoint."""
    heads = np.asarray(engine.settings.compression.head_order(i))
    by_shard = heads.reshape(engine.settings.mesh.shape["model"], -1)
    first = sum(layer.sizes[:n])
    return np.argsort(by_shard[:, first : first + layer.sizes[n]].ravel())


def _slots(group: FullCache | WindowCache, tokens: int) -> np.ndarray:
    """Returns the slots of a group, of all devices, that hold tokens, by position."""
    if isinstance(group, FullCache):
        return np.argsort(group.zigzag.permutation(group.k.capacity))[:tokens]
    slots = np.arange(min(group.spec.slots, tokens))
    return np.argsort(np.asarray(group.spec.positions(slots, np.asarray(tokens))))
