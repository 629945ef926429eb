"""A document that all rows of a batch begin with, kept once.

The rows' queries stand side by side as the rows of one product over the document's keys, so a
decode step reads the document once, however many rows there are. Each row's own tokens are another
Partial. Source: Hydragen (arXiv 2402.05099).

Of a compressed document some heads keep less than all tokens. That stays as it is: rows keep their
own tokens for all heads, and these drive nothing out.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lsjax.attention import dispatch
from lsjax.attention.blockwise import KeyRange, QueryBlocks, in_query_blocks
from lsjax.attention.partial import Partial, merge
from lsjax.cache.float_tail import FloatTail
from lsjax.cache.full import FullCache
from lsjax.cache.head_groups import HeadGroups, join_heads
from lsjax.cache.protocol import KVCache, LayerCache, Step
from lsjax.cache.recurrent import RecurrentState, States
from lsjax.cache.slots import attend_around_ring, attend_to_slots, merge_devices
from lsjax.cache.spec import CacheSpec, empty_layer
from lsjax.cache.window import WindowCache
from lsjax.config import LayerKind, ModelConfig
from lsjax.distributed.sequence_layout import Zigzag

# Query rows of a piece of a question on a CPU, as many as the heads of a group and the tokens that
# a block of keys is read for at once.
_PIECE_ROWS = 128
# Queries of a device that all others attend to their part of a window for, at a time.
_GATHERED_QUERIES = 1024


@flax.struct.dataclass
class DocumentCache:
    """The keys and values of a document, which are only read.

    Attributes:
      layers: cache of each layer with one row per device of the data axis, all alike: a HeadGroups
        of FullCache and WindowCache if it is compressed. None for layers that do not keep all
        tokens; see LayerKind.
      length: [] number of tokens that `layers` are read for: whole blocks of a FloatTail, and as
        many on each device of the context axis.
      rest: what each row copies, with as many rows: the document's tokens after those, the last
        tokens of layers with a sliding window, and the states of recurrent layers.
      states: states of the recurrent layers after the first `length` tokens, which is where a saved
        document begins to be read on.
    """

    layers: tuple[FullCache | HeadGroups | None, ...]
    length: jax.Array
    rest: KVCache
    states: States = ()


@flax.struct.dataclass
class SharedPrefix:
    """The document and each row's own tokens after it, in one layer.

    Attributes:
      document: cache of the document's tokens, with one row on each device.
      length: [] number of its tokens; see DocumentCache.
      own: cache of each row's own tokens; position p is kept as position p - length.
    """

    document: FullCache | HeadGroups
    length: jax.Array
    own: FullCache

    @property
    def zigzag(self) -> Zigzag:
        return self.own.zigzag

    @property
    def block(self) -> None:
        return None

    @property
    def chunk(self) -> int:
        return self.own.chunk

    def partition_specs(self) -> "SharedPrefix":
        return SharedPrefix(
            self.document.partition_specs(), PartitionSpec(), self.own.partition_specs()
        )

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "SharedPrefix"]:
        after = step.replace(
            positions=step.positions - self.length,
            lengths=None if step.lengths is None else step.lengths - self.length,
            begin=None if step.begin is None else step.begin - self.length,
            end=step.end - self.length,
        )
        partial, own = self.own.update_and_attend(q, k, v, after)
        return merge(self._attend_to_document(q, step), partial), self.replace(own=own)

    def _attend_to_document(self, q: jax.Array, step: Step) -> Partial:
        batch, _, _, length, _ = q.shape  # that of all views
        rows = batch * length
        q = jnp.moveaxis(q, 0, 2).reshape(1, *q.shape[1:3], rows, -1)
        begin, end, blocks = None, jnp.full((1, rows), self.length), None
        if step.views == 1:  # all see the same slots
            blocks = QueryBlocks(rows, causal=False)
        else:
            begin, end = step.begin.reshape(1, rows), jnp.minimum(step.end.reshape(1, rows), end)
        at = step.query_positions.reshape(1, rows)
        if step.lengths is not None and self._skips_padding(step):
            real = (step.query_positions < step.lengths[:, None]).reshape(1, rows)
            end = jnp.where(real, end, 0)
        step = step.replace(positions=at, begin=begin, end=end, blocks=blocks, views=1)
        if not isinstance(self.document, HeadGroups):
            partial = self._attend_to_group(self.document, q, step)
        else:
            partial = join_heads(
                [
                    self._attend_to_group(group, q[:, heads], of_group)
                    for group, heads, of_group in self.document.by_group(step)
                ]
            )

        def by_row(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x[0].reshape(*x.shape[1:3], batch, length, *x.shape[4:]), 2, 0)

        return jax.tree.map(by_row, partial)

    def _attend_to_group(self, held: FullCache | WindowCache, q: jax.Array, step: Step) -> Partial:
        """Attends to what some heads keep of the document; see _attend_to_document."""
        zigzag = held.zigzag
        if step.around_ring(zigzag) and isinstance(held, FullCache):
            used = zigzag.num_local_slots_before(jax.lax.axis_index("context"), self.length)
            args = q, held.k, held.v, step, zigzag, step.begin, step.end
            return attend_around_ring(*args, 0, used, step.blocks)
        if step.around_ring(zigzag):
            return self._attend_in_pieces(held, q, step, _GATHERED_QUERIES)
        if not self._skips_padding(step):
            return self._attend(held, q, step)
        size = 1 << max(_PIECE_ROWS // q.shape[2], 1).bit_length() - 1
        if step.lengths is not None:  # half of a question's chunk may be padding
            size = min(size, max(q.shape[3] // len(step.lengths) // 2, 1))
        return self._attend_in_pieces(held, q, step, size)

    def _skips_padding(self, step: Step) -> bool:
        """Returns whether padding, most of the chunk of a short question, is to take no time."""
        around = step.around_ring(self.zigzag)
        return not (around or step.decode or dispatch.reads_once(step.platform))

    def _attend(self, held: FullCache | WindowCache, q: jax.Array, step: Step) -> Partial:
        if isinstance(held, WindowCache):
            return held.attend_to_held(q, step, self.length)
        args = q, held.k, held.v, step, held.zigzag, step.begin, step.end, self.length
        return merge_devices(attend_to_slots(*args), step, held.zigzag)

    def _attend_in_pieces(
        self, held: FullCache | WindowCache, q: jax.Array, step: Step, size: int
    ) -> Partial:
        """Attends `size` queries at a time; those that see nothing take no time together."""

        def piece(q: jax.Array, keys: KeyRange) -> Partial:
            seen = {"positions": keys.query_positions, "begin": keys.start, "end": keys.stop}
            return self._attend(held, q, step.replace(**seen))

        return in_query_blocks(piece, q, KeyRange(step.begin, step.end, step.positions), size)


def without_tails(cache: KVCache) -> tuple[FullCache, ...]:
    """Returns the caches of layers of attention, without their FloatTails."""
    return tuple(
        layer.inner if isinstance(layer, FloatTail) else layer
        for layer in cache
        if not isinstance(layer, RecurrentState)
    )


def with_layers(cache: KVCache, layers: tuple[FullCache, ...]) -> KVCache:
    """Puts `layers` back in place of those that `without_tails` returned."""
    left = iter(layers)

    def layer(old: LayerCache) -> LayerCache:
        if isinstance(old, RecurrentState):
            return old
        return old.replace(inner=next(left)) if isinstance(old, FloatTail) else next(left)

    return tuple(map(layer, cache))


def shared_layers(
    cache: KVCache, kinds: Sequence[LayerKind]
) -> tuple[FullCache | HeadGroups | None, ...]:
    """Returns the layers of a document's cache that rows share; None for those that they copy."""

    def only_read(layer: LayerCache) -> LayerCache:
        if isinstance(layer, HeadGroups):
            return layer.replace(groups=tuple(map(only_read, layer.groups)))
        if isinstance(layer, WindowCache):
            return layer.replace(next_evicted=None)
        return layer.inner if isinstance(layer, FloatTail) else layer

    return tuple(
        only_read(x) if kind.keeps_all else None for x, kind in zip(cache, kinds, strict=True)
    )


