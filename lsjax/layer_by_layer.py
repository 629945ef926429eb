"""Prefill that runs all of a prompt through one layer before the next.

Each layer's cache is compressed as soon as the layer is done, so that only one is ever whole. What
a token attends to is all there is: the answer's first token is that of the uncompressed model.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lsjax.cache import (
    CacheSpec,
    CompressedCache,
    LayerCache,
    Parts,
    Zigzag,
    compress,
    empty_layer,
)
from lsjax.compilation import Program
from lsjax.compression import Compression
from lsjax.config import ModelConfig
from lsjax.nn.block import Block
from lsjax.nn.decoder import Decoder
from lsjax.positions.alibi import layer_slopes
from lsjax.positions.rotary import RotaryTables, cos_sin
from lsjax.sharding import CHUNK, TOKENS, compressed_cache_spec, layer_cache_spec, sharding


class LayerByLayer:
    """The programs of such a prefill."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        compression: Compression,
        zigzag: Zigzag,
        decoder: Decoder,
        program: Callable[..., Program],
    ):
        self._config, self._mesh, self._compression = config, mesh, compression
        self._zigzag, self._decoder, self._program = zigzag, decoder, program
        self._platform = mesh.devices.flat[0].platform
        self._layer = program(self._layer_step, donate_argnums=(2, 3))
        self._last = program(self._last_step, out_shardings=sharding(mesh, TOKENS))
        self._empty = jax.jit(self._empty_layer, static_argnums=0)
        self._compress: dict[Parts, Program] = {}

    def __call__(
        self,
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
        hidden, where = list(hidden), self._where(tables)
        starts = [np.int32(i * x.shape[1]) for i, x in enumerate(hidden)]
        entries = []
        for i, parts in enumerate(self._compression.parts(room)):
            cache, layer = self._empty(spec), params[f"layers_{i}"]
            for n, start in enumerate(starts):
                hidden[n], cache = self._layer(layer, where[i], cache, hidden[n], start, lengths)
                if n:  # the device always has the next one queued
                    jax.block_until_ready(hidden[n - 1])
                    on_chunk(i, n - 1)
            entries.append(self._compressed(cache, lengths, parts))
            del cache
            jax.block_until_ready(entries[-1])  # before the next layer's cache is made
            on_chunk(i, len(starts) - 1)
        shape, rows = (len(lengths), self._config.hidden_size), sharding(self._mesh, TOKENS)
        last = jnp.zeros(shape, self._decoder.dtype, device=rows)
        for start, x in zip(starts, hidden, strict=True):
            last = self._last(params, x, start, lengths, last)
        return tuple(entries), last

    def lower(
        self,
        layer: dict,
        tables: RotaryTables,
        cache: LayerCache,
        batch: int,
        chunk: int,
        lengths: jax.ShapeDtypeStruct,
        start: jax.ShapeDtypeStruct,
    ) -> jax.stages.Lowered:
        """The program of a chunk in one layer, for arguments that are shapes with shardings."""
        shape = batch, chunk, self._config.hidden_size
        where = sharding(self._mesh, CHUNK)
        hidden = jax.ShapeDtypeStruct(shape, self._decoder.dtype, sharding=where)
        where = tables
        if self._config.alibi:
            whole = sharding(self._mesh, PartitionSpec())
            shape = (self._config.num_heads,)
            where = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
        return self._layer.lower(layer, where, cache, hidden, start, lengths)

    def _where(self, tables: RotaryTables) -> Sequence[RotaryTables | jax.Array]:
        """Of each layer, what its places come from: tables, or the slopes themselves."""
        if self._config.alibi:
            return layer_slopes(self._config, self._decoder.heads)
        return [tables] * self._config.num_layers

    def _compressed(self, cache: LayerCache, lengths: jax.Array, parts: Parts) -> CompressedCache:
        def step(_: None, cache: LayerCache, lengths: jax.Array) -> CompressedCache:
            out = compress(cache, lengths, parts, self._compression.shards, self._zigzag)
            return self._placed(out, compressed_cache_spec(out))

        if parts not in self._compress:
            self._compress[parts] = self._program(step)
        return self._compress[parts](None, cache, lengths)

    def _placed(self, tree, specs):
        """Within a program: the tree where its specs say."""
        return jax.tree.map(
            lambda x, spec: jax.lax.with_sharding_constraint(x, sharding(self._mesh, spec)),
            tree,
            specs,
        )

    def _empty_layer(self, spec: CacheSpec) -> LayerCache:
        layer = empty_layer(self._config, spec, self._platform)
        return self._placed(layer, layer_cache_spec(layer))

    def _layer_step(self, layer, where, cache, hidden, start, lengths):
        positions = self._zigzag.chunk_positions(start, *hidden.shape[:2])
        positions = self._placed(positions, CHUNK)
        if self._decoder.gather is not None:
            layer = self._decoder.gather("layers_0", layer)
        block = Block(self._config, self._mesh, None)
        places = where if self._config.alibi else cos_sin(where, positions)
        hidden, cache = block.apply(
            {"params": layer}, hidden, positions, places, cache, lengths, False
        )
        return self._placed(hidden, CHUNK), self._placed(cache, layer_cache_spec(cache))

    def _last_step(self, params, hidden, start, lengths, last):
        positions = self._zigzag.chunk_positions(start, *hidden.shape[:2])
        hidden = self._decoder.apply({"params": params}, hidden, method="normed")
        return last_hidden(hidden, positions, lengths, last)


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
