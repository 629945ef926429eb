"""A cache whose KV heads are in groups, each with a cache of its own.

Source of heads that keep less than others: RazorAttention (arXiv 2407.15891).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial
from lsjax.cache.float_tail import FloatTail
from lsjax.cache.protocol import LayerCache, Step
from lsjax.cache.window import WindowSpec, window_of
from lsjax.distributed.sequence_layout import Zigzag


@flax.struct.dataclass
class HeadGroups:
    """Keys and values of one layer, with heads in groups.

    Attributes:
      groups: cache of each group, in the order of the heads on a device of the model axis.
      sizes: KV heads per group and device.
    """

    groups: tuple[LayerCache, ...]
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def zigzag(self) -> Zigzag:
        return self.groups[0].zigzag

    @property
    def block(self) -> int | None:
        return next((group.block for group in self.groups if group.block), None)

    def partition_specs(self) -> "HeadGroups":
        return self.replace(groups=tuple(group.partition_specs() for group in self.groups))

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "HeadGroups"]:
        partials, groups = [], []
        for group, heads, local_step in self.by_group(step):
            partial, group = group.update_and_attend(
                q[:, heads], k[:, heads], v[:, heads], local_step
            )
            partials.append(partial)
            groups.append(group)
        return join_heads(partials), self.replace(groups=tuple(groups))

    def by_group(self, step: Step) -> Iterator[tuple[LayerCache, slice, Step]]:
        """Yields each group, its heads on a device, and the step with these heads' slopes."""
        first = 0
        for group, size in zip(self.groups, self.sizes, strict=True):
            heads = slice(first, first + size)
            slopes = None if step.slopes is None else step.slopes[heads]
            yield group, heads, step.replace(slopes=slopes)
            first += size


def join_heads(partials: Sequence[Partial]) -> Partial:
    """Returns the Partial of all heads from those of each group."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *partials)


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """How a layer's KV heads are split into groups by what they keep, on each shard.

    Attributes:
      whole: number of heads that keep all tokens; they come first.
      windows: the number of heads and the window of each other group.
    """

    whole: int
    windows: tuple[tuple[int, WindowSpec], ...]


def compress(cache: LayerCache, lengths: jax.Array, split: HeadSplit, shards: int) -> HeadGroups:
    """Compresses a layer's cache of all tokens: drops those that window heads do not keep.

    Args:
      cache: FullCache, in a FloatTail if it is quantized.
      lengths: [batch] number of tokens in each row.
      split: head groups of each shard.
      shards: number of shards that the heads are split into.
    """
    full = cache.inner if isinstance(cache, FloatTail) else cache
    heads = full.k.data.shape[1] // shards

    def slice_heads(first: int, count: int, tree):
        def take(x: jax.Array) -> jax.Array:
            apart = x.reshape(x.shape[0], shards, heads, *x.shape[2:])
            return apart[:, :, first : first + count].reshape(x.shape[0], -1, *x.shape[2:])

        return jax.tree.map(take, tree)

    groups: list[LayerCache] = [slice_heads(0, split.whole, cache)] if split.whole else []
    sizes, first = [split.whole] if split.whole else [], split.whole
    for count, spec in split.windows:
        k, v = slice_heads(first, count, (full.k, full.v))
        groups.append(window_of(k, v, lengths, full.zigzag, spec))
        sizes.append(count)
        first += count
    return HeadGroups(tuple(groups), tuple(sizes))
