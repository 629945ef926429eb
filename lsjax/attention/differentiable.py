"""Causal attention of whole rows to themselves, with gradients, for sequences of any length.

Tokens of a row are dealt out over the mesh's context axis as Zigzag says, the row one stripe. Of
what attention computes only its output and each query's lse are kept; scores are computed again
for the gradients. Source: FlashAttention (arXiv 2205.14135), Ring Attention (arXiv 2310.01889).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import backward, ring
from lsjax.attention.blockwise import Blocks, Seen
from lsjax.attention.by_platform import attend, blocks_of
from lsjax.attention.cached import by_head, by_token
from lsjax.attention.partial import Partial, merge
from lsjax.attention.rows import even, over_queries, seen_of
from lsjax.cache import Store, Zigzag
from lsjax.sharding import CHUNK, CHUNK_QUERIES, HEADS


@dataclasses.dataclass(frozen=True)
class RingSizes:
    """How much of a row is worked on at once.

    Attributes:
      queries: of a device, at most, that meet a block of keys from the ring.
      slots: of a device, at most, whose keys and values travel together.
      blocks: of the gradients; None for those of the platform.
    """

    queries: int = 8192
    slots: int = ring.MOST_SLOTS
    blocks: Blocks | None = None


def self_attention(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    begin: jax.Array | None = None,
    window: int | None = None,
    slopes: jax.Array | None = None,
    sizes: RingSizes = RingSizes(),
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v over the tokens that each sees: begin .. itself.

    Args:
      mesh: with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled; length is a multiple of twice
        the context axis, and tokens are in the order that Zigzag(context, length).order gives.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      begin: [batch, length] indices in the row, not decreasing along it; None for its first token.
      window: a token sees itself and the window - 1 tokens before it; None: all.
      slopes: [heads] of ALiBi, whose distances are those in the row; or None.
      sizes: how much is worked on at once.

    Returns:
      Like q. Gradients flow to q, k and v.
    """
    batch, length = q.shape[:2]
    if begin is None:
        begin = jnp.zeros((batch, length), jnp.int32)
    context = mesh.shape["context"]
    # A mesh without devices is there to know shapes by.
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "cpu"
    sharded = jax.shard_map(
        functools.partial(
            _on_device,
            window=window,
            zigzag=Zigzag(context, length),
            platform=platform,
            sizes=sizes,
        ),
        mesh=mesh,
        in_specs=(CHUNK_QUERIES, CHUNK_QUERIES, CHUNK_QUERIES, CHUNK, HEADS),
        out_specs=CHUNK_QUERIES,
        check_vma=False,
    )
    return sharded(q, k, v, begin, slopes)


def _on_device(q, k, v, begin, slopes, *, window, zigzag, platform, sizes):
    """`self_attention` on one device of the mesh, with its parts of the arrays."""
    q, k, v = by_head(q, k, v, Store(k, None))
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])
    at = zigzag.position(jax.lax.axis_index("context"), jnp.arange(q.shape[3]))
    at = jnp.broadcast_to(at, begin.shape)
    if window is not None:
        begin = jnp.maximum(begin, at + 1 - window)
    seen = Seen(begin, at + 1, at)
    return by_token(_attention(zigzag, platform, sizes, q, k, v, seen, slopes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    zigzag: Zigzag,
    platform: str,
    sizes: RingSizes,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    slopes: jax.Array | None,
) -> jax.Array:
    """[batch, kv_heads, group, length, head_dim] in v's dtype; q scaled, k and v by head.

    `seen` are indices in the row.
    """
    return _forward(zigzag, platform, sizes, q, k, v, seen, slopes).values.astype(v.dtype)


def _forward(zigzag, platform, sizes, q, k, v, seen, slopes) -> Partial:
    if zigzag.devices == 1:
        return attend(platform, q, Store(k, None), Store(v, None), seen, slopes)
    device, length = jax.lax.axis_index("context"), k.shape[2]
    size = ring.block_size(length, sizes.slots)
    queries = even(q.shape[3], sizes.queries)

    def meet(partial: Partial, block: tuple[Store, Store], seen: Seen) -> Partial:
        # Some queries at a time: of all of them a second Partial would be half as large again as
        # all else that a layer needs.
        def visit(partial: Partial, start: jax.Array, seen: Seen) -> Partial:
            def take(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, start, queries, axis=3)

            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=3)

            new = attend(platform, take(q), *block, seen, slopes)
            return jax.tree.map(put, partial, merge(jax.tree.map(take, partial), new))

        return over_queries(visit, partial, seen, size, queries)

    def of_all_devices(i: jax.Array, partial: Partial) -> Partial:
        def step(step: jax.Array, state):
            partial, block = state
            coming = ring.from_the_device_before(block, zigzag.devices)
            here = seen_of(zigzag, (device - step) % zigzag.devices, i * size, size, seen)
            return meet(partial, block, here), coming

        block = tuple(Store(x, None).block(None, i * size, size) for x in (k, v))
        return jax.lax.fori_loop(0, zigzag.devices, step, (partial, block))[0]

    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    return jax.lax.fori_loop(0, length // size, of_all_devices, nothing)


def _keep(zigzag, platform, sizes, q, k, v, seen, slopes):
    partial = _forward(zigzag, platform, sizes, q, k, v, seen, slopes)
    out = partial.values.astype(v.dtype)
    return out, (q, k, v, out, partial.lse, seen, slopes)


def _gradients(zigzag, platform, sizes, kept, d_out):
    q, k, v, out, lse, seen, slopes = kept
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    queries = backward.Queries(q, d_out, lse, delta)
    slots = ring.block_size(k.shape[2], sizes.slots)
    blocks = sizes.blocks or blocks_of(platform)
    d_q, d_k, d_v = backward.gradients(zigzag, queries, k, v, seen, slopes, slots, blocks)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attention.defvjp(_keep, _gradients)
