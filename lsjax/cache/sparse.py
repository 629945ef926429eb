"""A cache of all tokens whose prefill attends to the blocks of keys that matter; see SparsePrefill.

Decode attends to everything.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.attention import dispatch, ring
from lsjax.attention.blockwise import KeyRange
from lsjax.attention.hadamard import hadamard_transform, undo_hadamard_transform
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge, merge_over_axis, with_blind_queries
from lsjax.attention.sparse.rule import TILE, SparsePrefill, choose
from lsjax.cache.full import FullCache
from lsjax.cache.protocol import Step
from lsjax.distributed.sharding import CACHE_SPEC, FLOAT_TAIL_SPEC, TOKENS_SPEC
from lsjax.positions.rotary import rotate, rotation_back

# Queries of a prompt that fills the cache, at least, that also attend to all keys.
SAMPLES = 64


@flax.struct.dataclass
class BlockMeans:
    """Means of the keys and values in each block of TILE slots.

    Attributes:
      k, v: [batch, kv_heads, slots / TILE, head_dim] floats, keys as they are attended to.
      known: [batch] the blocks of positions before it have their means here.
    """

    k: jax.Array
    v: jax.Array
    known: jax.Array


@flax.struct.dataclass
class Counts:
    """What prefill has attended to.

    Attributes:
      blocks: [batch, kv_heads] float32 number of pairs of a tile and a block that it attended to.
      mass: [batch, kv_heads, group] float32 sum, over sampled queries, of the share of full
        attention's weights that is on the blocks attended to.
      samples: [batch] int32 number of sampled queries.
    """

    blocks: jax.Array
    mass: jax.Array
    samples: jax.Array


@flax.struct.dataclass(kw_only=True)
class SparseCache(FullCache):
    """Keys and values of all positions, and the means of their blocks, by which prefill chooses.

    Attributes:
      means: means of blocks.
      counts: what prefill has attended to.
      rule: settings.
    """

    means: BlockMeans
    counts: Counts
    rule: SparsePrefill = flax.struct.field(pytree_node=False)

    def partition_specs(self) -> "SparseCache":
        specs = super().partition_specs()
        return specs.replace(
            means=BlockMeans(CACHE_SPEC, CACHE_SPEC, TOKENS_SPEC),
            counts=Counts(FLOAT_TAIL_SPEC, FLOAT_TAIL_SPEC, TOKENS_SPEC),
        )

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "SparseCache"]:
        if step.decode:
            return super().update_and_attend(q, k, v, step)
        length = k.shape[2]
        cache, _, _ = self._written(k, v, step)
        cache = cache.replace(means=cache._caught_up(step, length))
        # Whole tiles: what is behind the last query is dropped.
        queries, end = (_whole_tiles(x, step.views, axis) for x, axis in ((q, 3), (step.end, 1)))
        padded = queries.shape[3] // step.views
        tiles = step.positions[0, ::TILE] // TILE
        # Whole blocks that the queries see of their own chunk of positions, and all before it.
        stop = end[0, -padded::TILE] // TILE
        means = cache._all_means()
        estimating, stride = None, None
        if step.views > 1:
            estimating = self._estimating(queries[:, :, :, -padded:], step)
            stride = step.tables.chunks.stride
        keep, others = choose(
            self.rule, queries, estimating, *means, tiles, stop, step.lengths, stride
        )
        seen = jnp.tile(keep, (1, 1, step.views, 1))
        if step.begin is not None:
            begin = _whole_tiles(step.begin, step.views, 1)[0, ::TILE] // TILE
            seen &= jnp.arange(keep.shape[3]) >= begin[:, None]
        near = cache._attend_to_kept(queries, seen, end, step)
        near = jax.tree.map(lambda x: _first_of_views(x, step.views, length), near)
        counts = cache._counted(q, keep, near, tiles, step)
        others = jax.tree.map(lambda x: x[:, :, :, :length], others)
        others = with_blind_queries(others, (step.views - 1) * length)
        return merge(near, others), cache.replace(counts=counts)

    def _estimating(self, q: jax.Array, step: Step) -> jax.Array:
        """Returns the views of queries by which blocks are chosen; `q` is the last view of each."""
        quantized = self.k.scale is not None  # so that queries are Hadamard-transformed
        rows = undo_hadamard_transform(q) if quantized else q.astype(jnp.float32)
        heads = rows.reshape(q.shape[0], -1, *q.shape[3:]).swapaxes(1, 2)
        views = []
        for offset in step.tables.chunks.unlimited_offsets():
            cos, sin = rotation_back(step.tables, jnp.full((1, 1), offset))
            view = rotate(heads, cos, -sin, step.rope_interleaved).swapaxes(1, 2).reshape(q.shape)
            views.append((hadamard_transform(view) if quantized else view).astype(q.dtype))
        return jnp.concatenate(views, axis=3)

    def _caught_up(self, step: Step, length: int) -> BlockMeans:
        """Returns the means with those of all blocks that the chunk fills.

        They are read from the cache, so that a chunk may end within a block, and blocks may have
        come from elsewhere.
        """
        means, zigzag, at = self.means, self.zigzag, step.positions[0, 0]
        device = jax.lax.axis_index("context")
        start = at if zigzag.devices == 1 else at // zigzag.block_length * zigzag.block_length
        end = jnp.full_like(means.known, start + length * zigzag.devices)
        begin = means.known
        if step.lengths is not None:
            end = jnp.minimum(end, step.lengths)
            begin = jnp.where(step.lengths > start, begin, start)  # no need once a prompt has ended
        first = zigzag.num_local_slots_before(device, jnp.min(begin)) // TILE
        stop = (zigzag.num_local_slots_before(device, at) + length) // TILE
        # As many blocks at a time as a chunk has, which mostly is once.
        blocks = means.k.shape[2]
        count = min(-(-length // TILE), blocks)

        def add(i: jax.Array, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            start = jnp.minimum(first + i * count, blocks - count)

            def put(held: jax.Array, store: KVArray) -> jax.Array:
                # Without the barrier a GPU would copy the cache to have a block's slots together.
                slots = jax.lax.optimization_barrier(store.block(None, start * TILE, count * TILE))
                tokens = slots.dequantize()
                tokens = tokens.reshape(*tokens.shape[:2], count, TILE, -1)
                mean = jnp.mean(tokens, axis=3).astype(held.dtype)
                return jax.lax.dynamic_update_slice_in_dim(held, mean, start, axis=2)

            return put(held[0], self.k), put(held[1], self.v)

        k, v = jax.lax.fori_loop(0, -(-(stop - first) // count), add, (means.k, means.v))
        return BlockMeans(k, v, jnp.maximum(means.known, end // TILE * TILE))

    def _all_means(self) -> tuple[jax.Array, jax.Array]:
        """Returns the means of all devices' blocks in the order of positions."""
        devices = self.zigzag.devices
        if devices == 1:
            return self.means.k, self.means.v
        slots = jnp.arange(self.means.k.shape[2]) * TILE
        at = jnp.stack([self.zigzag.position(device, slots) for device in range(devices)])
        order = jnp.argsort(at.ravel())

        def gather(x: jax.Array) -> jax.Array:
            return jax.lax.all_gather(x, "context", axis=2, tiled=True)[:, :, order]

        return gather(self.means.k), gather(self.means.v)

    def _attend_to_kept(self, q: jax.Array, keep: jax.Array, end: jax.Array, step: Step) -> Partial:
        if not step.around_ring(self.zigzag):
            return dispatch.attend_to_kept(step.platform, q, self.k, self.v, keep, end)

        def attend_block(k, v, begin, end, positions):
            local = keep[..., positions[::TILE] // TILE]
            return dispatch.attend_to_kept(step.platform, q, k, v, local, end)

        device = jax.lax.axis_index("context")
        first = self.zigzag.num_local_slots_before(device, step.positions[0, 0])
        count = first + step.positions.shape[1]
        return ring.attend(
            attend_block, q, self.k, self.v, self.zigzag, jnp.int32(0), count, None, end
        )

    def _counted(
        self, q: jax.Array, keep: jax.Array, near: Partial, tiles: jax.Array, step: Step
    ) -> Counts:
        """Counts what the chunk attended to; a few of each device's queries are samples."""
        lengths = jnp.max(step.end, axis=1) if step.lengths is None else step.lengths
        real = tiles * TILE < lengths[:, None]
        blocks = jnp.sum(keep & real[:, None, :, None], axis=(2, 3), dtype=jnp.float32)
        length = step.positions.shape[1]
        count = -(-SAMPLES * length // (self.k.capacity * self.zigzag.devices))
        at = np.arange(1, min(count, length) + 1) * length // min(count, length) - 1
        positions = step.positions[:, at]
        ranges = ((jnp.zeros_like(positions), positions + 1),)
        if step.views > 1:
            ranges = step.tables.chunks.key_ranges(positions)
        kept, full = [], []
        for view, (begin, end) in enumerate(ranges):
            of_view = view * length + at
            queries, stop = q[:, :, :, of_view], step.end[:, of_view]
            kept.append(near.lse[..., of_view])
            # The blocks that a FloatTail holds count as attended to.
            kept.append(self._lse(queries, jnp.maximum(begin, stop), end, step))
            full.append(self._lse(queries, begin, end, step))
        kept, full = (functools.reduce(jnp.logaddexp, x) for x in (kept, full))
        sampled = positions < lengths[:, None]
        mass = jnp.where(sampled[:, None, None], jnp.exp(jnp.minimum(kept - full, 0)), 0)
        new = Counts(blocks, mass.sum(axis=3), sampled.sum(axis=1, dtype=jnp.int32))
        if step.around_ring(self.zigzag):
            new = jax.lax.psum(new, "context")
        return jax.tree.map(jnp.add, self.counts, new)

    def _lse(self, q: jax.Array, start: jax.Array, stop: jax.Array, step: Step) -> jax.Array:
        """Returns the log-sum-exp of some queries over the positions start .. stop - 1.

        `q` is [batch, kv_heads, group, queries, head_dim], `start` and `stop` are [batch, queries].
        """
        device = jax.lax.axis_index("context")

        def attend(q: jax.Array, start: jax.Array, stop: jax.Array) -> Partial:
            slots = (self.zigzag.num_local_slots_before(device, x) for x in (start, stop))
            seen = KeyRange(*slots, stop - 1)
            return dispatch.attend(step.platform, q, self.k, self.v, seen, None)

        if not step.around_ring(self.zigzag):
            return attend(q, start, stop).lse
        gathered = [
            jax.lax.all_gather(x, "context", axis=a, tiled=True)
            for x, a in ((q, 3), (start, 1), (stop, 1))
        ]
        order = jnp.argsort(gathered[2][0])
        q_of_all, start, stop = (
            jnp.take(x, order, axis=a) for x, a in zip(gathered, (3, 1, 1), strict=True)
        )
        lse = merge_over_axis(attend(q_of_all, start, stop), "context").lse
        own = device * q.shape[3] + jnp.arange(q.shape[3])
        return jnp.take(lse, jnp.argsort(order)[own], axis=3)


def _whole_tiles(x: jax.Array, views: int, axis: int) -> jax.Array:
    """Repeats the last query of each view to fill its last tile."""
    parts = jnp.split(x, views, axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = 0, -parts[0].shape[axis] % TILE
    return jnp.concatenate([jnp.pad(part, pad, mode="edge") for part in parts], axis)


def _first_of_views(x: jax.Array, views: int, length: int) -> jax.Array:
    """Drops what `_whole_tiles` has added on axis 3."""
    return jnp.concatenate([part[:, :, :, :length] for part in jnp.split(x, views, 3)], 3)
