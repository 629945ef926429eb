"""Timing calls, and keys and values to time them over."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.cache import Store


def first_and_median(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and the median of `rounds` after one more."""

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = seconds()
    seconds()
    return first, statistics.median(seconds() for _ in range(rounds))


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
