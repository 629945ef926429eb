"""The PyTorch side of bench_attention.py, run by a Python that has torch.

Reads requests from stdin and answers each on stdout, one JSON object per line:

    {"prepare": case}          -> {name: work of one call, FLOPs or bytes}
    {"run": name, "calls": n}  -> seconds that n calls took
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

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
        k, v = (_random(1, kv_heads, case["length"], head_dim, dtype=dtype) for _ in range(2))
        rows = q.view(1, kv_heads, heads // kv_heads, head_dim)
        calls = {
            "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            "sdpa, group as rows": lambda q=rows, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "matmul, softmax, matmul": lambda q=rows, k=k, v=v: (
                torch.softmax(q @ k.mT * head_dim**-0.5, dim=-1) @ v
            ),
        }
        work = k.nbytes + v.nbytes
        found |= {f"{name} {dtype}": (call, work) for name, call in calls.items()}
    return found


def _prefill(case):
    heads, kv_heads = case["heads"], case["kv_heads"]
    found = {}
    for dtype in _DTYPES:
        q = _random(1, heads, case["length"], case["head_dim"], dtype=dtype)
        k, v = (
            _random(1, kv_heads, case["length"], case["head_dim"], dtype=dtype) for _ in range(2)
        )
        found[f"sdpa {dtype}"] = (
            (
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )
            ),
            case["flops"],
        )
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        found[f"sdpa, keys repeated {dtype}"] = (
            (lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
            case["flops"],
        )
    return found


def _random(*shape, dtype):
    return torch.randn(shape, device=_DEVICE).to(getattr(torch, dtype))


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
                found |= kinds[request["prepare"]["kind"]](request["prepare"])
                answer = {name: work for name, (_, work) in found.items()}
            else:
                answer = _seconds(found[request["run"]][0], request["calls"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
