"""Checks the kernel that writes a token on a GPU against the same steps one by one."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lsjax.attention import gpu_token
from lsjax.attention.hadamard import hadamard_transform
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cli.device_check.timing import random_array

_SLOTS, _NEAR_SLOTS, _KV_HEADS, _GROUP = 1024, 256, 2, 7


def check_token(head_dim: int, interpret: bool) -> dict[str, Any]:
    """Writes a token into every row of an int8 cache of bfloat16 activations.

    Returns:
      Row with ok, the largest distance of entries from those expected in quantization steps, and
      the number of slots that should have been left alone and were not.
    """
    slots = jnp.array([0, _SLOTS - 1, 300], jnp.int32)
    rows = len(slots), _KV_HEADS
    q, k, v = (
        random_array((*rows, *shape, 1, head_dim), "bfloat16", seed)
        for seed, shape in enumerate(((_GROUP,), (), ()))
    )
    empty = empty_kv_array((*rows, _SLOTS, head_dim), "int8", "gpu")
    near = jnp.zeros((*rows, _NEAR_SLOTS, head_dim), q.dtype)
    stores = gpu_token.Stores(empty.data, empty.scale, empty.data, empty.scale, near, near)
    near_slots = slots % _NEAR_SLOTS
    queries, written = gpu_token.write_token(q, k, v, stores, slots, near_slots, interpret)
    k = hadamard_transform(k)
    far, touched = [], 0
    for x, data, scale, held in (
        (k, written.k, written.k_scale, written.near_k),
        (v, written.v, written.v_scale, written.near_v),
    ):
        for row, (at, near_at) in enumerate(zip(slots, near_slots, strict=True)):
            step = np.asarray(scale[row, :, at], np.float32)[:, None]
            expected = np.asarray(x[row, :, 0], np.float32)
            far.append((np.asarray(data[row, :, at]) * step - expected) / step)
            off = np.asarray(held[row, :, near_at], np.float32) - expected
            far.append(off / (np.abs(expected) / 64 + 1e-6))  # a few units of bfloat16
            touched += int(np.any(np.asarray(data[row]) != 0, axis=-1).sum()) - _KV_HEADS
    far.append((np.asarray(queries - hadamard_transform(q).astype(q.dtype), np.float32)) * 8)
    largest = float(np.max([np.abs(x).max() for x in far]))
    return {"steps": largest, "touched": touched, "ok": largest <= 1 and touched == 0}
