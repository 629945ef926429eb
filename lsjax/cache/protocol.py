"""What every KV cache of a layer does: it turns queries into a Partial."""

from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention import dispatch
from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.positions.rotary import RotaryTables


@flax.struct.dataclass
class Step:
    """New tokens of a layer, on one device of the mesh, apart from their queries, keys and values.

    Attributes:
      positions: [batch, length] positions of the tokens.
      lengths: [batch] total number of tokens in each row; later ones are padding. Or None.
      begin, end: [batch, views * length]; each query sees the positions begin .. end - 1. `begin`
        is None if all see from position 0.
      blocks: what is known of `begin` and `end` when a program is compiled; None if nothing is. See
        QueryBlocks.
      slopes: [kv_heads, group] ALiBi slopes, or None.
      tables: rotary tables that rotated the queries and keys; None with ALiBi.
      decode: whether these are the few tokens of a decode step, not a prefill chunk.
      rope_interleaved: whether rotation pairs adjacent channels; see ModelConfig.
      platform: cpu, gpu (or cuda) or tpu.
      views: 1, or the number of ranges of keys that dual chunk attention rotates the queries for;
        then queries are those of one view after the other.
    """

    positions: jax.Array
    lengths: jax.Array | None
    begin: jax.Array | None
    end: jax.Array
    slopes: jax.Array | None
    tables: RotaryTables | None
    decode: bool = flax.struct.field(pytree_node=False)
    blocks: QueryBlocks | None = flax.struct.field(pytree_node=False)
    rope_interleaved: bool = flax.struct.field(pytree_node=False)
    platform: str = flax.struct.field(pytree_node=False)
    views: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def query_positions(self) -> jax.Array:
        """Positions of the queries of all views, [batch, views * length]."""
        return jnp.tile(self.positions, (1, self.views)) if self.views > 1 else self.positions

    def attend(
        self,
        q: jax.Array,
        k: KVArray,
        v: KVArray,
        start: jax.Array | None,
        stop: jax.Array,
        positions: jax.Array | None = None,
        blocks: QueryBlocks | None = None,
    ) -> Partial:
        """Attends to slots start .. stop - 1 of local arrays; `positions` are those of the slots.

        See KeyRange and QueryBlocks. ALiBi is the only one to use the positions.
        """
        positions = None if self.slopes is None else positions
        key_range = KeyRange(start, stop, self.query_positions, positions)
        if self.views == 1 or (self.decode and dispatch.reads_once(self.platform)):
            return dispatch.attend(self.platform, q, k, v, key_range, self.slopes, blocks)
        # The views of a block of queries see keys far apart: each reads only its own. All queries
        # of a chunk of positions see the same keys of others.
        partials, length = [], self.positions.shape[1]
        last, others = (self.views - 1) * length, blocks and QueryBlocks(length, causal=False)
        for first in range(0, self.views * length, length):
            of_view = key_range.queries(lambda x, at=first: x[:, at : at + length])
            view, known = q[:, :, :, first : first + length], blocks if first == last else others
            partials.append(dispatch.attend(self.platform, view, k, v, of_view, None, known))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *partials)

    def within_chunks(self, size: int) -> bool:
        """Returns whether positions from one multiple of `size` to the next are seen alike.

        With dual chunk attention they are if they belong to one chunk of positions; else always.
        """
        return self.views == 1 or self.tables.chunks.holds_whole(size)

    def around_ring(self, zigzag: Zigzag) -> bool:
        """Returns whether the tokens are sharded over the context axis, as a prefill chunk is."""
        return zigzag.devices > 1 and not self.decode


class LayerCache(Protocol):
    """The KV cache of one layer, or of some of its heads: a pytree of arrays on the mesh.

    Attributes:
      zigzag: layout of positions along the mesh's context axis.
      block: positions per block, if outputs of a decode step are defined only for tokens in the
        block of its first token; else None.
    """

    @property
    def zigzag(self) -> Zigzag: ...

    @property
    def block(self) -> int | None: ...

    def partition_specs(self) -> Self:
        """Returns the partition specs of all arrays, in the cache's structure."""

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, Self]:
        """Writes new tokens, and attends to what is kept of all tokens; called under shard_map.

        Args:
          q: [batch, kv_heads, group, views * length, head_dim] queries, rotated and scaled; see
            Step.
          k, v: [batch, kv_heads, length, head_dim] keys and values, keys rotated.
          step: everything else about the tokens.

        Returns:
          Partial with values shaped as q, over the keys of all devices; and the new cache.
        """


# One per layer; a recurrent layer has its RecurrentState there.
KVCache = tuple[LayerCache, ...]
