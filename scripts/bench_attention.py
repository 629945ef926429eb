"""Attention alone: ours, PyTorch's and jax.nn's, beside what the machine can do.

    python scripts/bench_attention.py --torch_python /path/to/python/with/torch

Decode is one token over a cache of N keys; prefill is causal attention of N tokens to themselves,
whose FLOPs count the causal half. The machine's limits (matrix products, reading and copying
memory) are measured in the same run, by both sides. Ours divides the KV heads over --devices, as a
mesh's model axis does; with JAX_NUM_CPU_DEVICES a CPU has a device for each core. A compressed
cache is measured against a whole one over some layers, as heads that keep everything are few, on
one device. Formulations are measured in turn, round after round, one side idle while the other
runs; ratios are of the fastest rounds.
"""

import dataclasses
import functools
import json
import math
import operator
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax import cli
from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.attention.compensation import compensation
from lsjax.attention.partial import Partial, merge
from lsjax.cache import (
    CACHE_DTYPES,
    CompressedCache,
    LayerCache,
    Parts,
    Store,
    WindowSpec,
    Zigzag,
    compress,
    empty_store,
)
from lsjax.compilation import compiler_options
from lsjax.compression import Razor
from lsjax.errors import UserError
from lsjax.evals.plots import plot_times
from lsjax.files import check_writable, write_atomically
from lsjax.precision import einsum
from lsjax.sharding import make_mesh

FLAGS = flags.FLAGS

flags.DEFINE_list("decode_lengths", ["131072"], "Keys that one token attends to; may be empty.")
flags.DEFINE_list("prefill_lengths", ["8192", "32768"], "Tokens; may be empty.")
flags.DEFINE_integer("heads", 14, "Of queries.", lower_bound=1)
flags.DEFINE_integer("kv_heads", 2, "Of keys and values.", lower_bound=1)
flags.DEFINE_integer("head_dim", 64, "Channels of a head.", lower_bound=1)
flags.DEFINE_integer(
    "layers", 10, "With a compressed cache; of all their heads some keep everything.", lower_bound=1
)
flags.DEFINE_integer("devices", 1, "That our KV heads are divided over.", lower_bound=1)
flags.DEFINE_list("cache_dtypes", ["float32", "int8"], f"Of our cache: {', '.join(CACHE_DTYPES)}.")
flags.DEFINE_integer(
    "product_size", 2048, "Rows of the square matrices whose product is a limit.", lower_bound=1
)
flags.DEFINE_integer(
    "array_size", 2**26, "Numbers in the array that is read and copied for a limit.", lower_bound=1
)
flags.DEFINE_integer("rounds", 5, "Measurements of each formulation.", lower_bound=1)
flags.DEFINE_string("torch_python", None, "A Python that has torch, to measure as well.")
flags.DEFINE_string("output_json", None, "Write the figures here.")
flags.DEFINE_string("plot", None, "Write a PNG here.")

# What other figures are compared with: PyTorch's own call for grouped queries.
_SDPA = ("PyTorch", "sdpa float32")
# Length of a measurement: as many calls as fill it, so that starting a call does not count.
_MEASUREMENT_SECONDS = 0.02
# OpenMP's threads spin for as long as 200 ms after their last work.
_SECONDS_TO_IDLE = 0.25
# jax.nn.dot_product_attention holds all scores at once, some of them several times.
_LARGEST_SCORES_BYTES = 2**31

Call = Callable[[], Any]
Formulations = dict[str, tuple[Call, float]]  # name -> (call, its FLOPs or bytes)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: kind is limits, decode, compressed or prefill; length counts tokens."""

    kind: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    product_size: int
    array_size: int

    @property
    def flops(self) -> float:
        """Of both products of a prefill, without the half that causality spares."""
        return 2 * 2 * self.heads * self.head_dim * self.length**2 / 2

    def __str__(self) -> str:
        if self.kind == "limits":
            return "the machine's limits"
        if self.kind == "compressed":
            return f"decode in {FLAGS.layers} layers, {self.length:,} keys"
        if self.kind == "decode":
            return f"decode, one token over {self.length:,} keys"
        return f"prefill of {self.length:,} tokens"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One formulation, measured: seconds a call, and the rate in 1e9 FLOPs or bytes a second.

    The rate is the fastest round's.
    """

    side: str
    name: str
    seconds_min: float
    seconds_median: float
    rate: float

    @property
    def label(self) -> str:
        return f"{self.side}: {self.name}"


def our_decode(case: Case, dtype: str) -> tuple[Call, float]:
    """One token, which sees every key of a full cache; the work is the cache's bytes."""
    call, cache = _ours(case, dtype, jnp.full((1, 1), case.length - 1))
    return call, sum(x.nbytes for x in jax.tree.leaves(cache))


