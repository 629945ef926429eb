"""Checks every attention implementation of this device against float64.

The bound is the error of plain attention in the same dtype on the same device. A kernel's error may
be at most twice as large, plus a small constant in case plain attention happens to be exact.
"""

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

    k, v = _as_on_accelerators(k), _as_on_accelerators(v)
    slots = gpu.Slots(k.data, v.data, k.scale, v.scale, key_range.start, key_range.stop)
    return gpu.decode(q, slots, interpret=True)


def _gpu_decode_beside_floats(
    q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange, interpret: bool
) -> Partial:
    """Attends to the first slots as floats, as to the block beside a quantized cache."""
    from lsjax.attention import gpu

    k, v = _as_on_accelerators(k), _as_on_accelerators(v)
    begin, end, count = key_range.start, key_range.stop, k.capacity // 2
    far = gpu.Slots(k.data, v.data, k.scale, v.scale, jnp.maximum(begin, count), end)
    floats = (x.block(None, 0, count).dequantize().astype(q.dtype) for x in (k, v))
    near = gpu.Slots(*floats, None, None, begin, jnp.minimum(end, count))
    return gpu.decode(q, far, near, interpret=interpret)


def _tpu_kernel(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
    from lsjax.attention import tpu

    k, v = _as_on_accelerators(k), _as_on_accelerators(v)
    return tpu.attend(
        q, k.data, v.data, k.scale, v.scale, key_range.start, key_range.stop, interpret=True
    )


def _as_on_accelerators(store: KVArray) -> KVArray:
    """Returns a KV array with bfloat16 in its own dtype; a CPU holds its bits as uint16."""

    def held(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    return jax.tree.map(held, store)


def check(case: Case, way: Way, platform: str) -> dict[str, Any]:
    """Runs a case and compares its errors from float64 with those of plain attention.

    Returns:
      Row with ok, the errors of values and lse, and those of plain attention.
    """
    q, k, v, begin, end = _inputs(case, platform)
    stores = _spoiled(k, v, begin, end) if way.exact(case) else (k, v)
    got = jax.jit(way.attend)(q, *stores, KeyRange(begin, end, end - 1))
    sample = np.unique(np.linspace(0, case.queries - 1, _SAMPLED_QUERIES, dtype=int))
    q, begin, end = q[:, :, :, sample], begin[:, sample], end[:, sample]
    values, lse = (np.asarray(x, np.float64)[:, :, :, sample] for x in (got.values, got.lse))
    keys, entries = k.dequantize(), v.dequantize()
    truth = _attention(*(np.asarray(x, np.float64) for x in (q, keys, entries)), begin, end)
    plain = _plain(q, keys, entries, begin, end)
    key_range = np.isfinite(truth[1])
    errors = [_errors(truth, of, key_range) for of in ((values, lse), plain)]
    spare = (2e-5, 2e-5) if case.dtype == "float32" else (1e-3, 1e-4)
    near = all(a <= 2 * b + c for a, b, c in zip(*errors, spare, strict=True))
    blind = np.array_equal(key_range, np.isfinite(lse)) and not values[~key_range].any()
    row = dict(zip(("error", "lse_error"), errors[0], strict=True))
    row |= dict(zip(("plain_error", "plain_lse_error"), errors[1], strict=True))
    return row | {"ok": bool(near and blind and np.isfinite(values).all())}


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


def _attention(q, k, v, begin, end) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and lse in float64; 0 and -inf for a query that sees nothing."""
    slots = np.arange(k.shape[2])
    begin, end = np.asarray(begin)[..., None], np.asarray(end)[..., None]
    visible = ((slots >= begin) & (slots < end))[:, None, None]
    scores = np.where(visible, np.einsum("bkgld,bksd->bkgls", q, k, optimize=True), -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    values = np.einsum("bkgls,bksd->bkgld", weights, v, optimize=True)
    with np.errstate(divide="ignore"):
        return values / np.where(total > 0, total, 1), (highest + np.log(total))[..., 0]


@jax.jit
def _plain(q, k, v, begin, end) -> tuple[jax.Array, jax.Array]:
    """Attends with all scores at once, in q's dtype where a model would; NaN if nothing is seen."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    slots = jnp.arange(k.shape[2])
    visible = (slots >= begin[..., None]) & (slots < end[..., None])
    scores = dot("bkgld,bksd->bkgls", q, k.astype(q.dtype))
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    values = dot("bkgls,bksd->bkgld", weights, v.astype(q.dtype))
    return values.astype(q.dtype), jax.nn.logsumexp(scores, axis=-1)


def _errors(truth, got, key_range: np.ndarray) -> tuple[float, float]:
    """Returns the largest error norm of values and error of lse, over queries that see keys."""
    values, lse = (np.asarray(x, np.float64) for x in got)
    far = np.linalg.norm(values - truth[0], axis=-1)[key_range]
    lse_far = np.abs(lse[key_range] - truth[1][key_range])
    return float(np.max(far, initial=0)), float(np.max(lse_far, initial=0))
