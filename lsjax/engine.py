"""A model's steps on a mesh: arguments put where they belong, and the shapes that will come."""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax import steps
from lsjax.cache import CacheSpec, KVCache, empty_cache
from lsjax.compression import Compression
from lsjax.compression.shapes import compressed_shapes
from lsjax.config import ModelConfig
from lsjax.hosts import to_host
from lsjax.layer_by_layer import lower_layer, prefill_by_layer
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.sampling import Draw
from lsjax.sharded_model import sharded_model
from lsjax.sharding import cache_shardings, compressed_cache_spec, place, sharding
from lsjax.steps import DecodeState, LookupState

SEGMENT = 16  # steps of decoding between two looks at the end-of-sequence


class Engine:
    """A model's programs on a mesh, compiled for the shapes that come.

    Engines of one model share them, whatever their rope_scaling.

    Attributes:
      config: the model.
      mesh: the devices.
      dtype: of weights and activations.
      cache_dtype: one of CACHE_DTYPES.
      chunk: tokens of prompt run at once; whole stripes, see Zigzag.
      compression: of the KV heads, or None.
      segment: steps of decoding between two looks at the end-of-sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        dtype: str,
        cache_dtype: str,
        chunk: int,
        compression: Compression | None = None,
        segment: int = SEGMENT,
    ):
        self.config, self.mesh, self.dtype, self.cache_dtype = config, mesh, dtype, cache_dtype
        self.chunk, self.compression, self.segment = chunk, compression, segment
        self._model = sharded_model(config, mesh, dtype, cache_dtype, chunk, compression)

    @property
    def stripe(self) -> int:
        """How positions lie along the context axis, see Zigzag."""
        return self._model.stripe

    @property
    def by_layer(self) -> bool:
        """Whether prompts run through one layer after the other, see layer_by_layer."""
        return self.compression is not None and not self.compression.razor.streaming

    @property
    def decoder(self) -> Decoder:
        """The module that the steps run."""
        return self._model.decoder

    def tables(self, request_lengths: Sequence[int]) -> RotaryTables:
        """The rotary tables of a batch, whole on every device; see rotary_tables."""
        tables = rotary_tables(self.config, request_lengths)
        return jax.tree.map(lambda x: place(np.asarray(x), self._model.replicated), tables)

    def new_cache(self, spec: CacheSpec, room: int) -> KVCache:
        """An empty cache on the mesh, of which `room` slots are for prompts."""
        if self.compression:
            return _empty_compressed(self.config.traced, self.mesh, spec, self.compression, room)
        return _empty(self.config.traced, self.mesh, spec)

    def prefill(
        self,
        params: dict,
        tables: RotaryTables,
        cache: KVCache,
        tokens: np.ndarray,
        start: int,
        lengths: np.ndarray,
        last: jax.Array | None,
    ) -> tuple[KVCache, jax.Array]:
        """Runs one chunk of every prompt.

        Args:
          params: the model's.
          tables: of the requests.
          cache: holding the prompts before `start`; donated.
          tokens: [batch, chunk] ids; anything after a prompt's end.
          start: position of the chunk's first token.
          lengths: [batch] tokens of each prompt.
          last: [batch, hidden], from the chunk before; None for the first chunk.

        Returns:
          The cache, and the hidden state of each prompt's last token once it has been run.
        """
        if last is None:
            shape = tokens.shape[0], self.config.hidden_size
            last = jnp.zeros(shape, self.dtype, device=self._model.rows)
        tokens, lengths = self._place(tokens), self._place(lengths)
        return steps.prefill(
            self._model, params, tables, cache, tokens, np.int32(start), lengths, last
        )

    def embed(self, params: dict, tokens: jax.Array) -> jax.Array:
        """[batch, chunk] ids -> [batch, chunk, hidden], what the first layer gets, dealt out."""
        return steps.embed(self._model, params, tokens)

    def prefill_by_layer(
        self,
        params: dict,
        tables: RotaryTables,
        tokens: np.ndarray,
        lengths: np.ndarray,
        spec: CacheSpec,
        room: int,
        on_chunk: Callable[[int, int], None],
    ) -> tuple[KVCache, jax.Array]:
        """Runs whole prompts, [batch, chunks * chunk] ids, into a compressed cache.

        See layer_by_layer.prefill_by_layer; only of an engine with compression.
        """
        chunks = np.split(tokens, tokens.shape[1] // self.chunk, axis=1)
        hidden = [self.embed(params, self._place(chunk)) for chunk in chunks]
        lengths = self._place(lengths)
        return prefill_by_layer(self._model, params, tables, hidden, lengths, spec, room, on_chunk)

    def score(
        self, params: dict, tables: RotaryTables, cache: KVCache, tokens: np.ndarray, start: int
    ) -> tuple[KVCache, jax.Array]:
        """Like prefill, with the logits of every position: [batch, chunk, vocab] float32."""
        return steps.score(self._model, params, tables, cache, self._place(tokens), np.int32(start))

    def for_samples(
        self, params: dict, cache: KVCache, last: jax.Array, samples: int
    ) -> tuple[KVCache, jax.Array]:
        """What `prefill` returned, with so many rows one after the other for each of its rows."""
        return steps.for_samples(self._model, params, cache, last, samples=samples)

    def first(
        self,
        params: dict,
        cache: KVCache,
        last: jax.Array,
        lengths: np.ndarray,
        draw: Draw = Draw(),  # noqa: B008 (frozen)
        seen: np.ndarray | None = None,
    ) -> DecodeState:
        """Chooses each row's first token from the hidden state of its prompt's last.

        `seen` is [batch, vocab], whether a token is in the prompt; only where `draw` penalises it.
        """
        seen = None if seen is None else self._place(seen, np.bool_)
        return DecodeState(
            cache=cache,
            token=steps.first(self._model, params, last, draw, seen),
            position=self._place(lengths),
            step=jnp.ones((), jnp.int32, device=self._model.replicated),
            seen=seen,
        )

    def decode(
        self,
        params: dict,
        tables: RotaryTables,
        state: DecodeState,
        draw: Draw = Draw(),  # noqa: B008 (frozen)
    ) -> tuple[DecodeState, jax.Array]:
        """Decodes one segment; the state is donated. Returns it and [batch, segment] new ids."""
        return steps.decode(self._model, params, tables, state, draw, steps=self.segment)

    def force(
        self, params: dict, tables: RotaryTables, cache: KVCache, tokens: jax.Array, position: int
    ) -> tuple[KVCache, jax.Array]:
        """Decodes a segment of tokens that are given.

        Args:
          params: the model's.
          tables: of the requests.
          cache: holding all before the first of them; donated.
          tokens: [batch, segment] ids.
          position: of the first, in every row.

        Returns:
          The cache with them, and [batch, segment, vocab] float32 logits of the tokens after each.
        """
        return steps.force(
            self._model, params, tables, cache, self._place(tokens), np.int32(position)
        )

    def start_lookup(self, state: DecodeState, tokens: np.ndarray, last: np.ndarray) -> LookupState:
        """Goes on from the first token with prompt lookup.

        Args:
          state: as `first` returned it.
          tokens: [batch, room] ids of the prompts, with room for the answers and a draft.
          last: [batch] positions of the last tokens wanted.
        """
        tokens[np.arange(len(tokens)), to_host(state.position)] = to_host(state.token)
        return LookupState(
            cache=state.cache,
            tokens=self._place(tokens),
            position=state.position,
            last=self._place(last),
        )

    def decode_with_lookup(
        self, params: dict, tables: RotaryTables, state: LookupState, count: int
    ) -> tuple[LookupState, tuple[jax.Array, jax.Array]]:
        """Decodes one segment, drafting `count` tokens at each step; the state is donated.

        Returns:
          It, and of each step [batch, segment, count + 1] ids and [batch, segment] how many of
          them, the first ones, go on with the answer; none where a row has ended.
        """
        return steps.decode_with_lookup(
            self._model, params, tables, state, steps=self.segment, drafted=count
        )

    def compile_ahead(
        self, spec: CacheSpec, room: int
    ) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """Compiles prefill of a chunk and decode of a segment for a mesh that may not be here.

        Args:
          spec: of the cache.
          room: tokens of prompt that it has room for.

        Returns:
          Both programs; their memory_analysis() gives the bytes that each device needs. Prefill
          is that of a layer, where layers are run one by one.
        """
        model = self._model
        whole = model.replicated

        def abstract(x: Any, placed: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

        def rows(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((spec.batch, *shape), dtype, sharding=model.rows)

        params = unflatten(abstract_parameters(self.config, self.mesh, self.dtype))
        tables = jax.tree.map(
            lambda x: abstract(x, whole), rotary_tables(self.config, [spec.capacity] * spec.batch)
        )
        cache = whole_cache = jax.tree.map(
            abstract,
            jax.eval_shape(lambda: empty_cache(self.config, spec, model.platform)),
            model.cache,
        )
        if self.compression:
            cache = _compressed_shapes(model.config, self.mesh, spec, self.compression, room)
        count = jax.ShapeDtypeStruct((), "int32", sharding=whole)
        state = DecodeState(cache=cache, token=rows(), position=rows(), step=count)
        hidden = rows(self.config.hidden_size, dtype=self.dtype)
        with jax.set_mesh(self.mesh):  # tells Pallas which GPU it is for
            if self.by_layer:
                layer = params["layers_0"], tables, whole_cache[0]
                prefill = lower_layer(model, *layer, spec.batch, self.chunk, rows(), count)
            else:
                tokens = rows(self.chunk)
                prefill = steps.prefill.lower(
                    model, params, tables, cache, tokens, count, rows(), hidden
                )
            decode = steps.decode.lower(model, params, tables, state, Draw(), steps=self.segment)
            lowered = prefill, decode
        with concurrent.futures.ThreadPoolExecutor() as pool:
            prefill, decode = pool.map(jax.stages.Lowered.compile, lowered)
        return prefill, decode

    def _place(self, rows: np.ndarray, dtype: type = np.int32) -> jax.Array:
        return place(np.asarray(rows, dtype), self._model.rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, mesh: Mesh, spec: CacheSpec) -> KVCache:
    where = cache_shardings(config, mesh, spec.dtype, spec.stripe)
    cache = empty_cache(config, spec, mesh.devices.flat[0].platform)
    return jax.lax.with_sharding_constraint(cache, where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_compressed(
    config: ModelConfig, mesh: Mesh, spec: CacheSpec, compression: Compression, room: int
) -> KVCache:
    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.zeros(x.shape, x.dtype), x.sharding)

    return jax.tree.map(zeros, _compressed_shapes(config, mesh, spec, compression, room))


def _compressed_shapes(
    config: ModelConfig, mesh: Mesh, spec: CacheSpec, compression: Compression, room: int
) -> KVCache:
    """Shapes of a compressed cache, and where they lie."""
    platform = mesh.devices.flat[0].platform
    layers = compressed_shapes(config, spec, compression, room, mesh.shape["context"], platform)

    def placed(x: jax.ShapeDtypeStruct, where: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, where))

    return tuple(jax.tree.map(placed, x, compressed_cache_spec(x)) for x in layers)