def our_prefill(case: Case, dtype: str) -> tuple[Call, float]:
    """A prompt's tokens to themselves, in one call; the work is the FLOPs."""
    call, _ = _ours(case, dtype, jnp.arange(case.length)[None])
    return call, case.flops


def _ours(case: Case, dtype: str, at: jax.Array) -> tuple[Call, tuple[Store, Store]]:
    """Attention of tokens at [1, length] positions to a full cache, and the cache."""
    platform = jax.devices()[0].platform
    mesh, heads = _mesh(), P(None, "model")

    @functools.partial(jax.jit, compiler_options=compiler_options(platform))
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False)
    def run(q: jax.Array, k: Store, v: Store) -> Partial:
        return attend(platform, q, k, v, Seen(None, at + 1, at), None)

    ours = _our_queries(case, at.shape[1], dtype), *_our_cache(case, dtype)
    q, *cache = jax.device_put(ours, NamedSharding(mesh, heads))
    return (lambda: run(q, *cache)), tuple(cache)


def _mesh() -> Mesh:
    return make_mesh({"model": FLAGS.devices})


def _ours_compressed(case: Case, dtype: str) -> Formulations:
    """One token in some layers, over whole caches and over compressed ones of default settings."""
    platform = jax.devices()[0].platform
    heads = FLAGS.layers * case.kv_heads
    kept = math.ceil(Razor.induction * heads) + math.ceil(Razor.echo * heads)
    each = [kept // FLAGS.layers + (i < kept % FLAGS.layers) for i in range(FLAGS.layers)]
    window = WindowSpec(Razor.sinks, max(Razor.window, math.ceil(Razor.window_share * case.length)))
    q, end = _our_queries(case, 1, dtype), jnp.full((1, 1), case.length)
    whole = LayerCache(*_our_cache(case, dtype), recent=None)

    def attention(q: jax.Array, k: Store, v: Store, end: jax.Array) -> Partial:
        return attend(platform, q, k, v, Seen(None, end, end - 1), None)

    def one(q: jax.Array, cache: LayerCache | CompressedCache) -> Partial:
        if isinstance(cache, LayerCache):
            return attention(q, cache.k, cache.v, end)
        parts = [attention(q[:, : h.k.data.shape[1]], h.k, h.v, end) for h in [cache.whole] if h]
        for w in cache.windows:
            q = q[:, -w.k.data.shape[1] :]
            near = attention(q, w.k, w.v, jnp.minimum(end, window.slots))
            parts.append(merge(near, compensation(q, w.dropped)))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)

    @functools.partial(jax.jit, compiler_options=compiler_options(platform))
    def run(q: jax.Array, layers: list[LayerCache | CompressedCache]) -> jax.Array:
        for layer in layers:
            q += one(q, layer).values.astype(q.dtype)
        return q

    @functools.partial(jax.jit, static_argnums=1)
    def small(cache: LayerCache, kept: int) -> CompressedCache:
        parts = Parts(kept, ((case.kv_heads - kept, window),) if kept < case.kv_heads else ())
        return compress(cache, end[0], parts, 1, Zigzag(1, 0))

    found = {}
    caches = {
        "": [jax.tree.map(jnp.copy, whole) for _ in range(FLAGS.layers)],
        " compressed": [small(whole, heads) for heads in each],
    }
    for name, layers in caches.items():
        work = sum(x.nbytes for x in jax.tree.leaves(layers))
        found[f"lsjax {dtype}{name}"] = (lambda layers=layers: run(q, layers)), work
    return found


