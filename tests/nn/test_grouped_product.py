import jax
import jax.numpy as jnp
import numpy as np

from lsjax.nn.grouped_product import grouped_product


def test_rows_meet_the_matrix_of_their_group():
    sizes = [20, 0, 17, 7]  # several tiles, none, and ends within a tile; six rows of no group
    draw = np.random.default_rng(0).normal
    x, weight, dy = (draw(size=s).astype(np.float32) for s in ((50, 6), (4, 5, 6), (50, 5)))
    used, ids = sum(sizes), np.repeat(np.arange(4), sizes)

    @jax.jit
    def ours(x, weight):
        return grouped_product(x, weight, jnp.array(sizes))[:used]

    def plain(x, weight):
        return jnp.einsum("ri,roi->ro", x[:used], weight[ids])

    y, gradients = jax.vjp(ours, x, weight)
    expected, expected_gradients = jax.vjp(plain, x, weight)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for found, wanted in zip(gradients(dy[:used]), expected_gradients(dy[:used]), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_only_one_matrix_and_no_row_times_groups_is_held():
    shapes = [((4096, 64), jnp.float32), ((64, 32, 64), jnp.int8), ((64,), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    held = jax.jit(grouped_product).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert held < 3 * (4096 + 64 * 128) * 64 * 4  # the rows of all tiles; 64 times as many before
