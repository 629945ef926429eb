"""Timing calls, and keys and values to time them over."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.cache import Store

# Of calls that are timed together: waiting for a device takes tens of microseconds, which must not
# count.
_ROUND_SECONDS = 0.02


def first_and_median(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of one call in the median of `rounds`.

    A round is as many calls, one right after the other, as make waiting for the last one cheap.
    """

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    first = seconds(1)
    calls = math.ceil(_ROUND_SECONDS / seconds(1))
    return first, statistics.median(seconds(calls) for _ in range(rounds))


def random_array(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    """Normal floats, or whole numbers of a byte, made on the device."""

    @jax.jit
    def make(key: jax.Array) -> jax.Array:
        if dtype == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return jax.random.normal(key, shape, dtype)

    return make(jax.random.key(seed))


def random_store(shape: tuple[int, int, int, int], cache: str, seed: int) -> Store:
    """Keys or values [batch, kv_heads, keys, head_dim] in a cache's format."""
    scale = jnp.full(shape[:3], 0.02, jnp.bfloat16) if cache == "int8" else None
    return Store(random_array(shape, cache, seed), scale)


def store_bytes(*stores: Store) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(stores))