def _our_queries(case: Case, length: int, dtype: str) -> jax.Array:
    shape = (1, case.kv_heads, case.heads // case.kv_heads, length, case.head_dim)
    # As with weights: bfloat16 beside a bfloat16 cache, and on accelerators.
    wide = dtype == "float32" or (dtype != "bfloat16" and jax.default_backend() == "cpu")
    q = _random(*shape) * case.head_dim**-0.5
    return q.astype(jnp.float32 if wide else jnp.bfloat16)


def _our_cache(case: Case, dtype: str) -> tuple[Store, Store]:
    shape = (1, case.kv_heads, case.length, case.head_dim)
    encode = jax.jit(lambda x: empty_store(shape, dtype, jax.default_backend()).encode(x))
    return encode(_random(*shape, seed=1)), encode(_random(*shape, seed=2))


def _jax_formulations(case: Case) -> Formulations:
    if case.kind == "limits":
        return _jax_limits(case)
    if case.kind == "compressed":
        return functools.reduce(
            operator.or_, (_ours_compressed(case, dtype) for dtype in FLAGS.cache_dtypes)
        )
    ours = our_decode if case.kind == "decode" else our_prefill
    found = {f"lsjax {dtype}": ours(case, dtype) for dtype in FLAGS.cache_dtypes}
    length = 1 if case.kind == "decode" else case.length
    if 4 * case.heads * length * case.length > _LARGEST_SCORES_BYTES:
        return found
    attention = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=case.kind == "prefill")
    )
    for dtype in FLAGS.cache_dtypes:
        if jnp.issubdtype(dtype, jnp.floating):
            q = _random(1, length, case.heads, case.head_dim).astype(dtype)
            k, v = (
                _random(1, case.length, case.kv_heads, case.head_dim, seed=seed).astype(dtype)
                for seed in (1, 2)
            )
            work = k.nbytes + v.nbytes if case.kind == "decode" else case.flops
            call = (lambda q=q, k=k, v=v: attention(q, k, v)), work
            found[f"jax.nn.dot_product_attention {dtype}"] = call
    return found


def _jax_limits(case: Case) -> Formulations:
    found = {}
    product = jax.jit(lambda a: einsum("ij,jk->ik", a, a))
    for dtype in ("float32", "bfloat16"):
        a = _random(case.product_size, case.product_size).astype(dtype)
        found[f"product {dtype}"] = (lambda a=a: product(a)), 2 * case.product_size**3
    x = _random(case.array_size)
    read = jax.jit(jnp.sum)
    found["read"] = (lambda: read(x)), x.nbytes
    # Into memory that is there already: a new array's pages would first have to be mapped.
    negate, y = jax.jit(jnp.negative, donate_argnums=0), -x

    def copy() -> jax.Array:
        nonlocal y
        y = negate(y)
        return y

    found["copy"] = copy, 2 * x.nbytes
    return found


def _random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


class JaxSide:
    """The formulations that this process measures."""

    def prepare(self, case: Case) -> dict[str, float]:
        """Makes a case's formulations; returns the work of each by name."""
        self._calls: dict[str, Call] = {}  # the last case's arrays go before the next come
        found = _jax_formulations(case)
        self._calls = {name: call for name, (call, _) in found.items()}
        return {name: work for name, (_, work) in found.items()}

    def run(self, name: str, calls: int) -> float:
        """Seconds that `calls` calls took."""
        start = time.perf_counter()
        for _ in range(calls):
            out = self._calls[name]()
        jax.block_until_ready(out)
        return time.perf_counter() - start


