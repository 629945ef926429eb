"""The PyTorch side of bench_attention.py, run by a Python that has torch.

Reads requests from stdin and answers each on stdout, one JSON object per line:

    {"prepare": case}          -> {name: work of one call, FLOPs or bytes}
    {"run": name, "calls": n}  -> seconds that n calls took
"""

import functools
import itertools
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_DTYPES = ("float32", "bfloat16")


def _limits(case):
    size, count = case["product_size"], case["array_size"]
    found = {}
    for dtype in _DTYPES:
        a = _random(size, size, dtype=dtype)
        found[f"product {dtype}"] = (lambda a=a: a @ a), 2 * size**3
    x = _random(count, dtype="float32")
    found["read"] = x.sum, 4 * count
    y = torch.empty_like(x)
    found["copy"] = (lambda: y.copy_(x)), 8 * count
    return found


def _decode(case):
    heads, kv_heads, head_dim = case["heads"], case["kv_heads"], case["head_dim"]
    found = {}
    for dtype in _DTYPES:
        q = _random(1, heads, 1, head_dim, dtype=dtype)
        shape = 1, kv_heads, case["length"], head_dim
        k, v = (_random(*shape, dtype=dtype) for _ in range(2))
        rows = q.view(1, kv_heads, heads // kv_heads, head_dim)
        calls = {
            name: functools.partial(call, q)
            for name, call in _backends("sdpa", dtype, enable_gqa=True).items()
        }
        for name, call in _backends("sdpa, group as rows", dtype).items():
            calls[name] = functools.partial(call, rows)
        calls["matmul, softmax, matmul"] = lambda k, v, q=rows: (
            torch.softmax(q @ k.mT * head_dim**-0.5, dim=-1) @ v
        )
        work = k.nbytes + v.nbytes
        copies = [(k.clone(), v.clone()) for _ in range(case["rotated_bytes"] // work)]
        turns = itertools.cycle([(k, v), *copies])
        for name, call in calls.items():
            found[f"{name} {dtype}"] = (
                (lambda call=call, turns=turns: call(*next(turns))),
                work,
            )
    return found


def _prefill(case):
    heads, kv_heads = case["heads"], case["kv_heads"]
    found = {}
    for dtype in _DTYPES:
        q = _random(1, heads, case["length"], case["head_dim"], dtype=dtype)
        k, v = (
            _random(1, kv_heads, case["length"], case["head_dim"], dtype=dtype) for _ in range(2)
        )
        for name, call in _backends("sdpa", dtype, is_causal=True, enable_gqa=True).items():
            found[f"{name} {dtype}"] = functools.partial(call, q, k, v), case["flops"]
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        for name, call in _backends("sdpa, keys repeated", dtype, is_causal=True).items():
            found[f"{name} {dtype}"] = functools.partial(call, q, k, v), case["flops"]
    return found


def _backends(name, dtype, **options):
    """Attention as PyTorch chooses it and, on a GPU in bfloat16, by the backends that it has."""

    def by(backend, *qkv):
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*qkv, **options)

    found = {name: functools.partial(F.scaled_dot_product_attention, **options)}
    if _DEVICE == "cuda" and dtype == "bfloat16":
        found[f"{name}, flash"] = functools.partial(by, SDPBackend.FLASH_ATTENTION)
        found[f"{name}, cuDNN"] = functools.partial(by, SDPBackend.CUDNN_ATTENTION)
    return found


def _random(*shape, dtype):
    return torch.randn(shape, device=_DEVICE).to(getattr(torch, dtype))


def _runs(name, call):
    """Whether a call runs: not every backend has a kernel for every case."""
    try:
        call()
    except RuntimeError as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return False
    return True


def _seconds(call, calls):
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if _DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    kinds = {"limits": _limits, "decode": _decode, "prefill": _prefill}
    found = {}
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            if "prepare" in request:
                found.clear()  # before the next case is made
                made = kinds[request["prepare"]["kind"]](request["prepare"])
                found |= {name: x for name, x in made.items() if _runs(name, x[0])}
                answer = {name: work for name, (_, work) in found.items()}
            else:
                answer = _seconds(found[request["run"]][0], request["calls"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
