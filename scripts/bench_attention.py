"""Times attention alone: lsjax, PyTorch and jax.nn, compared with the machine's limits.

    python scripts/bench_attention.py --torch_python /path/to/python/with/torch

Decode is one token over a cache of N keys. Prefill is causal attention of N tokens to themselves,
and its FLOPs count only the causal half. The machine's limits (matrix products, reading and copying
memory) are measured in the same run, by JAX and by PyTorch. lsjax splits the KV heads over
--devices, as a mesh's model axis does; set JAX_NUM_CPU_DEVICES to split a CPU into devices, such as
one per core. A compressed cache is compared with a full one over several layers, since few heads
keep everything; this runs on one device. On an accelerator calls of decode cycle through several
caches, so that none is still in the processor's own cache, and prefill is compared with bfloat16
products. The formulations are measured in turn, round after round,
and one side idles while the other runs. Ratios compare the fastest rounds.
"""

import dataclasses
import functools
import itertools
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
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.dispatch import attend
from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.attention.partial import Partial, merge
from lsjax.cache import (
    CACHE_DTYPES,
    FullCache,
    HeadGroups,
    HeadSplit,
    WindowCache,
    WindowSpec,
    compress,
)
from lsjax.cache.compensation_token import attend_to_compensation_token
from lsjax.cli.flags import parse_lengths
from lsjax.cli.program import run_program
from lsjax.compression import RazorConfig
from lsjax.distributed.sharding import make_mesh
from lsjax.evals.plots import plot_times
from lsjax.runtime.compilation import compiler_options
from lsjax.runtime.errors import UserError
from lsjax.runtime.precision import einsum
from lsjax.runtime.text_files import check_writable, write_atomically

FLAGS = flags.FLAGS

flags.DEFINE_list(
    "decode_lengths", ["131072"], "Cache lengths in tokens to time decode with; may be empty."
)
flags.DEFINE_list(
    "prefill_lengths",
    ["8192", "32768"],
    "Prompt lengths in tokens to time prefill with; may be empty.",
)
flags.DEFINE_integer("heads", 14, "Number of query heads.", lower_bound=1)
flags.DEFINE_integer("kv_heads", 2, "Number of KV heads.", lower_bound=1)
flags.DEFINE_integer("head_dim", 64, "Channels per head.", lower_bound=1)
flags.DEFINE_integer(
    "layers",
    10,
    "Number of layers to compare a compressed cache with a full one over.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "devices", 1, "Number of devices to split the KV heads of lsjax over.", lower_bound=1
)
flags.DEFINE_list(
    "cache_dtypes",
    ["float32", "int8"],
    f"KV cache dtypes to measure, out of {', '.join(CACHE_DTYPES)}.",
)
flags.DEFINE_integer(
    "product_size",
    None,
    "Rows of the square matrices whose product is timed for the machine's FLOP limit: 2,048 on a "
    "CPU and 8,192 elsewhere, if not given.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "array_size",
    2**26,
    "Number of float32 values that are read and copied for the machine's memory limits.",
    lower_bound=1,
)
flags.DEFINE_integer("repeats", 5, "Number of measurements per formulation.", lower_bound=1)
flags.DEFINE_string(
    "torch_python", None, "Python executable that has PyTorch, to measure PyTorch as well."
)
flags.DEFINE_string("output_json", None, "File to write the figures to, as JSON.")
flags.DEFINE_string("plot", None, "PNG file to plot the times in.")

# Length of a measurement, which is filled with calls so that starting them does not count.
_MEASUREMENT_SECONDS = 0.02
# Bytes of caches that calls of decode cycle through: several times a GPU's L2 cache of 50 MB.
_ROTATED_BYTES = 2**28
# OpenMP threads spin for up to 200 ms after their last work.
_SECONDS_TO_IDLE = 0.25
# jax.nn.dot_product_attention holds all scores at once, some of them several times.
_LARGEST_SCORES_BYTES = 2**31

Call = Callable[[], Any]
Formulations = dict[str, tuple[Call, float]]  # name -> (call, FLOPs or bytes per call)


