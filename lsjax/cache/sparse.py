"""A cache of all tokens whose prefill attends to the blocks of keys that matter; see SparsePrefill.

Decode attends to everything.
"""

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention import dispatch, ring
from lsjax.attention.blockwise import KeyRange
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.attention.sparse.rule import TILE, SparsePrefill, choose
from lsjax.cache.full import FullCache
from lsjax.cache.protocol import Step
from lsjax.distributed.sharding import CACHE_SPEC, FLOAT_TAIL_SPEC, TOKENS_SPEC


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
        pad = -length % TILE
        queries = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0)), mode="edge")
        end = jnp.pad(step.end, ((0, 0), (0, pad)), mode="edge")
        tiles = step.positions[0, ::TILE] // TILE
        keep, means = choose(
            self.rule, queries, *cache._all_means(), tiles, end[0, ::TILE] // TILE, step.lengths
        )
        near = cache._attend_to_kept(queries, keep, end, step)
        near, means = jax.tree.map(lambda x: x[:, :, :, :length], (near, means))
        counts = cache._counted(q, keep, near, tiles, step)
        return merge(near, means), cache.replace(counts=counts)

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
        count = self.zigzag.num_local_slots_before(device, step.positions[0, 0]) + q.shape[3]
        return ring.attend(
            attend_block, q, self.k, self.v, self.zigzag, jnp.int32(0), count, None, end
        )

    def _counted(
        self, q: jax.Array, keep: jax.Array, near: Partial, tiles: jax.Array, step: Step
    ) -> Counts:
        """Counts what the chunk attended to; its last query on each device is the sample."""
        lengths = jnp.max(step.end, axis=1) if step.lengths is None else step.lengths
        real = tiles * TILE < lengths[:, None]
        blocks = jnp.sum(keep & real[:, None, :, None], axis=(2, 3), dtype=jnp.float32)
        position, stop = step.positions[:, -1:], step.end[:, -1:]
        q = q[..., -1:, :]
        # The blocks that a FloatTail holds count as attended to.
        beside = self._lse(q, stop, position + 1, step)
        full = self._lse(q, jnp.zeros_like(stop), position + 1, step)
        kept = jnp.logaddexp(near.lse[..., -1], beside)
        sampled = position[:, 0] < lengths
        mass = jnp.where(sampled[:, None, None], jnp.exp(jnp.minimum(kept - full, 0)), 0)
        new = Counts(blocks, mass, sampled.astype(jnp.int32))
        if step.around_ring(self.zigzag):
            new = jax.lax.psum(new, "context")
        return jax.tree.map(jnp.add, self.counts, new)

    def _lse(self, q: jax.Array, start: jax.Array, stop: jax.Array, step: Step) -> jax.Array:
        """Returns [batch, kv_heads, group], the log-sum-exp of one query over the slots of all."""

        def attend(q, start, stop, device) -> Partial:
            seen = KeyRange(
                *(self.zigzag.num_local_slots_before(device, x) for x in (start, stop)), stop - 1
            )
            return dispatch.attend(step.platform, q, self.k, self.v, seen, None)

        device = jax.lax.axis_index("context")
        if not step.around_ring(self.zigzag):
            return attend(q, start, stop, device).lse[..., 0]
        # The last device has the earliest query.
        gather = [
            jax.lax.all_gather(x, "context", axis=a, tiled=True)
            for x, a in ((q, 3), (start, 1), (stop, 1))
        ]
        q, start, stop = (jnp.flip(x, axis=a) for x, a in zip(gather, (3, 1, 1), strict=True))
        lse = merge_over_axis(attend(q, start, stop, device), "context").lse
        return lse[..., self.zigzag.devices - 1 - device]
