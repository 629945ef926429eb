"""The engine: runs a model's compiled steps on a mesh and compiles them ahead of time."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lsjax.attention import dispatch
from lsjax.cache import (
    CacheSpec,
    DocumentCache,
    KVCache,
    TokenSlice,
    cache_after,
    cache_shapes,
    from_slices,
    from_snapshot,
    shared_layers,
    states_of,
    with_layers,
    with_states,
    without_tails,
)
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import put_on_mesh
from lsjax.inference import steps
from lsjax.inference.engine_config import EngineConfig, check_chunks
from lsjax.inference.layerwise_prefill import lower_layers, prefill_by_layer
from lsjax.inference.sampling import NOT_A_NUMBER, Draw
from lsjax.inference.sharded_model import ShardedModel, sharded_model
from lsjax.inference.steps import DecodeState
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.rotary import RotaryTables, rotary_tables


class Engine:
    """A model's programs on a mesh, compiled for the argument shapes that occur.

    Engines that differ only in the model's rope_scaling share compiled programs.

    Attributes:
      config: model configuration.
      settings: how the model runs on its devices.
    """

    def __init__(self, config: ModelConfig, settings: EngineConfig):
        self.config, self.settings = config, settings
        self._model = sharded_model(config, settings)

    @property
    def by_layer(self) -> bool:
        """Whether prompts are prefilled layer by layer, see layerwise_prefill."""
        return self.settings.compression is not None and self.settings.compression.by_layer

    @property
    def least_question_chunk(self) -> int:
        """Smallest size of a question's last chunk; a CPU's time is that of its tokens."""
        return 64 if dispatch.reads_once(self._model.platform) else 16

    @property
    def dispatches_ahead(self) -> bool:
        """Whether a segment is dispatched before the tokens of the one before it are read.

        Several processes would have to dispatch everything else in the same order.
        """
        return dispatch.on_gpu(self._model.platform) and jax.process_count() == 1

    @property
    def decoder(self) -> Decoder:
        """The Flax module that the steps run."""
        return self._model.decoder

    def tables(self, request_lengths: Sequence[int]) -> RotaryTables:
        """Returns the rotary tables of a batch, replicated on all devices; see rotary_tables."""
        check_chunks(self.config, self.settings, max(request_lengths))
        tables = rotary_tables(self.config, [self.settings.span(n) for n in request_lengths])
        return jax.tree.map(lambda x: put_on_mesh(np.asarray(x), self._model.replicated), tables)

    def cache_shapes(self, spec: CacheSpec) -> KVCache:
        """Returns shapes, dtypes and shardings of a cache; see lsjax.cache.cache_shapes."""
        return cache_shapes(self._model.config, self._model.mesh, spec, self._model.platform)

    def new_cache(self, spec: CacheSpec) -> KVCache:
        """Creates an empty cache on the mesh."""
        shapes = self.cache_shapes(spec)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)

    def cache_after(self, rest: KVCache, own: CacheSpec, whole: CacheSpec) -> KVCache:
        """Creates the cache of rows that begin with a document; see lsjax.cache.cache_after."""
        return _after(self._model, own, whole, rest)

    def read_tokens(self, cache: KVCache, start: int, size: int) -> TokenSlice:
        """Reads tokens from the first row of a cache, onto every device; see take_tokens."""
        layers = without_tails(cache)
        return steps.read_tokens(self._model, layers, np.int32(start), size=size)

    def cache_of(
        self,
        spec: CacheSpec,
        slices: Iterable[tuple[int, TokenSlice]],
        snapshot: np.ndarray | None = None,
    ) -> KVCache:
        """Creates a cache of tokens that `read_tokens` has read; see from_slices.

        Nothing is compiled, which takes longer than to read them. `snapshot` is that of the states
        of recurrent layers after the tokens, if there are any.
        """
        empty = self.cache_shapes(spec)
        cache = with_layers(empty, from_slices(without_tails(empty), slices))
        if snapshot is not None:
            cache = with_states(cache, from_snapshot(states_of(empty), snapshot))

        def fill(x: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
            if isinstance(x, jax.Array):
                return x
            return put_on_mesh(np.zeros(x.shape, x.dtype), x.sharding)

        return jax.tree.map(fill, cache)

    def prefill(
        self,
        params: dict,
        tables: RotaryTables,
        cache: KVCache,
        tokens: np.ndarray,
        start: int,
        lengths: np.ndarray,
        last: jax.Array | None,
        document: DocumentCache | None = None,
    ) -> tuple[KVCache, jax.Array]:
        """Prefills one chunk of every prompt.

        Args:
          params: model parameters.
          tables: rotary tables of the batch.
          cache: cache of the prompts up to `start`; donated.
          tokens: [batch, chunk] ids; arbitrary after a prompt's end.
          start: position of the chunk's first token, a multiple of settings.prefill_chunk, or of
            the chunk's size if that divides it, unless there is a document.
          lengths: [batch] number of tokens in each prompt.
          last: [batch, hidden] hidden states returned for the previous chunk; None for the first
            chunk.
          document: what all prompts begin with, which `cache` does not hold; or None.

        Returns:
          The new cache, and [batch, hidden] hidden states of the prompts' last tokens. A row is
          valid once its prompt's last token has been run.
        """
        if document is None:
            self._check_chunk(tokens, start)
        if last is None:
            shape = tokens.shape[0], self.config.hidden_size
            last = jnp.zeros(shape, self.settings.dtype, device=self._model.rows)
        tokens, lengths = self._place(tokens), self._place(lengths)
        return steps.prefill(
            *(self._model, params, tables, cache, tokens, np.int32(start), lengths, last),
            _shared(document),
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
        on_chunk: Callable[[int, int], None],
    ) -> tuple[KVCache, jax.Array]:
        """Prefills whole prompts, [batch, chunks * chunk] ids, into a compressed cache.

        The engine must have compression. See layerwise_prefill.prefill_by_layer.
        """
        chunks = np.split(tokens, tokens.shape[1] // self.settings.prefill_chunk, axis=1)
        hidden = [self.embed(params, self._place(chunk)) for chunk in chunks]
        lengths = self._place(lengths)
        return prefill_by_layer(self._model, params, tables, hidden, lengths, spec, on_chunk)

    def score(
        self,
        params: dict,
        tables: RotaryTables,
        cache: KVCache,
        tokens: np.ndarray,
        start: int,
        lengths: np.ndarray,
    ) -> tuple[KVCache, jax.Array]:
        """Like `prefill`, but returns every position's logits: [batch, chunk, vocab] float32."""
        self._check_chunk(tokens, start)
        tokens, lengths = self._place(tokens), self._place(lengths)
        return steps.score(self._model, params, tables, cache, tokens, np.int32(start), lengths)

    def for_samples(
        self, cache: KVCache, last: jax.Array, samples: int
    ) -> tuple[KVCache, jax.Array]:
        """Repeats each row of what `prefill` returned `samples` times in a row."""
        return steps.for_samples(self._model, cache, last, samples=samples)

    def first(
        self,
        params: dict,
        cache: KVCache,
        hidden: jax.Array,
        lengths: np.ndarray,
        ends: np.ndarray,
        draw: Draw = Draw(),  # noqa: B008 (frozen)
        eos: Collection[int] = (),
        seen: np.ndarray | None = None,
        text: np.ndarray | None = None,
    ) -> DecodeState:
        """Chooses each row's first token from the hidden state of its prompt's last token.

        Args:
          params: model parameters.
          cache: cache of the prompts.
          hidden: [batch, hidden] hidden states of the prompts' last tokens.
          lengths: [batch] prompt lengths in tokens.
          ends: [batch] positions of the last tokens to generate.
          draw: how tokens are drawn.
          eos: ids that end a row.
          seen: [batch, vocab] whether the prompt contains a token; given only if `draw` penalizes
            repetition.
          text: [batch, room] ids of the prompts, with room for the answers and one draft; given
            only if tokens are drafted.
        """
        seen = None if seen is None else self._place(seen, np.bool_)
        text = None if text is None else self._place(text)
        position, ends = self._place(lengths), self._place(ends)
        token, last, text = steps.first(
            self._model, params, hidden, position, ends, draw, _padded(eos), seen, text
        )
        step = jnp.ones((), jnp.int32, device=self._model.replicated)
        return DecodeState(cache, token, position, last, step, seen, text)

    def decode(
        self,
        params: dict,
        tables: RotaryTables,
        state: DecodeState,
        draw: Draw = Draw(),  # noqa: B008 (frozen)
        eos: Collection[int] = (),
        drafted: int = 0,
        document: DocumentCache | None = None,
    ) -> tuple[DecodeState, tuple[jax.Array, jax.Array, jax.Array]]:
        """Decodes one segment, or until all rows are done; `state` is donated.

        Args:
          params: model parameters.
          tables: rotary tables of the batch.
          state: state before the segment.
          draw: how tokens are drawn; greedily if any are drafted.
          eos: ids that end a row.
          drafted: tokens to draft per step by prompt lookup.
          document: what all rows begin with, which the cache does not hold; or None.

        Returns:
          The new state, the [batch, segment, drafted + 1] ids that each step chose, the
          [batch, segment] number of leading ids that each step accepts (0 once a row is done), and
          the number of steps that were run.
        """
        static = {"steps": self.settings.segment, "drafted": drafted}
        eos, shared = _padded(eos), _shared(document)
        return steps.decode(self._model, params, tables, state, draw, eos, shared, **static)

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

    def compile_ahead(
        self, spec: CacheSpec, document: CacheSpec | None = None
    ) -> tuple[jax.stages.Compiled, ...]:
        """Compiles what `lower_ahead` lowers.

        Returns:
          The compiled programs. Their memory_analysis() gives the bytes needed per device.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            lowered = self.lower_ahead(spec, document)
            return tuple(pool.map(jax.stages.Lowered.compile, lowered))

    def lower_ahead(
        self, spec: CacheSpec, document: CacheSpec | None = None
    ) -> tuple[jax.stages.Lowered, ...]:
        """Lowers prefill of a chunk and decode of a segment, for devices that may be absent.

        Args:
          spec: spec of the cache.
          document: spec of the cache of a document that all rows begin with, or None.

        Returns:
          The prefill and the decode program. If prompts are prefilled layer by layer, there is a
          prefill program for each kind of layer, which runs a single one.
        """
        model = self._model
        whole = model.replicated

        def abstract(x: Any, placed: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

        def rows(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((spec.batch, *shape), dtype, sharding=model.rows)

        params = unflatten(
            abstract_parameters(self.config, model.mesh, model.dtype, model.weight_dtype)
        )
        whole_spec, held = spec, None
        if document is not None:
            spec = dataclasses.replace(spec, policy=None)  # rows keep their own tokens
            whole_spec = dataclasses.replace(spec, capacity=spec.capacity + document.capacity)
            spec = dataclasses.replace(spec, chunk=0)  # questions begin anywhere
            layers = self.cache_shapes(document)
            length = jax.ShapeDtypeStruct((), "int32", sharding=whole)
            held = DocumentCache(shared_layers(layers, self.config.layers), length, ())
        lengths = [self.settings.span(whole_spec.capacity)] * spec.batch
        tables = jax.tree.map(lambda x: abstract(x, whole), rotary_tables(self.config, lengths))
        own, windowed = map(self.cache_shapes, (spec, whole_spec))
        windows = self.config.windows
        cache = tuple(x if w is None else y for w, x, y in zip(windows, own, windowed, strict=True))
        count = jax.ShapeDtypeStruct((), "int32", sharding=whole)
        state = DecodeState(cache, token=rows(), position=rows(), last=rows(), step=count)
        eos = jax.ShapeDtypeStruct(_padded(()).shape, "int32", sharding=whole)
        hidden = rows(self.config.hidden_size, dtype=self.settings.dtype)
        with jax.set_mesh(self.settings.mesh):  # tells Pallas which GPU to compile for
            if self.by_layer and document is None:
                prefill = lower_layers(model, params, tables, spec, self.settings.prefill_chunk)
            else:
                tokens = rows(self.settings.prefill_chunk)
                args = tables, cache, tokens, count, rows(), hidden, held
                prefill = (steps.prefill.lower(model, params, *args),)
            static = {"steps": self.settings.segment, "drafted": 0}
            decode = steps.decode.lower(model, params, tables, state, Draw(), eos, held, **static)
            return *prefill, decode

    def _check_chunk(self, tokens: np.ndarray, start: int) -> None:
        """Refuses a chunk whose caches were compiled for others; see CacheSpec.chunk."""
        chunk, size = self.settings.prefill_chunk, tokens.shape[1]
        if size > chunk or start % (chunk if chunk % size else size):
            raise ValueError(
                f"a chunk has at most {chunk} tokens and starts at a multiple of as many, or of "
                f"its own size if that divides them, not {size} tokens at {start}"
            )

    def _place(self, rows: np.ndarray, dtype: type = np.int32) -> jax.Array:
        return put_on_mesh(np.asarray(rows, dtype), self._model.rows)


def _padded(eos: Collection[int]) -> np.ndarray:
    """Returns ids in an array of one of few sizes; they include NOT_A_NUMBER."""
    size = len(eos) // 4 * 4 + 4
    return np.array([*eos, *[NOT_A_NUMBER] * (size - len(eos))], np.int32)


def _shared(document: DocumentCache | None) -> DocumentCache | None:
    """Returns a document without what rows copy, whatever they have copied."""
    return document and document.replace(rest=(), states=())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _after(model: ShardedModel, own: CacheSpec, whole: CacheSpec, rest: KVCache) -> KVCache:
    return model.as_cache(cache_after(rest, model.config, own, whole, model.platform))