@dataclasses.dataclass(frozen=True)
class Case:
    """A case to measure: kind is limits, decode, compressed or prefill; length is in tokens."""

    kind: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    product_size: int
    array_size: int
    rotated_bytes: int

    @property
    def flops(self) -> float:
        """FLOPs of both matrix products of a prefill, counting only the causal half."""
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
    """Measurement of a formulation: seconds per call, and 1e9 FLOPs or bytes per second.

    The rate is that of the fastest round.
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
    """Returns decode of one token over a full cache, and the cache's bytes as its work."""
    call, cache = _ours(case, dtype, jnp.full((1, 1), case.length - 1))
    work = sum(x.nbytes for x in jax.tree.leaves(cache))
    copies = [jax.tree.map(jnp.copy, cache) for _ in range(case.rotated_bytes // work)]
    turns = itertools.cycle([cache, *copies])
    return (lambda: call(next(turns))), work


def our_prefill(case: Case, dtype: str) -> tuple[Call, float]:
    """Returns causal attention of a whole prompt in one call, and its FLOPs as its work."""
    call, cache = _ours(case, dtype, jnp.arange(case.length)[None])
    return (lambda: call(cache)), case.flops


def _ours(
    case: Case, dtype: str, at: jax.Array
) -> tuple[Callable[[tuple[KVArray, KVArray]], Partial], tuple[KVArray, KVArray]]:
    """Returns attention of tokens at positions `at` [1, length] to a full cache, and a cache."""
    platform = jax.devices()[0].platform
    mesh, heads = _mesh(), P(None, "model")

    @functools.partial(jax.jit, compiler_options=compiler_options(platform))
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False)
    def run(q: jax.Array, k: KVArray, v: KVArray) -> Partial:
        blocks = QueryBlocks(at.shape[1], causal=True)
        return attend(platform, q, k, v, KeyRange(None, at + 1, at), None, blocks)

    ours = _our_queries(case, at.shape[1], dtype), *_our_cache(case, dtype)
    q, *cache = jax.device_put(ours, NamedSharding(mesh, heads))
    return (lambda cache: run(q, *cache)), tuple(cache)


def _mesh() -> Mesh:
    return make_mesh({"model": FLAGS.devices})


def _ours_compressed(case: Case, dtype: str) -> Formulations:
    """Returns decode of one token in several layers, over full and default compressed caches."""
    platform = jax.devices()[0].platform
    heads = FLAGS.layers * case.kv_heads
    kept = math.ceil(RazorConfig.induction * heads) + math.ceil(RazorConfig.echo * heads)
    each = [kept // FLAGS.layers + (i < kept % FLAGS.layers) for i in range(FLAGS.layers)]
    window = WindowSpec(
        RazorConfig.sinks,
        max(RazorConfig.window, math.ceil(RazorConfig.window_share * case.length)),
    )
    q, end = _our_queries(case, 1, dtype), jnp.full((1, 1), case.length)
    whole = FullCache(*_our_cache(case, dtype))

    def attention(q: jax.Array, k: KVArray, v: KVArray, end: jax.Array) -> Partial:
        return attend(platform, q, k, v, KeyRange(None, end, end - 1), None)

    def of_group(q: jax.Array, cache: FullCache | WindowCache) -> Partial:
        if isinstance(cache, FullCache):
            return attention(q, cache.k, cache.v, end)
        near = attention(q, cache.k, cache.v, jnp.minimum(end, window.slots))
        return merge(near, attend_to_compensation_token(q, cache.compensation_token))

    def one(q: jax.Array, cache: HeadGroups) -> Partial:
        bounds = np.cumsum([0, *cache.sizes])
        parts = [
            of_group(q[:, first:last], group)
            for group, first, last in zip(cache.groups, bounds, bounds[1:], strict=False)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)

    @functools.partial(jax.jit, compiler_options=compiler_options(platform))
    def run(q: jax.Array, layers: list[HeadGroups]) -> jax.Array:
        for layer in layers:
            q += one(q, layer).values.astype(q.dtype)
        return q

    @functools.partial(jax.jit, static_argnums=1)
    def small(cache: FullCache, kept: int) -> HeadGroups:
        windows = ((case.kv_heads - kept, window),) if kept < case.kv_heads else ()
        return compress(cache, end[0], HeadSplit(kept, windows), shards=1)

    found = {}
    caches = {
        "": [
            HeadGroups((jax.tree.map(jnp.copy, whole),), (case.kv_heads,))
            for _ in range(FLAGS.layers)
        ],
        " compressed": [small(whole, heads) for heads in each],
    }
    for name, layers in caches.items():
        work = sum(x.nbytes for x in jax.tree.leaves(layers))
        found[f"lsjax {dtype}{name}"] = (lambda layers=layers: run(q, layers)), work
    return found


def _our_queries(case: Case, length: int, dtype: str) -> jax.Array:
    shape = (1, case.kv_heads, case.heads // case.kv_heads, length, case.head_dim)
    # The dtype that a model would have: bfloat16 for a bfloat16 cache, and for a quantized one on
    # accelerators.
    wide = dtype == "float32" or (dtype != "bfloat16" and jax.default_backend() == "cpu")
    q = _random(*shape) * case.head_dim**-0.5
    return q.astype(jnp.float32 if wide else jnp.bfloat16)


def _our_cache(case: Case, dtype: str) -> tuple[KVArray, KVArray]:
    shape = (1, case.kv_heads, case.length, case.head_dim)
    encode = jax.jit(lambda x: empty_kv_array(shape, dtype, jax.default_backend()).quantize(x))
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
    # Copies into existing memory: the pages of a new array would first have to be mapped.
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
    """Measures formulations in this process, with JAX."""

    def prepare(self, case: Case) -> dict[str, float]:
        """Makes a case's formulations; returns the work of each, by name."""
        self._calls: dict[str, Call] = {}  # frees the last case's arrays first
        found = _jax_formulations(case)
        self._calls = {name: call for name, (call, _) in found.items()}
        return {name: work for name, (_, work) in found.items()}

    def run(self, name: str, calls: int) -> float:
        """Returns the seconds that `calls` calls take."""
        start = time.perf_counter()
        for _ in range(calls):
            out = self._calls[name]()
        jax.block_until_ready(out)
        return time.perf_counter() - start


class TorchSide:
    """Measures the formulations of scripts/torch_attention.py, in a separate process."""

    def __init__(self, python: str):
        program = pathlib.Path(__file__).with_name("torch_attention.py")
        try:
            self._process = subprocess.Popen(
                [python, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(f"--torch_python does not start: {error}") from None

    def prepare(self, case: Case) -> dict[str, float]:
        """Makes a case's formulations; returns the work of each, by name."""
        return self._ask(prepare=dataclasses.asdict(case) | {"flops": case.flops})

    def run(self, name: str, calls: int) -> float:
        """Returns the seconds that `calls` calls take."""
        return self._ask(run=name, calls=calls)

    def _ask(self, **request: Any) -> Any:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UserError("--torch_python stopped; its own message is above.") from None

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
    _mesh()  # raises for too many devices before anything is measured
    if FLAGS.kv_heads % FLAGS.devices:
        raise UserError(f"--devices={FLAGS.devices} does not divide --kv_heads={FLAGS.kv_heads}.")
    if not (FLAGS.decode_lengths or FLAGS.prefill_lengths):
        raise UserError("--decode_lengths and --prefill_lengths are both empty.")
    on_cpu = jax.default_backend() == "cpu"
    product_size = FLAGS.product_size or (2048 if on_cpu else 8192)
    rotated_bytes = 0 if on_cpu else _ROTATED_BYTES
    heads = FLAGS.heads, FLAGS.kv_heads, FLAGS.head_dim
    shape = (*heads, product_size, FLAGS.array_size, rotated_bytes)
    yield Case("limits", 0, *shape)
    for kind, flag in (
        ("decode", "decode_lengths"),
        ("compressed", "decode_lengths"),
        ("prefill", "prefill_lengths"),
    ):
        if words := FLAGS[flag].value:
            for length in parse_lengths(words, flag):
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
    for _ in range(FLAGS.repeats):
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
    """Returns how many times faster a figure is than PyTorch's best and than its SDPA.

    For a compressed cache, returns how many times faster it is than the full one.
    """
    seconds = {f.name: f.seconds_min for f in figures}
    if figure.name.endswith(" compressed"):
        return {
            "times_whole": seconds[figure.name.removesuffix(" compressed")] / figure.seconds_min
        }
    theirs = {f.name: f.seconds_min for f in figures if f.side == "PyTorch"}
    sdpa = f"sdpa {_product_dtype()}"  # PyTorch's own call for grouped queries
    if sdpa not in theirs:
        return {}
    return {
        "times_best_pytorch": min(theirs.values()) / figure.seconds_min,
        "times_sdpa": theirs[sdpa] / figure.seconds_min,
    }


def _product_dtype() -> str:
    """Returns the dtype whose products and PyTorch calls are compared with."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


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
            product = f"product {_product_dtype()}"
            limit = limits[product if case.kind == "prefill" else "read"]
            line += f"{figure.rate / limit:>10.0%}"
        ratios = _ratios(figure, figures)
        if "times_whole" in ratios:
            line += f"{ratios['times_whole']:>16.2f}"
        elif ratios:
            line += f"{ratios['times_best_pytorch']:>16.2f}{ratios['times_sdpa']:>8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
