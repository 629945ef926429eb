"""Checks every attention implementation of this device against float64; see accuracy."""

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.attention import dispatch, gpu_mosaic
from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.attention.partial import Partial
from lsjax.cli.device_check.accuracy import as_on_accelerators, compare
from lsjax.cli.device_check.kept_blocks import check_kept_blocks
from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import Sizes

Attend = Callable[[jax.Array, KVArray, KVArray, KeyRange], Partial]

_ALIGNED = (
    256  # longest block of keys that a kernel reads, if no higher power of 2 divides their number
)
_COMPILED_AT_ONCE = 8
_GROUP = 7  # query heads per KV head in a decode step
_QUERIES_PER_BLOCK = 260
_SAMPLED_QUERIES = 64  # queries of a prefill that are checked, since float64 is slow


class Case(NamedTuple):
    """A case of attention to check.

    Attributes:
      head_dim: channels per head.
      cache: format of the cache: float32, bfloat16, int8 or int4.
      queries: number of query tokens; few are a decode step, many a prefill.
      keys: number of slots in the cache.
      window: sliding window in tokens, or None.
      dtype: dtype of the queries, and of the plain attention compared with.
    """

    head_dim: int
    cache: str
    queries: int
    keys: int
    window: int | None = None
    dtype: str = "bfloat16"


class Way(NamedTuple):
    """An attention implementation.

    Attributes:
      name: name in the report.
      attend: function (q, k, v, key_range) -> Partial.
      takes: whether it supports a case.
      exact: whether, for a case, it reads no block of keys that no query sees.
    """

    name: str
    attend: Attend
    takes: Callable[[Case], bool]
    exact: Callable[[Case], bool]


def kernels(sizes: Sizes, record: Recorder) -> None:
    """Checks every case with every implementation that supports it, and records a row for each."""
    platform = jax.default_backend()
    work = [
        (way, case) for way in _ways(platform, sizes) for case in _cases(sizes) if way.takes(case)
    ]

    def checked(what: tuple[Way, Case]) -> dict[str, Any]:
        way, case = what
        row = {"check": way.name, "case": case._asdict()}
        try:
            return row | check(case, way, platform)
        except Exception as error:  # a kernel that fails to compile must not hide the others
            return row | {"ok": False, "why": repr(error)[:500]}

    with ThreadPoolExecutor(min(os.cpu_count(), _COMPILED_AT_ONCE)) as pool:
        for row in pool.map(checked, work):
            record(**row)
    for row in check_kept_blocks(platform, sizes):
        record(**row)
    if _has_triton(platform):
        from lsjax.cli.device_check.token_step import check_token

        for head_dim in sizes.head_dims:
            row = {"check": "the GPU's kernel that writes a token", "case": {"head_dim": head_dim}}
            record(**row, **check_token(head_dim, interpret=platform == "cpu"))


def _cases(sizes: Sizes) -> Iterator[Case]:
    many, slots = sizes.check_prefill
    for head_dim in sizes.head_dims:
        for cache in ("int8", "bfloat16", "float32", "int4"):
            dtype = "float32" if cache == "float32" else "bfloat16"
            window = sizes.check_keys // 3
            yield Case(head_dim, cache, 1, sizes.check_keys, dtype=dtype)
            yield Case(head_dim, cache, 5, sizes.check_keys, window, dtype)
            if cache in ("int8", "bfloat16"):
                yield Case(head_dim, cache, many, slots)
        yield Case(head_dim, "bfloat16", many, slots, window=_prefill_window(sizes))
    # Only two, since the decode kernel takes twenty seconds to compile for these.
    for head_dim in sizes.head_dims[::-2][:2]:
        yield Case(head_dim, "int8", 5, sizes.check_keys, dtype="float32")
    yield Case(sizes.head_dims[0], "float32", many, sizes.check_keys, dtype="float32")
    yield Case(sizes.head_dims[0], "int4", many, sizes.check_keys)


