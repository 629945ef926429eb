"""Measures a device's limits: copies, reads and matrix products, by JAX and by PyTorch."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import HEADS, Heads, Sizes
from lsjax.cli.device_check.timing import first_and_median, random_array


def ceilings(sizes: Sizes, record: Recorder) -> None:
    """Times a copy, a read and a bfloat16 matrix product; other rates are compared with these."""
    for what, function in (("copy", jnp.negative), ("read", jnp.sum)):
        numbers = random_array((sizes.array_bytes // 4,), "float32", 0)
        work = numbers.nbytes * (2 if what == "copy" else 1)
        call = functools.partial(jax.jit(function), numbers)
        record(what=what, **_rate(sizes, call, work, "bytes_per_second"))
        del numbers, call
    n = sizes.product
    a, b = (random_array((n, n), "bfloat16", seed) for seed in (1, 2))
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    call = functools.partial(product, a, b)
    record(what="product", **_rate(sizes, call, 2 * n**3, "flops_per_second"))


def _rate(sizes: Sizes, call: Callable[[], Any], work: float, unit: str) -> dict[str, float]:
    _, seconds = first_and_median(call, sizes.rounds)
    return {"microseconds": seconds * 1e6, unit: work / seconds}


def torch_ceilings(sizes: Sizes, record: Recorder) -> None:
    """Times PyTorch's copy and matrix product, and its attention with each backend."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    record(**_torch_copy(torch, device, sizes))
    n = sizes.product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _torch_seconds(torch, lambda: a @ b, sizes.rounds)
    record(what="PyTorch product", flops_per_second=2 * n**3 / seconds)
    for name in sizes.heads:
        for keys in sizes.decode_keys:
            for row in _torch_decode(torch, device, HEADS[name], keys, sizes):
                record(heads=name, **row)
        for queries, keys in sizes.prefill:
            if queries == keys:
                for row in _torch_prefill(torch, device, HEADS[name], keys, sizes):
                    record(heads=name, **row)


def _torch_copy(torch: Any, device: str, sizes: Sizes) -> dict[str, Any]:
    source = torch.randn(sizes.array_bytes // 4, device=device)
    copy = torch.empty_like(source)
    seconds = _torch_seconds(torch, lambda: copy.copy_(source), sizes.rounds)
    return {"what": "PyTorch copy", "bytes_per_second": 2 * source.nbytes / seconds}


def _torch_decode(
    torch: Any, device: str, heads: Heads, keys: int, sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """Times decode of one token with each backend; the calls cycle through several caches."""
    work = 4 * heads.kv_heads * keys * heads.head_dim
    count = max(2, math.ceil(sizes.rotated_bytes / work))

    def draw(count: int, tokens: int) -> Any:
        shape = 1, count, tokens, heads.head_dim
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    caches = [(draw(heads.kv_heads, keys), draw(heads.kv_heads, keys)) for _ in range(count)]
    q, turns = draw(heads.kv_heads * heads.group, 1), itertools.cycle(caches)
    attention = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        return attention(q, *next(turns), enable_gqa=True)

    for backend in ("flash", "cuDNN", "efficient", "math"):
        row = {"what": f"PyTorch decode, {backend}", "keys": keys, "cache": "bfloat16"}
        yield row | _torch_rate(torch, backend, call, work, "bytes_per_second", sizes)


def _torch_prefill(
    torch: Any, device: str, heads: Heads, keys: int, sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """Times causal attention of a whole prompt, with the backends that do not store all scores."""

    def draw(count: int) -> Any:
        shape = 1, count, keys, heads.head_dim
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    q, k, v = (draw(n * heads.kv_heads) for n in (heads.group, 1, 1))
    attention = torch.nn.functional.scaled_dot_product_attention
    work = 2 * heads.kv_heads * heads.group * heads.head_dim * keys**2

    def call() -> Any:
        return attention(q, k, v, is_causal=True, enable_gqa=True)

    for backend in ("flash", "cuDNN"):
        row = {"what": f"PyTorch prefill, {backend}", "queries": keys, "keys": keys}
        yield row | _torch_rate(torch, backend, call, work, "flops_per_second", sizes)


def _torch_rate(
    torch: Any, backend: str, call: Callable[[], Any], work: float, unit: str, sizes: Sizes
) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    try:
        with sdpa_kernel([backends[backend]]):
            seconds = _torch_seconds(torch, call, sizes.rounds)
    except RuntimeError as error:  # this backend has no kernel for the case
        return {"left_out": str(error).partition("\n")[0][:200]}
    return {"microseconds": seconds * 1e6, unit: work / seconds}


def _torch_seconds(torch: Any, call: Callable[[], Any], rounds: int) -> float:
    """Returns the median time of `rounds` calls, after two warm-up calls."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(), seconds()
    return statistics.median(seconds() for _ in range(rounds))
