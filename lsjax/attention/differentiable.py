"""Differentiable causal self-attention over whole rows, for sequences of any length.

The tokens of a row are sharded over the mesh's context axis in zigzag order, with the row as one
zigzag block. The forward pass keeps only the output and each query's lse; the backward pass
recomputes the scores. Source: FlashAttention (arXiv 2205.14135), Ring Attention (arXiv 2310.01889).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import backward, ring
from lsjax.attention.blocking import even_block_size, local_key_range, loop_over_query_blocks
from lsjax.attention.blockwise import Blocks, KeyRange, QueryBlocks
from lsjax.attention.dispatch import add_gradients, attend, blocks_of
from lsjax.attention.head_layout import by_head, by_token
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CHUNK_QUERIES_SPEC, CHUNK_SPEC, HEADS_SPEC


@dataclasses.dataclass(frozen=True)
class RingSizes:
    """Upper limits on how much of a row is processed at once.

    Attributes:
      queries: queries per device that attend to a block of keys from the ring at once.
      slots: slots per device whose keys and values are sent together.
      blocks: block sizes for the gradients; None for the platform's defaults.
    """

    queries: int = 8192
    slots: int = ring.MAX_SLOTS
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
    """Computes softmax(q k^T / sqrt(head_dim)) v; each token sees the tokens begin .. itself.

    Args:
      mesh: mesh with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled. With several devices on the
        context axis, length is a multiple of twice their number and tokens are in the order of
        Zigzag(context, length).permutation(length).
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      begin: [batch, length] index in the row of the first token that each token sees, not
        decreasing along the row; None if all see from the row's first token.
      window: sliding window: a token sees itself and the window - 1 tokens before it. None for no
        window.
      slopes: [heads] ALiBi slopes, applied to distances within the row; or None.
      sizes: how much is processed at once.

    Returns:
      Attention output, shaped as q in v's dtype. Gradients flow to q, k and v.
    """
    length = q.shape[1]
    context = mesh.shape["context"]
    # An AbstractMesh has no devices and serves shape inference only.
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
        in_specs=(
            CHUNK_QUERIES_SPEC,
            CHUNK_QUERIES_SPEC,
            CHUNK_QUERIES_SPEC,
            CHUNK_SPEC,
            HEADS_SPEC,
        ),
        out_specs=CHUNK_QUERIES_SPEC,
        check_vma=False,
    )
    return sharded(q, k, v, begin, slopes)


def _on_device(q, k, v, begin, slopes, *, window, zigzag, platform, sizes):
    """Runs `self_attention` on one device of the mesh, on its shards of the arrays."""
    q, k, v = by_head(q, k, v)
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])
    at = zigzag.position(jax.lax.axis_index("context"), jnp.arange(q.shape[3]))
    at = jnp.broadcast_to(at, (q.shape[0], q.shape[3]))
    if window is not None:
        begin = jnp.maximum(0 if begin is None else begin, at + 1 - window)
    key_range = KeyRange(begin, at + 1, at)
    return by_token(_attention(zigzag, platform, sizes, q, k, v, key_range, slopes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    zigzag: Zigzag,
    platform: str,
    sizes: RingSizes,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_range: KeyRange,
    slopes: jax.Array | None,
) -> jax.Array:
    """Computes attention on scaled q and on k and v laid out by head.

    `key_range` holds indices in the row; its `start` is None if all see from the first. Returns
    [batch, kv_heads, group, length, head_dim] in v's dtype.
    """
    return _forward(zigzag, platform, sizes, q, k, v, key_range, slopes).values.astype(v.dtype)


def _forward(zigzag, platform, sizes, q, k, v, key_range, slopes) -> Partial:
    if zigzag.devices == 1:
        # A row of one document is one causal block.
        blocks = QueryBlocks(q.shape[3], causal=True) if key_range.start is None else None
        return attend(platform, q, KVArray(k, None), KVArray(v, None), key_range, slopes, blocks)
    key_range, length = _from_first(key_range), k.shape[2]
    size = ring.block_size(length, sizes.slots)
    queries = even_block_size(q.shape[3], sizes.queries)

    def attend_block(
        partial: Partial, block: tuple[KVArray, KVArray], owner: jax.Array, first: jax.Array
    ) -> Partial:
        local_range = local_key_range(zigzag, owner, first, size, key_range)

        # Queries are processed in blocks: a second Partial of all queries would be half as large
        # as everything else that a layer needs.
        def visit_block(partial: Partial, start: jax.Array, key_range: KeyRange) -> Partial:
            def take(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, start, queries, axis=3)

            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=3)

            new = attend(platform, take(q), *block, key_range, slopes)
            return jax.tree.map(put, partial, merge(jax.tree.map(take, partial), new))

        return loop_over_query_blocks(visit_block, partial, local_range, size, queries)

    def of_all_devices(i: jax.Array, partial: Partial) -> Partial:
        block = tuple(KVArray(x, None).block(None, i * size, size) for x in (k, v))
        block_fn = functools.partial(attend_block, first=i * size)
        return ring.scan(block_fn, partial, block, zigzag.devices)

    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    return jax.lax.fori_loop(0, length // size, of_all_devices, nothing)


def _from_first(key_range: KeyRange) -> KeyRange:
    """Returns the same range with a `start` that is an array."""
    start = jnp.zeros_like(key_range.stop) if key_range.start is None else key_range.start
    return key_range._replace(start=start)


def _forward_with_residuals(zigzag, platform, sizes, q, k, v, key_range, slopes):
    partial = _forward(zigzag, platform, sizes, q, k, v, key_range, slopes)
    out = partial.values.astype(v.dtype)
    return out, (q, k, v, out, partial.lse, key_range, slopes)


def _gradients(zigzag, platform, sizes, residuals, d_out):
    q, k, v, out, lse, key_range, slopes = residuals
    key_range = _from_first(key_range)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    queries = backward.Queries(q, out, d_out, lse, delta)
    slots = ring.block_size(k.shape[2], sizes.slots)
    blocks = sizes.blocks or blocks_of(platform)
    add = functools.partial(add_gradients, platform, slopes=slopes, blocks=blocks)
    d_q, d_k, d_v = backward.gradients(add, zigzag, queries, k, v, key_range, slots)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attention.defvjp(_forward_with_residuals, _gradients)
