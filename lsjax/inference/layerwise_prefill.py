"""Layer-by-layer prefill: runs a whole prompt through one layer before the next.

Each layer's cache is compressed as soon as the layer is done, so only one cache is ever
uncompressed. Prompt tokens attend to uncompressed caches, so the first token of the answer is that
of the uncompressed model.
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
from lsjax.cache.partition_specs import compressed_cache_spec, layer_cache_spec
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import CHUNK_SPEC, sharding
from lsjax.inference.sharded_model import ShardedModel
from lsjax.nn.block import Block
from lsjax.positions.alibi import layer_slopes
from lsjax.positions.rotary import RotaryTables, cos_sin
from lsjax.runtime.compilation import Program


def prefill_by_layer(
    model: ShardedModel,
    params: dict,
    tables: RotaryTables,
    hidden: Sequence[jax.Array],
    lengths: jax.Array,
    spec: CacheSpec,
    prompt_capacity: int,
    on_chunk: Callable[[int, int], None],
) -> tuple[tuple[CompressedCache, ...], jax.Array]:
    """Prefills prompts layer by layer.

    Args:
      model: model with compression.
      params: model parameters, with heads in the order of reorder_heads.
      tables: rotary tables of the batch.
      hidden: [batch, chunk, hidden] embeddings of each chunk in turn, in zigzag order; arbitrary
        after a prompt's end.
      lengths: [batch] number of tokens in each prompt.
      spec: spec of the uncompressed cache.
      prompt_capacity: longest prompt that the cache holds, in tokens.
      on_chunk: called with the index of the layer and of the chunk that has just been run.

    Returns:
      The compressed cache, and [batch, hidden] hidden states of the prompts' last tokens.
    """
    hidden, where = list(hidden), _where(model, tables)
    starts = [np.int32(i * x.shape[1]) for i, x in enumerate(hidden)]
    entries = []
    for i, parts in enumerate(model.compression.parts(prompt_capacity)):
        cache, layer = _empty(model.config, model.mesh, spec), params[f"layers_{i}"]
        for n, start in enumerate(starts):
            hidden[n], cache = _LAYER(model, layer, where[i], cache, hidden[n], start, lengths)
            if n:  # wait only for the previous chunk: the device always has one queued
                jax.block_until_ready(hidden[n - 1])
                on_chunk(i, n - 1)
        entries.append(_COMPRESS(model, None, cache, lengths, parts=parts))
        del cache
        jax.block_until_ready(entries[-1])  # before the next layer's cache is allocated
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
    """Lowers the program that runs a chunk through one layer, for abstract arguments."""
    shape = batch, chunk, model.config.hidden_size
    where = sharding(model.mesh, CHUNK_SPEC)
    hidden = jax.ShapeDtypeStruct(shape, model.decoder.dtype, sharding=where)
    where = tables
    if model.config.alibi:
        shape = (model.config.num_heads,)
        where = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=model.replicated)
    return _LAYER.lower(model, layer, where, cache, hidden, start, lengths)


def _where(model: ShardedModel, tables: RotaryTables) -> Sequence[RotaryTables | jax.Array]:
    """Returns what each layer's position inputs come from: rotary tables or ALiBi slopes."""
    if model.config.alibi:
        return layer_slopes(model.config, model.decoder.heads)
    return [tables] * model.config.num_layers


def _placed(mesh: Mesh, tree, specs):
    """Constrains arrays to the shardings of their specs, within a compiled program."""
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
    positions = _placed(model.mesh, positions, CHUNK_SPEC)
    if model.decoder.all_gather_weights is not None:
        layer = model.decoder.all_gather_weights("layers_0", layer)
    block = Block(model.config, model.mesh, None)
    places = where if model.config.alibi else cos_sin(where, positions)
    hidden, cache = block.apply({"params": layer}, hidden, positions, places, cache, lengths, False)
    return _placed(model.mesh, hidden, CHUNK_SPEC), _placed(
        model.mesh, cache, layer_cache_spec(cache)
    )


def _last_hidden(model, params, hidden, start, lengths, last):
    positions = model.zigzag.chunk_positions(start, *hidden.shape[:2])
    hidden = model.decoder.apply({"params": params}, hidden, method="apply_final_norm")
    return last_hidden(hidden, positions, lengths, last)


_LAYER = Program(_run_layer, donate_argnums=(2, 3))
_LAST = Program(_last_hidden, lambda model: model.rows)
_COMPRESS = Program(_compress_layer)


def last_hidden(
    hidden: jax.Array, positions: jax.Array, lengths: jax.Array, last: jax.Array
) -> jax.Array:
    """Returns [batch, hidden] states of the prompts' last tokens, or `last` if not in the chunk.

    Args:
      hidden: [batch, chunk, hidden] hidden states of the chunk.
      positions: [batch, chunk] positions of `hidden`.
      lengths: [batch] number of tokens in each prompt.
      last: [batch, hidden] result for the previous chunk.
    """
    is_last = (positions == lengths[:, None] - 1)[..., None]
    chosen = jnp.sum(jnp.where(is_last, hidden, 0), axis=1)
    return jnp.where(jnp.any(is_last, axis=1), chosen, last)
