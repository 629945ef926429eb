"""Keeping the host's memory bounded while arrays arrive a group at a time."""

import gc

import jax


def settled(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays, once they are on their devices and the host's buffers for them are free.

    Orbax leaves those buffers in reference cycles, so that they add up until the collector runs;
    it does not see their size and comes late.
    """
    jax.block_until_ready(params)
    gc.collect()
    return params
