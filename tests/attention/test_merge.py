"""The algebra of partial attention: how blocks, shards and devices are put together."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from lsjax.attention.partial import Partial, from_sums, merge, merge_over_axis
from lsjax.distributed.sharding import make_mesh, parse_mesh

ROWS, WIDTH = 6, 4
EPS = 2.0**-23
QUICK = settings(max_examples=40, deadline=None)
together = jax.jit(merge)

NOTHING = Partial(values=np.zeros((ROWS, WIDTH), "f4"), lse=np.full(ROWS, -np.inf, "f4"))


@st.composite
def partials(draw, limit=1e4):
    """Rows that see no key have values of 0 and an lse of -inf."""
    sizes = st.floats(-limit, limit, width=32, allow_subnormal=False) | st.just(float("-inf"))
    entries = st.floats(-10, 10, width=32, allow_subnormal=False)
    lse = draw(hnp.arrays(np.float32, ROWS, elements=sizes))
    values = draw(hnp.arrays(np.float32, (ROWS, WIDTH), elements=entries))
    return Partial(values=np.where(lse[:, None] == -np.inf, np.float32(0), values), lse=lse)


def assert_same(a, b, limit=1e4):
    """Within what rounding an lse of up to `limit` to float32 does to the weights."""
    np.testing.assert_allclose(a.lse, b.lse, rtol=0, atol=4 * EPS * limit)
    np.testing.assert_allclose(a.values, b.values, rtol=0, atol=10 * 8 * EPS * limit)


@QUICK
@given(partials(), partials())
def test_commutative(a, b):
    ab, ba = together(a, b), together(b, a)
    np.testing.assert_array_equal(ab.lse, ba.lse)
    np.testing.assert_allclose(ab.values, ba.values, rtol=0, atol=40 * EPS)


@QUICK
@given(partials(), partials(), partials())
def test_associative(a, b, c):
    assert_same(together(together(a, b), c), together(a, together(b, c)))


@QUICK
@given(partials(limit=10), partials(limit=10), partials(limit=10))
def test_associative_to_the_last_digits_at_ordinary_scores(a, b, c):
    assert_same(together(together(a, b), c), together(a, together(b, c)), limit=10)


@QUICK
@given(partials())
def test_nothing_is_the_identity(a):
    for merged in (together(a, NOTHING), together(NOTHING, a)):
        np.testing.assert_array_equal(merged.lse, a.lse)
        np.testing.assert_array_equal(merged.values, a.values)


@QUICK
@given(partials(), partials())
def test_result_lies_between_the_two_and_is_finite(a, b):
    merged = together(a, b)
    assert not np.any(np.isnan(merged.lse)) and np.all(np.isfinite(merged.values))
    unseen = (a.lse == -np.inf) & (b.lse == -np.inf)
    np.testing.assert_array_equal(merged.lse == -np.inf, unseen)
    np.testing.assert_array_equal(merged.values[unseen], 0)
    largest = np.maximum(a.lse, b.lse)
    assert np.all(merged.lse >= largest) and np.all(merged.lse <= largest + np.log(2) + 1e-3)
    slack = 40 * EPS
    key_range = [np.where(p.lse[:, None] == -np.inf, np.nan, p.values) for p in (a, b)]
    assert np.all(merged.values[~unseen] >= np.fmin(*key_range)[~unseen] - slack)
    assert np.all(merged.values[~unseen] <= np.fmax(*key_range)[~unseen] + slack)


@jax.jit
def partial_of(scores, values):
    """[rows, keys] scores, -inf where masked -> their Partial."""
    running_max = jnp.max(scores, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(running_max == -jnp.inf, 0.0, running_max)[:, None])
    return from_sums(weights @ values, weights.sum(-1), running_max)


@QUICK
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 12), max_size=3), st.floats(0.1, 30))
def test_equals_the_oracle_over_the_union(seed, cuts, hadamard_transform):
    rng = np.random.default_rng(seed)
    scores = (hadamard_transform * rng.standard_normal((ROWS, 12))).astype("f4")
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    values = rng.standard_normal((12, WIDTH)).astype("f4")
    result = NOTHING
    for part in np.split(rng.permutation(12), sorted(cuts)):
        own = np.where(np.isin(np.arange(12), part), scores, np.float32(-np.inf))
        result = together(result, partial_of(own, values))

    wide = scores.astype(np.float64)
    key_range = np.any(wide > -np.inf, axis=-1)
    weights = np.exp(wide[key_range])
    total = weights.sum(-1)
    np.testing.assert_allclose(result.lse[key_range], np.log(total), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        result.values[key_range], weights @ values / total[:, None], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(result.lse[~key_range], -np.inf)
    np.testing.assert_array_equal(result.values[~key_range], 0)


def test_over_devices_as_one_by_one():
    mesh, spec = make_mesh(parse_mesh("context=8")), jax.sharding.PartitionSpec("context")
    rng = np.random.default_rng(0)
    lse = (100 * rng.standard_normal((8, ROWS))).astype("f4")
    lse[rng.random(lse.shape) < 0.4] = -np.inf
    lse[:, 0] = -np.inf
    values = np.where(lse[..., None] == -np.inf, 0, rng.standard_normal((8, ROWS, WIDTH)))
    parts = Partial(values=jnp.asarray(values, "f4"), lse=jnp.asarray(lse))
    over_devices = jax.shard_map(
        lambda p: merge_over_axis(p, "context"), mesh=mesh, in_specs=spec, out_specs=spec
    )(parts)
    expected = NOTHING
    for i in range(8):
        expected = together(expected, jax.tree.map(lambda x, i=i: x[i], parts))
    for i in range(8):
        assert_same(jax.tree.map(lambda x, i=i: x[i], over_devices), expected, limit=300)
