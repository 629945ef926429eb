"""Where positions lie on the context axis: each in one place, in order, in equal shares of work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax.cache import GRANULE, Zigzag, stripe_of, whole_stripes


@st.composite
def zigzags(draw):
    devices = draw(st.integers(1, 9))
    return Zigzag(devices, 2 * devices * draw(st.integers(1, 5)))


@settings(deadline=None, max_examples=30)
@given(zigzags(), st.integers(1, 4))
def test_every_position_has_one_slot(zigzag, stripes):
    length = stripes * zigzag.stripe
    positions, found = np.arange(length), []
    for device in range(zigzag.devices):
        own = np.asarray(zigzag.position(device, np.arange(length // zigzag.devices)))
        assert np.all(np.diff(own) > 0)
        holds = np.asarray(zigzag.device(positions)) == device
        np.testing.assert_array_equal(positions[holds], own)
        slots = np.asarray(zigzag.slots_before(device, positions))
        np.testing.assert_array_equal(slots, np.searchsorted(own, positions))
        found.append(own)
    assert sorted(np.concatenate(found)) == list(range(length))
    np.testing.assert_array_equal(np.concatenate(found), zigzag.order(length))


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_a_chunk_and_a_cache_are_whole_stripes(chunk, devices):
    whole = whole_stripes(chunk, devices)
    assert chunk <= whole < chunk + 2 * devices
    if devices > 1:
        stripe = stripe_of(whole, devices)
        Zigzag(devices, stripe)
        assert whole % stripe == 0 and GRANULE * devices % stripe == 0


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("chunk", [512, 4096, 32768])
def test_every_device_attends_as_much(devices, chunk):
    """Pairs of a query and a key that it sees, over a prompt; contiguous parts: 1.88 at 8."""
    zigzag = Zigzag(devices, stripe_of(chunk, devices))
    work = [
        np.sum(np.asarray(zigzag.position(d, np.arange(65536 // devices)), np.int64) + 1)
        for d in range(devices)
    ]
    assert max(work) / np.mean(work) < 1.001


def test_positions_that_cannot_be_shared():
    with pytest.raises(ValueError, match="8 devices cannot share 24 positions"):
        Zigzag(8, 24)
