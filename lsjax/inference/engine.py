"""The engine: runs a model's compiled steps on a mesh and compiles them ahead of time."""

import concurrent.futures
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.cache import CacheSpec, KVCache, Zigzag, empty_cache
from lsjax.cache.partition_specs import cache_shardings, compressed_cache_spec
from lsjax.compression import Compression
from lsjax.compression.shapes import compressed_shapes
from lsjax.config import ModelConfig
from lsjax.distributed.multihost import to_host
from lsjax.distributed.sharding import put_on_mesh, sharding
from lsjax.inference import steps
from lsjax.inference.layerwise_prefill import lower_layer, prefill_by_layer
from lsjax.inference.sampling import NOT_A_NUMBER, Draw
from lsjax.inference.sharded_model import sharded_model
from lsjax.inference.steps import DecodeState, LookupState
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.rotary import RotaryTables, rotary_tables

SEGMENT = 16  # decode steps between two checks for end-of-sequence


class Engine:
    """A model's programs on a mesh, compiled for the argument shapes that occur.

    Engines that differ only in the model's rope_scaling share compiled programs.

    Attributes:
      config: model configuration.
      mesh: device mesh.
      dtype: dtype of weights and activations.
      cache_dtype: dtype of the KV cache, one of CACHE_DTYPES.
      chunk: prompt tokens per prefill step; a whole number of zigzag blocks, see Zigzag.
      compression: KV head compression, or None.
      segment: decode steps between two checks for end-of-sequence.
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
    def zigzag(self) -> Zigzag:
        """Layout of positions along the context axis."""
        return self._model.zigzag

    @property
    def by_layer(self) -> bool:
        """Whether prompts are prefilled layer by layer, see layerwise_prefill."""
        return self.compression is not None and not self.compression.razor.streaming

    @property
    def decoder(self) -> Decoder:
        """The Flax module that the steps run."""
        return self._model.decoder

    def tables(self, request_lengths: Sequence[int]) -> RotaryTables:
        """Returns the rotary tables of a batch, replicated on all devices; see rotary_tables."""
        tables = rotary_tables(self.config, request_lengths)
        return jax.tree.map(lambda x: put_on_mesh(np.asarray(x), self._model.replicated), tables)

    def new_cache(self, spec: CacheSpec, prompt_capacity: int) -> KVCache:
        """Creates an empty cache on the mesh, for prompts of up to `prompt_capacity` tokens."""
        if self.compression:
            return _empty_compressed(
                self.config.traced, self.mesh, spec, self.compression, prompt_capacity
            )
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
        """Prefills one chunk of every prompt.

        Args:
          params: model parameters.
          tables: rotary tables of the batch.
          cache: cache of the prompts up to `start`; donated.
          tokens: [batch, chunk] ids; arbitrary after a prompt's end.
          start: position of the chunk's first token.
          lengths: [batch] number of tokens in each prompt.
          last: [batch, hidden] hidden states returned for the previous chunk; None for the first
            chunk.

        Returns:
          The new cache, and [batch, hidden] hidden states of the prompts' last tokens. A row is
          valid once its prompt's last token has been run.
        """
        if last is None:
            shape = tokens.shape[0], self.config.hidden_size
            last = jnp.zeros(shape, self.dtype, device=self._model.rows)
        tokens, lengths = self._place(tokens), self._place(lengths)
        return steps.prefill(
            self._model, params, tables, cache, tokens, np.int32(start), lengths, last
        )

    def embed(self, params: dict, tokens: jax.Array) -> jax.Array:
        """Embeds a chunk: [batch, chunk] ids -> [batch, chunk, hidden] in zigzag order."""
        return steps.embed(self._model, params, tokens)

    def prefill_by_layer(
        self,
        params: dict,
        tables: RotaryTables,
        tokens: np.ndarray,
        lengths: np.ndarray,
        spec: CacheSpec,
        prompt_capacity: int,
        on_chunk: Callable[[int, int], None],
    ) -> tuple[KVCache, jax.Array]:
        """Prefills whole prompts, [batch, chunks * chunk] ids, into a compressed cache.

        The engine must have compression. See layerwise_prefill.prefill_by_layer.
        """
        chunks = np.split(tokens, tokens.shape[1] // self.chunk, axis=1)
        hidden = [self.embed(params, self._place(chunk)) for chunk in chunks]
        lengths = self._place(lengths)
        return prefill_by_layer(
            self._model, params, tables, hidden, lengths, spec, prompt_capacity, on_chunk
        )

    def score(
        self, params: dict, tables: RotaryTables, cache: KVCache, tokens: np.ndarray, start: int
    ) -> tuple[KVCache, jax.Array]:
        """Like `prefill`, but returns every position's logits: [batch, chunk, vocab] float32."""
        return steps.score(self._model, params, tables, cache, self._place(tokens), np.int32(start))

    def for_samples(
        self, params: dict, cache: KVCache, last: jax.Array, samples: int
    ) -> tuple[KVCache, jax.Array]:
        """Repeats each row of what `prefill` returned `samples` times in a row."""
        return steps.for_samples(self._model, params, cache, last, samples=samples)

    def first(
        self,
        params: dict,
        cache: KVCache,
        last: jax.Array,
        lengths: np.ndarray,
        ends: np.ndarray,
        draw: Draw = Draw(),  # noqa: B008 (frozen)
        seen: np.ndarray | None = None,
    ) -> DecodeState:
        """Chooses each row's first token from the hidden state of its prompt's last token.

        Args:
          params: model parameters.
          cache: cache of the prompts.
          last: [batch, hidden] hidden states of the prompts' last tokens.
          lengths: [batch] prompt lengths in tokens.
          ends: [batch] positions of the last tokens to generate.
          draw: how tokens are drawn.
          seen: [batch, vocab] whether the prompt contains a token; given only if `draw` penalizes
            repetition.
        """
        seen = None if seen is None else self._place(seen, np.bool_)
        return DecodeState(
            cache=cache,
            token=steps.first(self._model, params, last, draw, seen),
            position=self._place(lengths),
            last=self._place(ends),
            step=jnp.ones((), jnp.int32, device=self._model.replicated),
            seen=seen,
        )

    def decode(
        self,
        params: dict,
        tables: RotaryTables,
        state: DecodeState,
        draw: Draw = Draw(),  # noqa: B008 (frozen)
        eos: Collection[int] = (),
    ) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
        """Decodes one segment, or until all rows are done; `state` is donated.

        Args:
          params: model parameters.
          tables: rotary tables of the batch.
          state: state before the segment.
          draw: how tokens are drawn.
          eos: ids that end a row.

        Returns:
          The new state, [batch, segment] new ids and the number of steps that were run; later
          ids, and those of a row that was done before, are undefined.
        """
        eos = _padded(eos)
        return steps.decode(self._model, params, tables, state, draw, eos, steps=self.segment)

    def teacher_forced_decode(
        self, params: dict, tables: RotaryTables, cache: KVCache, tokens: jax.Array, position: int
    ) -> tuple[KVCache, jax.Array]:
        """Decodes a segment of given tokens.

        Args:
          params: model parameters.
          tables: rotary tables of the batch.
          cache: cache of all tokens before `position`; donated.
          tokens: [batch, segment] ids.
          position: position of the first of `tokens`, the same in every row.

        Returns:
          The cache with `tokens` added, and [batch, segment, vocab] float32 logits of the token
          that follows each of them.
        """
        return steps.teacher_forced_decode(
            self._model, params, tables, cache, self._place(tokens), np.int32(position)
        )

    def init_speculative_state(
        self, state: DecodeState, tokens: np.ndarray, eos: Collection[int]
    ) -> LookupState:
        """Converts the state after the first token for decoding with prompt lookup.

        Args:
          state: state that `first` returned.
          tokens: [batch, room] ids of the prompts, with room for the answers and one draft;
            the first tokens are written into it.
          eos: ids that end a row.
        """
        token, position = to_host(state.token), to_host(state.position)
        tokens[np.arange(len(tokens)), position] = token
        last = np.where(np.isin(token, list(eos)), position, to_host(state.last))
        return LookupState(
            cache=state.cache,
            tokens=self._place(tokens),
            position=state.position,
            last=self._place(last),
        )

    def decode_with_lookup(
        self,
        params: dict,
        tables: RotaryTables,
        state: LookupState,
        drafted: int,
        eos: Collection[int] = (),
    ) -> tuple[LookupState, tuple[jax.Array, jax.Array, jax.Array]]:
        """Decodes one segment, or until all rows are done; `state` is donated.

        Args:
          params: model parameters.
          tables: rotary tables of the batch.
          state: state before the segment.
          drafted: tokens to draft per step.
          eos: ids that end a row.

        Returns:
          The new state, the [batch, segment, drafted + 1] ids that each step chose, the
          [batch, segment] number of leading ids that each step accepts (0 once a row is done), and
          the number of steps that were run.
        """
        eos = _padded(eos)
        return steps.decode_with_lookup(
            self._model, params, tables, state, eos, steps=self.segment, drafted=drafted
        )

    def compile_ahead(
        self, spec: CacheSpec, prompt_capacity: int
    ) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """Compiles prefill of a chunk and decode of a segment, for devices that may be absent.

        Args:
          spec: spec of the uncompressed cache.
          prompt_capacity: longest prompt that the cache holds, in tokens.

        Returns:
          The prefill and the decode program. Their memory_analysis() gives the bytes needed per
          device. If prompts are prefilled layer by layer, the prefill program runs a single layer.
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
            cache = _compressed_shapes(
                model.config, self.mesh, spec, self.compression, prompt_capacity
            )
        count = jax.ShapeDtypeStruct((), "int32", sharding=whole)
        state = DecodeState(cache, token=rows(), position=rows(), last=rows(), step=count)
        eos = jax.ShapeDtypeStruct(_padded(()).shape, "int32", sharding=whole)
        hidden = rows(self.config.hidden_size, dtype=self.dtype)
        with jax.set_mesh(self.mesh):  # tells Pallas which GPU to compile for
            if self.by_layer:
                layer = params["layers_0"], tables, whole_cache[0]
                prefill = lower_layer(model, *layer, spec.batch, self.chunk, rows(), count)
            else:
                tokens = rows(self.chunk)
                prefill = steps.prefill.lower(
                    model, params, tables, cache, tokens, count, rows(), hidden
                )
            decode = steps.decode.lower(
                model, params, tables, state, Draw(), eos, steps=self.segment
            )
            lowered = prefill, decode
        with concurrent.futures.ThreadPoolExecutor() as pool:
            prefill, decode = pool.map(jax.stages.Lowered.compile, lowered)
        return prefill, decode

    def _place(self, rows: np.ndarray, dtype: type = np.int32) -> jax.Array:
        return put_on_mesh(np.asarray(rows, dtype), self._model.rows)


def _padded(eos: Collection[int]) -> np.ndarray:
    """Returns ids in an array of one of few sizes; they include NOT_A_NUMBER."""
    size = len(eos) // 4 * 4 + 4
    return np.array([*eos, *[NOT_A_NUMBER] * (size - len(eos))], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, mesh: Mesh, spec: CacheSpec) -> KVCache:
    where = cache_shardings(config, mesh, spec.dtype, spec.zigzag)
    cache = empty_cache(config, spec, mesh.devices.flat[0].platform)
    return jax.lax.with_sharding_constraint(cache, where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_compressed(
    config: ModelConfig, mesh: Mesh, spec: CacheSpec, compression: Compression, prompt_capacity: int
) -> KVCache:
    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.zeros(x.shape, x.dtype), x.sharding)

    return jax.tree.map(zeros, _compressed_shapes(config, mesh, spec, compression, prompt_capacity))


def _compressed_shapes(
    config: ModelConfig, mesh: Mesh, spec: CacheSpec, compression: Compression, prompt_capacity: int
) -> KVCache:
    """Returns the shapes and shardings of a compressed cache."""
    platform = mesh.devices.flat[0].platform
    layers = compressed_shapes(config, spec, compression, prompt_capacity, platform)

    def placed(x: jax.ShapeDtypeStruct, where: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, where))

    return tuple(jax.tree.map(placed, x, compressed_cache_spec(x)) for x in layers)
