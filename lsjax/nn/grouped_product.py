"""The product of rows that are sorted by group, each group with a matrix of its own."""

import jax
import jax.numpy as jnp

from lsjax.runtime.loops import map_in_turn
from lsjax.runtime.precision import einsum

# The rows are sorted by group, and a matrix is [group, out, in] as in checkpoints.
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_FEWEST_ROWS, _MOST_ROWS = 8, 128  # in a tile


def grouped_product(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies each row of x by the matrix of its group.

    A TPU has an operation for it. Elsewhere XLA would multiply every row by every matrix, so tiles
    of rows of one group are multiplied one after the other. int8 matrices are widened one by one.

    Args:
      x: [rows, in], the rows of the first group first.
      weight: [groups, out, in], of x's dtype or int8.
      sizes: [groups] int32 numbers of rows; rows past their sum have no meaning in the result.

    Returns:
      [rows, out] float32.
    """
    if weight.dtype != x.dtype:
        return _by_tile(x, weight, sizes)
    return jax.lax.platform_dependent(x, weight, sizes, tpu=_ragged, default=_by_tile)


def _ragged(x, weight, sizes):
    return jax.lax.ragged_dot_general(
        x, weight, sizes, _BY_GROUP, preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def _by_tile(x, weight, sizes):
    return _tiled(x, weight, sizes, "ti,oi->to")


def _tiled(x, weight, sizes, product):
    """Multiplies x tile by tile: "ti,oi->to", or "to,oi->ti" for the gradient of the rows."""
    group, rows, tile_of = _tiles(x.shape[0], sizes)

    def one(of):
        matrix = jax.lax.dynamic_index_in_dim(weight, of[0], keepdims=False)
        return einsum(product, x[of[1]], matrix.astype(x.dtype))

    y = map_in_turn(one, (group, rows), x)
    return y.reshape(-1, y.shape[-1])[tile_of]


def _forward(x, weight, sizes):
    return _by_tile(x, weight, sizes), (x, weight, sizes)


def _backward(saved, dy):
    x, weight, sizes = saved
    dx = _tiled(dy, weight, sizes, "to,oi->ti").astype(x.dtype)
    group, rows, tile_of = _tiles(x.shape[0], sizes)
    # A tile's last rows may be of the next group: they count in that group's tiles only.
    own = jnp.zeros(rows.size, bool).at[tile_of].set(jnp.arange(x.shape[0]) < jnp.sum(sizes))

    def add(sums, of):
        group, rows, own = of
        product = einsum("to,ti->oi", jnp.where(own[:, None], dy[rows], 0.0), x[rows])
        return sums.at[group].add(product), None

    zeros = jnp.zeros(weight.shape, jnp.float32)
    dw, _ = jax.lax.scan(add, zeros, (group, rows, own.reshape(rows.shape)))
    return dx, dw.astype(weight.dtype), None


_by_tile.defvjp(_forward, _backward)


def _tiles(count: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts `count` rows into tiles, each of one group.

    Returns:
      [tiles] groups, [tiles, size] rows in each tile, and [count] where in the tiles each row
      stands, counted over all of them. The number of tiles is fixed; some may have no row.
    """
    groups = sizes.shape[0]
    size = min(max(_FEWEST_ROWS, 1 << (count // groups).bit_length() >> 1), _MOST_ROWS)
    ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // size))
    starts, tile_starts = ends - sizes, tile_ends - -(-sizes // size)
    tile = jnp.arange(-(-count // size) + groups)
    group = jnp.minimum(jnp.searchsorted(tile_ends, tile, side="right"), groups - 1)
    first = starts[group] + (tile - tile_starts[group]) * size
    rows = jnp.clip(first[:, None] + jnp.arange(size), 0, count - 1)
    row = jnp.arange(count)
    of = jnp.minimum(jnp.searchsorted(ends, row, side="right"), groups - 1)
    return group, rows, tile_starts[of] * size + row - starts[of]