class TorchSide:
    """The formulations of scripts/torch_attention.py, in a process of its own."""

    def __init__(self, python: str):
        program = pathlib.Path(__file__).with_name("torch_attention.py")
        try:
            self._process = subprocess.Popen(
                [python, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(f"--torch_python does not start: {error}") from None

    def prepare(self, case: Case) -> dict[str, float]:
        """As JaxSide's."""
        return self._ask(prepare=dataclasses.asdict(case) | {"flops": case.flops})

    def run(self, name: str, calls: int) -> float:
        """As JaxSide's."""
        return self._ask(run=name, calls=calls)

    def _ask(self, **request: Any) -> Any:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UserError("--torch_python stopped; why, it says above.") from None

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def main(argv: list[str]) -> None:
    del argv
    for path in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(path)
    cases = list(_cases())
    sides = {"JAX": JaxSide()}
    if FLAGS.torch_python:
        sides["PyTorch"] = TorchSide(FLAGS.torch_python)
    try:
        limits, tables = {}, {}
        for case in cases:
            ours_alone = {"JAX": sides["JAX"]} if case.kind == "compressed" else sides
            figures = tables[case] = _measure(case, ours_alone)
            if case.kind == "limits":
                for figure in figures:
                    limits[figure.name] = max(limits.get(figure.name, 0), figure.rate)
            _show(case, figures, limits)
    finally:
        if FLAGS.torch_python:
            sides["PyTorch"].close()
    if FLAGS.output_json:
        device = jax.devices()[0].device_kind
        result = {"device": device, "limits": limits, "cases": []}
        for case, figures in tables.items():
            measured = [dataclasses.asdict(figure) | _ratios(figure, figures) for figure in figures]
            result["cases"].append(dataclasses.asdict(case) | {"figures": measured})
        write_atomically(FLAGS.output_json, json.dumps(result, indent=1) + "\n")
    if FLAGS.plot:
        times = {
            str(case): {f.label: f.seconds_min for f in figures}
            for case, figures in tables.items()
            if case.kind != "limits"
        }
        plot_times(times, FLAGS.plot)


def _cases() -> Iterator[Case]:
    unknown = set(FLAGS.cache_dtypes) - set(CACHE_DTYPES)
    if unknown:
        raise UserError(f"--cache_dtypes takes {', '.join(CACHE_DTYPES)}, not {sorted(unknown)}.")
    if FLAGS.heads % FLAGS.kv_heads:
        raise UserError(f"--kv_heads={FLAGS.kv_heads} does not divide --heads={FLAGS.heads}.")
    _mesh()  # refuses more devices than are here before anything is measured
    if FLAGS.kv_heads % FLAGS.devices:
        raise UserError(f"--devices={FLAGS.devices} does not divide --kv_heads={FLAGS.kv_heads}.")
    if not (FLAGS.decode_lengths or FLAGS.prefill_lengths):
        raise UserError("--decode_lengths and --prefill_lengths are both empty.")
    shape = (FLAGS.heads, FLAGS.kv_heads, FLAGS.head_dim, FLAGS.product_size, FLAGS.array_size)
    yield Case("limits", 0, *shape)
    for kind, flag in (
        ("decode", "decode_lengths"),
        ("compressed", "decode_lengths"),
        ("prefill", "prefill_lengths"),
    ):
        if words := FLAGS[flag].value:
            for length in cli.lengths(words, flag):
                yield Case(kind, length, *shape)


def _measure(case: Case, sides: dict[str, JaxSide | TorchSide]) -> list[Figure]:
    work, calls, runs = {}, {}, {}
    for side_name, side in sides.items():
        for name, amount in side.prepare(case).items():
            key = side_name, name
            side.run(name, 1)  # compiles
            seconds = side.run(name, 1)
            work[key], runs[key] = amount, []
            calls[key] = math.ceil(_MEASUREMENT_SECONDS / seconds)
    for _ in range(FLAGS.rounds):
        for side_name, side in sides.items():
            time.sleep(_SECONDS_TO_IDLE)
            for key in runs:
                if key[0] == side_name:
                    runs[key].append(side.run(key[1], calls[key]) / calls[key])
    return [
        Figure(*key, min(times), statistics.median(times), work[key] / min(times) / 1e9)
        for key, times in runs.items()
    ]


def _ratios(figure: Figure, figures: list[Figure]) -> dict[str, float]:
    """How many times faster the figure is than PyTorch's fastest, and than its SDPA; of a
    compressed cache, than over the whole one."""
    seconds = {f.name: f.seconds_min for f in figures}
    if figure.name.endswith(" compressed"):
        return {
            "times_whole": seconds[figure.name.removesuffix(" compressed")] / figure.seconds_min
        }
    theirs = {(f.side, f.name): f.seconds_min for f in figures if f.side == "PyTorch"}
    if _SDPA not in theirs:
        return {}
    best = min(theirs.values())
    return {
        "times_best_pytorch": best / figure.seconds_min,
        "times_sdpa": theirs[_SDPA] / figure.seconds_min,
    }


def _show(case: Case, figures: list[Figure], limits: dict[str, float]) -> None:
    units = {"limits": "1e9/s", "decode": "GB/s", "compressed": "GB/s", "prefill": "GFLOP/s"}
    unit = units[case.kind]
    heading = f"\n{case!s:<52}{'min ms':>10}{'median ms':>11}{unit:>10}"
    if case.kind != "limits":
        heading += f"{'of limit':>10}"
        heading += (
            f"{'x whole':>16}"
            if case.kind == "compressed"
            else f"{'x best PyTorch':>16}{'x SDPA':>8}"
        )
    print(heading)
    for figure in figures:
        times = f"{figure.seconds_min * 1e3:>10,.2f}{figure.seconds_median * 1e3:>11,.2f}"
        line = f"{figure.label:<52}{times}{figure.rate:>10,.1f}"
        if case.kind != "limits":
            limit = limits["product float32" if case.kind == "prefill" else "read"]
            line += f"{figure.rate / limit:>10.0%}"
        ratios = _ratios(figure, figures)
        if "times_whole" in ratios:
            line += f"{ratios['times_whole']:>16.2f}"
        elif ratios:
            line += f"{ratios['times_best_pytorch']:>16.2f}{ratios['times_sdpa']:>8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