def cache_after(
    rest: KVCache, config: ModelConfig, own: CacheSpec, whole: CacheSpec, platform: str
) -> KVCache:
    """Creates the caches of rows that begin with a document, as `attach` takes them.

    Args:
      rest: that of a DocumentCache, or the cache of rows that have run further.
      config: model configuration.
      own: spec of a cache of the tokens that are not read from the document.
      whole: spec of a cache of all tokens.
      platform: cpu, gpu (or cuda) or tpu.
    """

    def layer(held: LayerCache, window: int | None) -> LayerCache:
        if isinstance(held, RecurrentState):
            return jax.tree.map(lambda x: _repeated(x, own.batch), held)
        empty = empty_layer(config, anywhere if window is None else whole, platform, window)
        if not isinstance(empty, FloatTail):
            return _copied(held, empty)
        tail = jax.tree.map(lambda x, rows: _repeated(x, rows.shape[0]), held.tail, empty.tail)
        return empty.replace(inner=_copied(held.inner, empty.inner), tail=tail)

    anywhere = dataclasses.replace(own, chunk=0)  # where a question's chunks may begin

    return tuple(map(layer, rest, config.windows))


def _repeated(x: jax.Array, rows: int) -> jax.Array:
    return jnp.repeat(x, rows // x.shape[0], axis=0)


def _copied(held: FullCache, empty: FullCache) -> FullCache:
    """Copies the rows of `held` to those of `empty`, as many slots as both have."""
    devices = empty.zigzag.devices

    def copy(x: jax.Array, rows: jax.Array) -> jax.Array:
        def by_device(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], devices, -1, *x.shape[3:])

        x, into = by_device(_repeated(x, rows.shape[0])), by_device(rows)
        size = min(x.shape[3], into.shape[3])
        return into.at[:, :, :, :size].set(x[:, :, :, :size]).reshape(rows.shape)

    return empty.replace(
        k=jax.tree.map(copy, held.k, empty.k), v=jax.tree.map(copy, held.v, empty.v)
    )


def attach(cache: KVCache, document: DocumentCache | None) -> KVCache:
    """Puts the document before the rows' own caches; the inverse of `detach`."""
    if document is None:
        return cache

    def with_prefix(own: LayerCache, held: FullCache | HeadGroups | None) -> LayerCache:
        if held is None:
            return own
        if isinstance(own, FloatTail):
            return own.replace(inner=with_prefix(own.inner, held))
        return SharedPrefix(held, document.length, own)

    return tuple(map(with_prefix, cache, document.layers))


def detach(cache: KVCache) -> KVCache:
    """Returns the rows' own caches."""

    def own(layer: LayerCache) -> LayerCache:
        if isinstance(layer, FloatTail):
            return layer.replace(inner=own(layer.inner))
        return layer.own if isinstance(layer, SharedPrefix) else layer

    return tuple(map(own, cache))
