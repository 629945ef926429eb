"""Layer-by-layer prefill: runs a whole prompt through one layer before the next.

Each layer's cache is compressed as soon as the layer is done, so only one cache is ever
uncompressed. A recurrent layer keeps its state as it is. Prompt tokens attend to uncompressed
caches, so the first token of the answer is that of the uncompressed model.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.cache import CacheSpec, KVCache, LayerCache, RecurrentState, cache_shapes, empty_entry
from lsjax.config import LayerKind, ModelConfig
from lsjax.inference.sharded_model import ShardedModel
from lsjax.nn.decoder import run_layer
from lsjax.positions.rotary import RotaryTables
from lsjax.runtime.compilation import Program
from lsjax.runtime.flops import prefill_cost


def prefill_by_layer(
    model: ShardedModel,
    params: dict,
    tables: RotaryTables,
    hidden: Sequence[jax.Array],
    lengths: jax.Array,
    spec: CacheSpec,
    on_chunk: Callable[[int, int], None],
) -> tuple[KVCache, jax.Array]:
    """Prefills prompts layer by layer.

    Args:
      model: model with compression.
      params: model parameters, with heads in the order of reorder_heads.
      tables: rotary tables of the batch.
      hidden: [batch, chunk, hidden] embeddings of each chunk in turn, in zigzag order; arbitrary
        after a prompt's end.
      lengths: [batch] number of tokens in each prompt.
      spec: spec of the compressed cache.
      on_chunk: called with the index of the layer and of the chunk that has just been run.

    Returns:
      The compressed cache, and [batch, hidden] hidden states of the prompts' last tokens.
    """
    hidden, inputs = list(hidden), model.decoder.layer_inputs(tables)
    starts = [np.int32(i * x.shape[1]) for i, x in enumerate(hidden)]
    whole, entries = dataclasses.replace(spec, policy=None), []
    for i, kind in enumerate(model.config.layers):
        cache, layer = _empty(model, whole, kind), params[f"layers_{i}"]
        for n, start in enumerate(starts):
            args = inputs[i], cache, hidden[n], start, lengths
            hidden[n], cache = _LAYER(model, layer, *args, i=_first_alike(model, i))
            if n:  # wait only for the previous chunk: the device always has one queued
                jax.block_until_ready(hidden[n - 1])
                on_chunk(i, n - 1)
        if not kind.recurrence:
            split = model.compression.split(i, spec.prompt_capacity)
            cache = _COMPRESS(model, cache, lengths, split=split)
        entries.append(cache)
        del cache
        jax.block_until_ready(entries[-1])  # before the next layer's cache is allocated
        on_chunk(i, len(starts) - 1)
    shape = len(lengths), model.config.hidden_size
    last = jnp.zeros(shape, model.decoder.dtype, device=model.rows)
    for start, x in zip(starts, hidden, strict=True):
        last = _LAST(model, params, x, start, lengths, last)
    return tuple(entries), last


def layer_progress(
    config: ModelConfig, chunk: int, longest: int, on_prefill: Callable[[int], None]
) -> Callable[[int, int], None]:
    """Returns an `on_chunk` that tells positions that all layers would have run for as much work.

    Args:
      config: model configuration.
      chunk: tokens per chunk.
      longest: number of tokens in the longest prompt.
      on_prefill: called with the number of positions since its last call.
    """
    layers, chunks, told = config.num_layers, -(-longest // chunk), 0
    cost = functools.partial(prefill_cost, config, 0)

    def cost_of(kind: LayerKind, length: int) -> float:
        return prefill_cost(dataclasses.replace(config, layers=(kind,)), 0, length)

    whole = (cost_of(kind, longest) for kind in config.layers)
    before = list(itertools.accumulate(whole, initial=0.0))  # work of the layers before each

    def on_chunk(layer: int, n: int) -> None:
        nonlocal told
        if (layer, n) == (layers - 1, chunks - 1):
            done = longest
        else:
            work = before[layer] + cost_of(config.layers[layer], min((n + 1) * chunk, longest))
            done = bisect.bisect(range(longest), work, key=cost) - 1
        if done > told:
            on_prefill(done - told)
            told = done

    return on_chunk


def lower_layers(
    model: ShardedModel, params: dict, tables: RotaryTables, spec: CacheSpec, chunk: int
) -> tuple[jax.stages.Lowered, ...]:
    """Lowers the program of each kind of layer that runs a chunk, for abstract arguments."""

    def abstract(shape: tuple[int, ...], dtype, where) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    hidden = abstract(
        (spec.batch, chunk, model.config.hidden_size), model.dtype, model.chunk_sharding
    )
    inputs = model.decoder.layer_inputs(tables)[0]
    if inputs.slopes is not None:
        slopes = abstract(inputs.slopes.shape, jnp.float32, model.replicated)
        inputs = inputs.replace(slopes=slopes)
    start = abstract((), "int32", model.replicated)
    lengths = abstract((spec.batch,), "int32", model.rows)
    whole = dataclasses.replace(spec, policy=None)
    caches = cache_shapes(model.config, model.mesh, whole, model.platform)

    def lower(i: int) -> jax.stages.Lowered:
        layer = params[f"layers_{i}"]
        return _LAYER.lower(model, layer, inputs, caches[i], hidden, start, lengths, i=i)

    return tuple(map(lower, map(model.config.layers.index, dict.fromkeys(model.config.layers))))


def _first_alike(model: ShardedModel, i: int) -> int:
    """Returns the first layer of the kind of layer i, whose program it shares."""
    return model.config.layers.index(model.config.layers[i])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(model: ShardedModel, spec: CacheSpec, kind: LayerKind) -> LayerCache | RecurrentState:
    return model.as_layer(empty_entry(model.config, spec, model.platform, kind))


def _run_layer(model, layer, inputs, cache, hidden, start, lengths, *, i):
    positions = model.as_chunk(model.zigzag.chunk_positions(start, *hidden.shape[:2]))
    inputs = inputs.at(positions, lengths=lengths)
    hidden, cache = run_layer(model.decoder, i, layer, hidden, inputs, cache)
    return model.as_chunk(hidden), model.as_layer(cache)


def _compress_layer(model, cache, lengths, *, split):
    return model.as_layer(model.compression.compress(cache, lengths, split))


def _last_hidden(model, params, hidden, start, lengths, last):
    positions = model.zigzag.chunk_positions(start, *hidden.shape[:2])
    hidden = model.decoder.apply({"params": params}, hidden, method="apply_final_norm")
    return model.by_row(last_hidden(hidden, positions, lengths, last))


_LAYER = Program(_run_layer, static_argnames=["i"], donate_argnames=["cache", "hidden"])
_LAST = Program(_last_hidden)
_COMPRESS = Program(_compress_layer, static_argnames=["split"])


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
