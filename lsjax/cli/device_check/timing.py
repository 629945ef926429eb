"""Times calls, and makes random keys and values to time them with."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.attention.kv_array import KVArray

# Length of a round of calls that are timed together. Waiting for a device takes tens of
# microseconds, which must not count.
_ROUND_SECONDS = 0.02


def first_and_median(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Returns the seconds of the first call, which compiles, and the median per call of `rounds`.

    A round is so many calls in a row that the wait for the last one hardly counts.
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
    """Makes an array on the device: normal floats, or for int8 uniform integers."""

    @jax.jit
    def make(key: jax.Array) -> jax.Array:
        if dtype == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return jax.random.normal(key, shape, dtype)

    return make(jax.random.key(seed))


def random_kv_array(shape: tuple[int, int, int, int], cache: str, seed: int) -> KVArray:
    """Makes random keys or values [batch, kv_heads, keys, head_dim] in a cache's format."""
    scale = jnp.full(shape[:3], 0.02, jnp.bfloat16) if cache == "int8" else None
    return KVArray(random_array(shape, cache, seed), scale)


def store_bytes(*stores: KVArray) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(stores))