def _ways(platform: str, sizes: Sizes) -> Iterator[Way]:
    def dispatched(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
        return dispatch.attend(platform, q, k, v, key_range, None)

    gpu_takes = _gpu_decode_takes if dispatch.HAS_TRITON else _mosaic_takes
    in_place = {"gpu": gpu_takes, "tpu": _tpu_takes}.get(platform, lambda case: False)
    yield Way(f"attention on {platform}", dispatched, lambda case: True, in_place)
    if platform == "gpu":
        for window in (None, _prefill_window(sizes)):
            yield _in_blocks(platform, window)
        yield Way("Mosaic GPU's decode", dispatch.decode_by_mosaic, _mosaic_takes, _mosaic_takes)
    if _has_triton(platform):
        beside = functools.partial(_gpu_decode_beside_floats, interpret=platform == "cpu")
        yield Way("the GPU's decode kernel, floats beside int8", beside, _is_token, _no)
    if platform == "cpu":
        if _has_triton(platform):
            decode = "the GPU's decode kernel, interpreted"
            yield Way(decode, _gpu_decode, _gpu_decode_takes, _gpu_decode_takes)
        yield Way("the TPU's kernel, interpreted", _tpu_kernel, _tpu_takes, _tpu_takes)


def _in_blocks(platform: str, window: int | None) -> Way:
    """Returns prefill whose queries are known to come in blocks, as a model's are."""

    def attend_in_blocks(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
        size = math.gcd(q.shape[3], _QUERIES_PER_BLOCK)
        blocks = QueryBlocks(size, causal=True, window=window)
        start = None if window is None else key_range.start
        return dispatch.attend(platform, q, k, v, key_range._replace(start=start), None, blocks)

    def takes(case: Case) -> bool:
        return case.queries > 16 and case.window == window and case.dtype == "bfloat16"

    name = f"attention in blocks on {platform}" + ("" if window is None else ", with a window")
    return Way(name, attend_in_blocks, takes, lambda case: False)


def _prefill_window(sizes: Sizes) -> int:
    return sizes.check_prefill[1] // 3


def _gpu_decode_takes(case: Case) -> bool:
    return case.cache != "int4" and case.queries <= 16


def _mosaic_takes(case: Case) -> bool:
    q = jax.ShapeDtypeStruct((1, 1, _GROUP, case.queries, case.head_dim), case.dtype)
    k = jax.ShapeDtypeStruct((1, 1, case.keys, case.head_dim), case.cache)
    return gpu_mosaic.takes(q, k)


def _has_triton(platform: str) -> bool:
    return platform != "tpu" and dispatch.HAS_TRITON


def _is_token(case: Case) -> bool:
    return case.cache == "int8" and case.queries == 1


def _no(case: Case) -> bool:
    return False


def _tpu_takes(case: Case) -> bool:
    return case.cache != "int4"


def _gpu_decode(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
    from lsjax.attention import gpu

    k, v = as_on_accelerators(k), as_on_accelerators(v)
    slots = gpu.Slots(k.data, v.data, k.scale, v.scale, key_range.start, key_range.stop)
    return gpu.decode(q, slots, interpret=True)


def _gpu_decode_beside_floats(
    q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange, interpret: bool
) -> Partial:
    """Attends to the first slots as floats, as to the block beside a quantized cache."""
    from lsjax.attention import gpu

    k, v = as_on_accelerators(k), as_on_accelerators(v)
    begin, end, count = key_range.start, key_range.stop, k.capacity // 2
    far = gpu.Slots(k.data, v.data, k.scale, v.scale, jnp.maximum(begin, count), end)
    floats = (x.block(None, 0, count).dequantize().astype(q.dtype) for x in (k, v))
    near = gpu.Slots(*floats, None, None, begin, jnp.minimum(end, count))
    return gpu.decode(q, far, near, interpret=interpret)


def _tpu_kernel(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
    from lsjax.attention import tpu

    k, v = as_on_accelerators(k), as_on_accelerators(v)
    return tpu.attend(
        q, k.data, v.data, k.scale, v.scale, key_range.start, key_range.stop, interpret=True
    )


def check(case: Case, way: Way, platform: str) -> dict[str, Any]:
    """Runs a case and compares its errors from float64 with those of plain attention.

    Returns:
      Row with ok, the errors of values and lse, and those of plain attention.
    """
    q, k, v, begin, end = _inputs(case, platform)
    stores = _spoiled(k, v, begin, end) if way.exact(case) else (k, v)
    got = jax.jit(way.attend)(q, *stores, KeyRange(begin, end, end - 1))
    sample = np.unique(np.linspace(0, case.queries - 1, _SAMPLED_QUERIES, dtype=int))
    slots, begin, end = np.arange(case.keys), *(np.asarray(x)[:, sample] for x in (begin, end))
    visible = (slots >= begin[..., None]) & (slots < end[..., None])
    got = jax.tree.map(lambda x: x[:, :, :, sample], got)
    return compare(q[:, :, :, sample], k, v, visible[:, None], got)


def _inputs(case: Case, platform: str) -> tuple[jax.Array, KVArray, KVArray, jax.Array, jax.Array]:
    """Draws peaked q, k, v, begin and end; in decode one row sees nothing, one reaches the end."""
    batch, kv_heads, group = (3, 2, _GROUP) if case.queries <= 16 else (1, 2, 4)
    rng = np.random.default_rng(case.head_dim + case.queries)
    shape = batch, kv_heads, group, case.queries, case.head_dim
    q = jnp.asarray(2 * rng.standard_normal(shape) * case.head_dim**-0.5, jnp.float32)
    slots = batch, kv_heads, case.keys, case.head_dim

    @jax.jit
    def encoded(x: jax.Array) -> KVArray:
        return empty_kv_array(slots, case.cache, platform).quantize(x)

    k, v = (encoded(jnp.asarray(rng.standard_normal(slots), jnp.float32)) for _ in range(2))
    if batch == 1:
        end = case.keys - case.queries + np.arange(1, case.queries + 1)[None]
    else:
        end = np.array([[-case.queries], [case.keys], [case.keys * 2 // 3]])
        end = end + np.arange(case.queries)
    begin = np.zeros_like(end) if case.window is None else end - case.window
    bounds = (jnp.asarray(x, jnp.int32) for x in (begin, end))
    return q.astype(case.dtype), k, v, *bounds


def _spoiled(k: KVArray, v: KVArray, begin: jax.Array, end: jax.Array) -> tuple[KVArray, KVArray]:
    """Writes NaN where no needed block of keys can reach, so that reading it shows."""
    first, last = jnp.min(begin, axis=1) // _ALIGNED, -(-jnp.max(end, axis=1) // _ALIGNED)
    block = jnp.arange(k.capacity) // _ALIGNED
    needed = (block >= first[:, None]) & (block < last[:, None])

    def spoil(store: KVArray) -> KVArray:
        # NaN goes into the scales, or into the entries if there are none; on a CPU as bits.
        x = store.data if store.scale is None else store.scale
        nan = jnp.array(jnp.nan, jnp.bfloat16)
        nan = jax.lax.bitcast_convert_type(nan, jnp.uint16) if x.dtype == jnp.uint16 else nan
        here = needed.reshape(needed.shape[0], 1, -1, *[1] * (x.ndim - 3))
        x = jnp.where(here, x, nan.astype(x.dtype))
        return store.replace(data=x) if store.scale is None else store.replace(scale=x)

    return spoil(k), spoil(v)
