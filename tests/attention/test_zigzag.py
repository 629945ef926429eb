"""Where positions lie on the context axis: each in one place, in order, in equal shares of work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax.distributed.sequence_layout import (
    CAPACITY_MULTIPLE,
    Zigzag,
    round_up_to_blocks,
    zigzag_of,
)


@st.composite
def zigzags(draw):
    devices = draw(st.integers(1, 9))
    return Zigzag(devices, 2 * devices * draw(st.integers(1, 5)))


@settings(deadline=None, max_examples=15)
@given(zigzags(), st.integers(1, 4))
def test_every_position_has_one_slot(zigzag, stripes):
    length = stripes * zigzag.block_length
    positions, found = np.arange(length), []
    for device in range(zigzag.devices):
        own = np.asarray(zigzag.position(device, np.arange(length // zigzag.devices)))
        assert np.all(np.diff(own) > 0)
        holds = np.asarray(zigzag.device(positions)) == device
        np.testing.assert_array_equal(positions[holds], own)
        slots = np.asarray(zigzag.num_local_slots_before(device, positions))
        np.testing.assert_array_equal(slots, np.searchsorted(own, positions))
        found.append(own)
    assert sorted(np.concatenate(found)) == list(range(length))
    np.testing.assert_array_equal(np.concatenate(found), zigzag.permutation(length))


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_a_chunk_and_a_cache_are_whole_stripes(chunk, devices):
    whole = round_up_to_blocks(chunk, devices)
    assert chunk <= whole < chunk + 2 * devices
    if devices > 1:
        block_length = zigzag_of(whole, devices).block_length
        assert whole % block_length == 0 and CAPACITY_MULTIPLE * devices % block_length == 0


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("chunk", [512, 4096, 32768])
def test_every_device_attends_as_much(devices, chunk):
    """Pairs of a query and a key that it sees, over a prompt; contiguous parts: 1.88 at 8."""
    zigzag = zigzag_of(chunk, devices)
    work = [
        np.sum(np.asarray(zigzag.position(d, np.arange(65536 // devices)), np.int64) + 1)
        for d in range(devices)
    ]
    assert max(work) / np.mean(work) < 1.001


def test_positions_that_cannot_be_shared():
    with pytest.raises(ValueError, match="8 devices cannot share 24 positions"):
        Zigzag(8, 24)
