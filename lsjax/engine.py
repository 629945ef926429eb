"""The compiled steps of inference: prefill a chunk, choose the first token, decode a segment."""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax import lookup
from lsjax.cache import CacheSpec, KVCache, Zigzag, empty_cache, stripe_of
from lsjax.compilation import CompileClock, Program, compiler_options
from lsjax.compression import Compression
from lsjax.compression.arrange import query_heads
from lsjax.compression.shapes import compressed_shapes
from lsjax.config import ModelConfig
from lsjax.hosts import to_host
from lsjax.layer_by_layer import LayerByLayer, last_hidden
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.rotary import RotaryTables, rotary_tables
from lsjax.sampling import Draw, next_token
from lsjax.sharding import (
    CHUNK,
    TOKENS,
    cache_shardings,
    compressed_cache_spec,
    place,
    sharding,
    without,
)

SEGMENT = 16  # steps of decoding between two looks at the end-of-sequence


@flax.struct.dataclass
class DecodeState:
    """What one decode step hands to the next.

    Attributes:
      cache: holds every token before `token`.
      token: [batch] the tokens chosen last, not yet in the cache.
      position: [batch] where they stand.
      step: how many tokens have been chosen for each row.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    step: jax.Array


@flax.struct.dataclass
class LookupState:
    """What one decode step with prompt lookup hands to the next.

    Attributes:
      cache: holds every token before each row's position.
      tokens: [batch, room] ids of each row; those after its position mean nothing.
      position: [batch] of the tokens chosen last.
      last: [batch] the positions at which rows end.
    """

    cache: KVCache
    tokens: jax.Array
    position: jax.Array
    last: jax.Array


class Engine:
    """A model's programs on a mesh, compiled for the shapes that come.

    Attributes:
      chunk: tokens of prompt run at once; whole stripes, see Zigzag.
      stripe: how positions lie along the context axis.
      clock: what compiling them has cost.
      compression: of the KV heads, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        dtype: str,
        cache_dtype: str,
        chunk: int,
        compression: Compression | None = None,
    ):
        self.config, self.mesh, self.dtype, self.cache_dtype = config, mesh, dtype, cache_dtype
        self.compression = compression
        context = mesh.shape["context"]
        self.chunk, self.stripe = chunk, stripe_of(chunk, context)
        self._zigzag = Zigzag(context, self.stripe)
        self.clock = CompileClock()
        gather = _gather(config, mesh, dtype) if context > 1 else None
        heads = compression and query_heads(config, compression)
        self._decoder = Decoder(config, mesh, jnp.dtype(dtype), gather, heads)
        self._rows = sharding(mesh, TOKENS)
        whole = sharding(mesh, PartitionSpec())
        cache = cache_shardings(config, mesh, cache_dtype, self.stripe)
        # A compressed cache's structure depends on its size; it stays where attention leaves it.
        decoded = None if compression else cache
        state = DecodeState(cache=decoded, token=self._rows, position=self._rows, step=whole)

        self._platform = mesh.devices.flat[0].platform
        options = compiler_options(self._platform)

        def program(function, **jit_options):
            return Program(function, self.clock, compiler_options=options, **jit_options)

        self._layer_by_layer = compression and LayerByLayer(
            config, mesh, compression, self._zigzag, self._decoder, program
        )
        self._prefill = program(
            self._prefill_step, donate_argnums=2, out_shardings=(decoded, self._rows)
        )
        self._score = program(self._score_step, donate_argnums=2, out_shardings=(cache, self._rows))
        self._embed = program(self._embed_step, out_shardings=sharding(mesh, CHUNK))
        self._first = program(self._first_step, out_shardings=self._rows)
        self._decode = program(
            self._decode_segment, donate_argnums=2, out_shardings=(state, self._rows)
        )
        self._force = program(
            self._force_segment, donate_argnums=2, out_shardings=(decoded, self._rows)
        )
        rows = self._rows
        looking = LookupState(cache=cache, tokens=rows, position=rows, last=rows)
        self._lookup = [
            program(
                functools.partial(self._lookup_segment, drafted=count),
                donate_argnums=2,
                out_shardings=(looking, (rows, rows)),
            )
            for count in range(lookup.MOST_DRAFTED + 1)
        ]
        self._empty = jax.jit(
            lambda spec: empty_cache(config, spec, self._platform),
            static_argnums=0,
            out_shardings=cache,
        )

    def _empty_compressed(self, spec: CacheSpec, room: int) -> KVCache:
        shapes = self._compressed_shapes(spec, room)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)

        def zeros() -> KVCache:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return jax.jit(zeros, out_shardings=shardings)()

    def _compressed_shapes(self, spec: CacheSpec, room: int) -> KVCache:
        """Shapes of a compressed cache, and where they lie."""
        layers = compressed_shapes(
            self.config, spec, self.compression, room, self.mesh.shape["context"], self._platform
        )

        def placed(x: jax.ShapeDtypeStruct, where: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(self.mesh, where))

        return tuple(jax.tree.map(placed, x, compressed_cache_spec(x)) for x in layers)

    @property
    def by_layer(self) -> bool:
        """Whether prompts run through one layer after the other, see LayerByLayer."""
        return self.compression is not None and not self.compression.razor.streaming

    def tables(self, request_lengths: Sequence[int]) -> RotaryTables:
        """The rotary tables of a batch, whole on every device; see rotary_tables."""
        whole = sharding(self.mesh, PartitionSpec())
        tables = rotary_tables(self.config, request_lengths)
        return jax.tree.map(lambda x: place(np.asarray(x), whole), tables)

    def new_cache(self, spec: CacheSpec, room: int) -> KVCache:
        """An empty cache on the mesh, of which `room` slots are for prompts."""
        if self.compression:
            return self._empty_compressed(spec, room)
        return self._empty(spec)

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
            last = jnp.zeros(shape, self.dtype, device=self._rows)
        tokens, lengths = self._place(tokens), self._place(lengths)
        return self._prefill(params, tables, cache, tokens, np.int32(start), lengths, last)

    def embed(self, params: dict, tokens: jax.Array) -> jax.Array:
        """[batch, chunk] ids -> [batch, chunk, hidden], what the first layer gets, dealt out."""
        return self._embed(params, tokens)

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

        See LayerByLayer; only of an engine with compression.
        """
        chunks = np.split(tokens, tokens.shape[1] // self.chunk, axis=1)
        hidden = [self.embed(params, self._place(chunk)) for chunk in chunks]
        lengths = self._place(lengths)
        return self._layer_by_layer(params, tables, hidden, lengths, spec, room, on_chunk)

    def score(
        self, params: dict, tables: RotaryTables, cache: KVCache, tokens: np.ndarray, start: int
    ) -> tuple[KVCache, jax.Array]:
        """Like prefill, with the logits of every position: [batch, chunk, vocab] float32."""
        return self._score(params, tables, cache, self._place(tokens), np.int32(start))

    def first(
        self, params: dict, cache: KVCache, last: jax.Array, lengths: np.ndarray, draw: Draw | None
    ) -> DecodeState:
        """Chooses each row's first token from the hidden state of its prompt's last."""
        return DecodeState(
            cache=cache,
            token=self._first(params, last, draw),
            position=self._place(lengths),
            step=jnp.ones((), jnp.int32, device=sharding(self.mesh, PartitionSpec())),
        )

    def decode(
        self, params: dict, tables: RotaryTables, state: DecodeState, draw: Draw | None
    ) -> tuple[DecodeState, jax.Array]:
        """Decodes one segment; the state is donated. Returns it and [batch, SEGMENT] new ids."""
        return self._decode(params, tables, state, draw)

    def force(
        self, params: dict, tables: RotaryTables, cache: KVCache, tokens: jax.Array, position: int
    ) -> tuple[KVCache, jax.Array]:
        """Decodes a segment of tokens that are given.

        Args:
          params: the model's.
          tables: of the requests.
          cache: holding all before the first of them; donated.
          tokens: [batch, SEGMENT] ids.
          position: of the first, in every row.

        Returns:
          The cache with them, and [batch, SEGMENT, vocab] float32 logits of the tokens after each.
        """
        return self._force(params, tables, cache, self._place(tokens), np.int32(position))

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
          It, and of each step [batch, SEGMENT, count + 1] ids and [batch, SEGMENT] how many of
          them, the first ones, go on with the answer; none where a row has ended.
        """
        return self._lookup[count](params, tables, state)

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
        whole = sharding(self.mesh, PartitionSpec())

        def abstract(x: Any, placed: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

        def rows(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((spec.batch, *shape), dtype, sharding=self._rows)

        params = unflatten(abstract_parameters(self.config, self.mesh, self.dtype))
        tables = jax.tree.map(
            lambda x: abstract(x, whole), rotary_tables(self.config, [spec.capacity] * spec.batch)
        )
        cache = whole_cache = jax.tree.map(
            abstract,
            jax.eval_shape(lambda: empty_cache(self.config, spec, self._platform)),
            cache_shardings(self.config, self.mesh, self.cache_dtype, self.stripe),
        )
        if self.compression:
            cache = self._compressed_shapes(spec, room)
        count = jax.ShapeDtypeStruct((), "int32", sharding=whole)
        state = DecodeState(cache=cache, token=rows(), position=rows(), step=count)
        hidden = rows(self.config.hidden_size, dtype=self.dtype)
        with jax.set_mesh(self.mesh):  # tells Pallas which GPU it is for
            if self.by_layer:
                layer = params["layers_0"], tables, whole_cache[0]
                prefill = self._layer_by_layer.lower(*layer, spec.batch, self.chunk, rows(), count)
            else:
                tokens = rows(self.chunk)
                prefill = self._prefill.lower(params, tables, cache, tokens, count, rows(), hidden)
            lowered = prefill, self._decode.lower(params, tables, state, None)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            prefill, decode = pool.map(jax.stages.Lowered.compile, lowered)
        return prefill, decode

    def _place(self, rows: np.ndarray) -> jax.Array:
        return place(np.asarray(rows, np.int32), self._rows)

    def _run(self, params, tokens, positions, tables, cache, lengths=None, decode=False):
        return self._decoder.apply(
            {"params": params}, tokens, positions, tables, cache, lengths, decode
        )

    def _logits(self, params, hidden):
        return self._decoder.apply({"params": params}, hidden, method="logits")

    def _prefill_step(self, params, tables, cache, tokens, start, lengths, last):
        tokens, positions = self._deal_out(tokens, start)
        hidden, cache = self._run(params, tokens, positions, tables, cache, lengths)
        return cache, last_hidden(hidden, positions, lengths, last)

    def _score_step(self, params, tables, cache, tokens, start):
        tokens, positions = self._deal_out(tokens, start)
        hidden, cache = self._run(params, tokens, positions, tables, cache)
        if self._zigzag.devices > 1:
            hidden = hidden[:, np.argsort(self._zigzag.order(hidden.shape[1]))]
        return cache, self._logits(params, hidden)

    def _deal_out(self, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A chunk's tokens and their positions, each device's part of the sequence on it."""
        order = self._zigzag.order(tokens.shape[1])
        positions = self._zigzag.chunk_positions(start, *tokens.shape)
        if self._zigzag.devices == 1:
            return tokens, positions
        parts = sharding(self.mesh, CHUNK)
        return tuple(
            jax.lax.with_sharding_constraint(x, parts) for x in (tokens[:, order], positions)
        )

    def _embed_step(self, params, tokens):
        tokens, _ = self._deal_out(tokens, 0)
        return self._decoder.apply({"params": params}, tokens, method="embed_tokens")

    def _first_step(self, params, last, draw):
        return next_token(self._logits(params, last[:, None])[:, 0], draw, jnp.int32(0))

    def _decode_segment(self, params, tables, state, draw):
        def step(state: DecodeState, _) -> tuple[DecodeState, jax.Array]:
            tokens, positions = state.token[:, None], state.position[:, None]
            hidden, cache = self._run(params, tokens, positions, tables, state.cache, decode=True)
            token = next_token(self._logits(params, hidden)[:, 0], draw, state.step)
            state = DecodeState(
                cache=cache, token=token, position=state.position + 1, step=state.step + 1
            )
            return state, token

        state, tokens = jax.lax.scan(step, state, length=SEGMENT)
        return state, tokens.T

    def _force_segment(self, params, tables, cache, tokens, position):
        def step(carry, token):
            cache, at = carry
            positions = jnp.broadcast_to(at, token.shape)[:, None]
            hidden, cache = self._run(params, token[:, None], positions, tables, cache, decode=True)
            return (cache, at + 1), self._logits(params, hidden)[:, 0]

        (cache, _), scores = jax.lax.scan(step, (cache, position), tokens.T)
        return cache, scores.swapaxes(0, 1)

    def _lookup_segment(self, params, tables, state, *, drafted):
        def step(state: LookupState, _) -> tuple[LookupState, tuple[jax.Array, jax.Array]]:
            at = state.position[:, None]
            draft = lookup.draft(state.tokens, state.position, drafted)
            tokens = jnp.take_along_axis(state.tokens, at, axis=1)
            tokens = jnp.concatenate([tokens, draft], axis=1)
            positions = at + jnp.arange(drafted + 1)
            hidden, cache = self._run(params, tokens, positions, tables, state.cache, decode=True)
            chosen = jnp.argmax(self._logits(params, hidden), axis=-1).astype(jnp.int32)
            new = jnp.minimum(lookup.agreed(draft, chosen), state.last - state.position)
            if recent := cache[0].recent:  # answers beyond the block mean nothing
                new = jnp.minimum(new, recent.block - state.position % recent.block)
            put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
            state = state.replace(
                cache=cache,
                tokens=put(state.tokens, chosen, state.position + 1, 0),
                position=state.position + new,
            )
            return state, (chosen, new)

        state, (tokens, counts) = jax.lax.scan(step, state, length=SEGMENT)
        return state, (tokens.swapaxes(0, 1), counts.T)


def _gather(config: ModelConfig, mesh: Mesh, dtype: str) -> Callable[[str, dict], dict]:
    """Makes a layer's weights whole along the context axis, over which the tokens of a chunk are
    split. Left to itself XLA would rather send the activations of all tokens to and fro, far more
    than the weights for a long chunk."""
    whole = unflatten(
        {
            path: sharding(mesh, without(x.sharding.spec, "context"))
            for path, x in abstract_parameters(config, mesh, dtype).items()
        }
    )
    return lambda name, weights: jax.lax.with_sharding_constraint(weights, whole[name])
