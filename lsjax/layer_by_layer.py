"""Prefill that runs all of a prompt through one layer before the next.

Each layer's cache is compressed as soon as the layer is done, so that only one is ever whole. What
a token attends to is all there is: the answer's first token is that of the uncompressed model.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsjax.cache import (
    CacheSpec,
    CompressedCache,
    LayerCache,
    compress,
    empty_layer,
)
from lsjax.compilation import Program
from lsjax.config import ModelConfig
from lsjax.nn.block import Block
from lsjax.positions.alibi import layer_slopes
from lsjax.positions.rotary import RotaryTables, cos_sin
from lsjax.sharded_model import ShardedModel
from lsjax.sharding import CHUNK, compressed_cache_spec, layer_cache_spec, sharding


def prefill_by_layer(
    model: ShardedModel,
    params: dict,
    tables: RotaryTables,
    hidden: Sequence[jax.Array],
    lengths: jax.Array,
    spec: CacheSpec,
    room: int,
    on_chunk: Callable[[int, int], None],
) -> tuple[tuple[CompressedCache, ...], jax.Array]:
    """Runs prompts.

    Args:
      model: with compression.
      params: the model's, its heads arranged.
      tables: of the requests.
      hidden: [batch, chunk, hidden] embeddings of one chunk after the other, their tokens dealt
        out; anything after a prompt's end.
      lengths: [batch] tokens of each prompt.
      spec: of the whole cache.
      room: tokens of prompt that it has room for.
      on_chunk: called with the layer and the chunk that are done.

    Returns:
      The compressed cache, and [batch, hidden] the hidden state of each prompt's last token.
    """
    hidden, where = list(hidden), _where(model, tables)
    starts = [np.int32(i * x.shape[1]) for i, x in enumerate(hidden)]
    entries = []
    for i, parts in enumerate(model.compression.parts(room)):
        cache, layer = _empty(model.config, model.mesh, spec), params[f"layers_{i}"]
        for n, start in enumerate(starts):
            hidden[n], cache = _LAYER(model, layer, where[i], cache, hidden[n], start, lengths)
            if n:  # the device always has the next one queued
                jax.block_until_ready(hidden[n - 1])
                on_chunk(i, n - 1)
        entries.append(_COMPRESS(model, None, cache, lengths, parts=parts))
        del cache
        jax.block_until_ready(entries[-1])  # before the next layer's cache is made
        on_chunk(i, len(starts) - 1)
    shape = len(lengths), model.config.hidden_size
    last = jnp.zeros(shape, model.decoder.dtype, device=model.rows)
    for start, x in zip(starts, hidden, strict=True):
        last = _LAST(model, params, x, start, lengths, last)
    return tuple(entries), last


def lower_layer(
    model: ShardedModel,
    layer: dict,
    tables: RotaryTables,
    cache: LayerCache,
    batch: int,
    chunk: int,
    lengths: jax.ShapeDtypeStruct,
    start: jax.ShapeDtypeStruct,
) -> jax.stages.Lowered:
    """The program of a chunk in one layer, for arguments that are shapes with shardings."""
    shape = batch, chunk, model.config.hidden_size
    where = sharding(model.mesh, CHUNK)
    hidden = jax.ShapeDtypeStruct(shape, model.decoder.dtype, sharding=where)
    where = tables
    if model.config.alibi:
        shape = (model.config.num_heads,)
        where = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=model.replicated)
    return _LAYER.lower(model, layer, where, cache, hidden, start, lengths)


def _where(model: ShardedModel, tables: RotaryTables) -> Sequence[RotaryTables | jax.Array]:
    """Of each layer, what its places come from: tables, or the slopes themselves."""
    if model.config.alibi:
        return layer_slopes(model.config, model.decoder.heads)
    return [tables] * model.config.num_layers


def _placed(mesh: Mesh, tree, specs):
    """Within a program: the tree where its specs say."""
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, sharding(mesh, spec)),
        tree,
        specs,
    )


def _compress_layer(model, _, cache, lengths, *, parts):
    out = compress(cache, lengths, parts, model.compression.shards, model.zigzag)
    return _placed(model.mesh, out, compressed_cache_spec(out))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, mesh: Mesh, spec: CacheSpec) -> LayerCache:
    layer = empty_layer(config, spec, mesh.devices.flat[0].platform)
    return _placed(mesh, layer, layer_cache_spec(layer))


def _run_layer(model, layer, where, cache, hidden, start, lengths):
    positions = model.zigzag.chunk_positions(start, *hidden.shape[:2])
    positions = _placed(model.mesh, positions, CHUNK)
    if model.decoder.gather is not None:
        layer = model.decoder.gather("layers_0", layer)
    block = Block(model.config, model.mesh, None)
    places = where if model.config.alibi else cos_sin(where, positions)
    hidden, cache = block.apply({"params": layer}, hidden, positions, places, cache, lengths, False)
    return _placed(model.mesh, hidden, CHUNK), _placed(model.mesh, cache, layer_cache_spec(cache))


def _last_hidden(model, params, hidden, start, lengths, last):
    positions = model.zigzag.chunk_positions(start, *hidden.shape[:2])
    hidden = model.decoder.apply({"params": params}, hidden, method="normed")
    return last_hidden(hidden, positions, lengths, last)


_LAYER = Program(_run_layer, donate_argnums=(2, 3))
_LAST = Program(_last_hidden, lambda model: model.rows)
_COMPRESS = Program(_compress_layer)


def last_hidden(
    hidden: jax.Array, positions: jax.Array, lengths: jax.Array, last: jax.Array
) -> jax.Array:
    """[batch, hidden] of each prompt's last token, where it is in the chunk; else `last`.

    Args:
      hidden: [batch, chunk, hidden], where `positions` [batch, chunk] say.
      positions: of the chunk.
      lengths: [batch] tokens of each prompt.
      last: [batch, hidden], from the chunk before.
    """
    is_last = (positions == lengths[:, None] - 1)[..., None]
    chosen = jnp.sum(jnp.where(is_last, hidden, 0), axis=1)
    return jnp.where(jnp.any(is_last, axis=1), chosen, last)
