"""Measures ring attention of one layer, by device count, length and sequence layout.

    python scripts/bench_ring.py --devices 1,2,4,8 --lengths 65536 --plot ring.png

Random queries, keys and values go chunk by chunk through the attention that models run, cache
included. Besides the time, the table shows the work of the busiest device relative to the mean
(counted in pairs of a query and a key that it sees), the bytes that each device sends, its share of
the cache and its temporaries, as compiled. Sampled rows are compared with float64, and so is plain
float32 attention.

On a CPU the devices share its cores: the time shows what splitting the sequence costs, not what it
gains.
"""

import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from lsjax.attention import ring
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cache import BLOCK, FloatBlock, FloatTail, FullCache, LayerCache, update_and_attend
from lsjax.cli.flags import parse_lengths
from lsjax.cli.program import make_cpu_devices, run_program
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE, Zigzag, zigzag_of
from lsjax.distributed.sharding import (
    CHUNK_QUERIES_SPEC,
    CHUNK_SPEC,
    TOKENS_SPEC,
    make_mesh,
    put_on_mesh,
    sharding,
)
from lsjax.evals.plots import plot_ring
from lsjax.runtime.compilation import compiler_options
from lsjax.runtime.errors import UserError
from lsjax.runtime.memory import human_bytes
from lsjax.runtime.text_files import check_writable, write_atomically

FLAGS = flags.FLAGS

flags.DEFINE_list(
    "devices", ["1", "2", "4", "8"], "Numbers of devices along the context axis to measure."
)
flags.DEFINE_list("lengths", ["65536"], "Sequence lengths in tokens to measure.")
flags.DEFINE_list(
    "layouts",
    ["zigzag", "contiguous"],
    "Ways to split the sequence over the devices: zigzag, contiguous.",
)
flags.DEFINE_enum("cache_dtype", "float32", ["float32", "int8"], "Dtype of the KV cache.")
flags.DEFINE_integer("chunk", None, "Tokens per prefill step. Default: the whole length.")
flags.DEFINE_integer("heads", 4, "Number of query heads.", lower_bound=1)
flags.DEFINE_integer("kv_heads", 2, "Number of KV heads.", lower_bound=1)
flags.DEFINE_integer("head_dim", 64, "Channels per head.", lower_bound=1)
flags.DEFINE_integer(
    "sampled_rows", 1000, "Number of query rows to compare with float64; 0 for none.", lower_bound=0
)
flags.DEFINE_string("output_json", None, "File to write the figures to, as JSON.")
flags.DEFINE_string("plot", None, "PNG file to plot the figures in.")


@dataclasses.dataclass(frozen=True)
class Contiguous(Zigzag):
    """A layout to compare zigzag with: each device holds one contiguous chunk of each block."""

    @property
    def piece_length(self) -> int:
        return self.block_length // self.devices

    def num_local_slots_before(self, device, position):
        block, rest = position // self.block_length, position % self.block_length
        own = jnp.clip(rest - device * self.piece_length, 0, self.piece_length)
        return block * self.piece_length + own

    def position(self, device, slot):
        block, rest = slot // self.piece_length, slot % self.piece_length
        return block * self.block_length + device * self.piece_length + rest

    def permutation(self, length):
        pieces = np.arange(length).reshape(-1, self.devices, self.piece_length)
        return pieces.swapaxes(0, 1).ravel()


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of one run; bytes are per device."""

    layout: str
    devices: int
    length: int
    seconds: float
    tokens_per_second: float
    busiest_over_mean: float
    bytes_sent: int
    cache_bytes: int
    temporary_bytes: int
    error: float | None
    plain_error: float | None


def main(_) -> None:
    counts, lengths = parse_lengths(FLAGS.devices, "devices"), parse_lengths(FLAGS.lengths)
    unknown = set(FLAGS.layouts) - {"zigzag", "contiguous"}
    if unknown:
        raise UserError(f"layouts are zigzag and contiguous, not {', '.join(unknown)}.")
    for file in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(file)
    # A CPU is split into as many devices as needed; other platforms keep those they have.
    make_cpu_devices(max(counts))
    figures = []
    print(
        "layout      devices     length   seconds   tokens/s  busiest   sent      cache  "
        "temporaries     error  plain error"
    )
    for length in lengths:
        for devices in counts:
            for layout in FLAGS.layouts if devices > 1 else ["zigzag"]:
                figures.append(_measure(layout, devices, length))
                _print(figures[-1])
    if FLAGS.output_json:
        rows = [dataclasses.asdict(f) for f in figures]
        write_atomically(FLAGS.output_json, json.dumps(rows, indent=1) + "\n")
    if FLAGS.plot:
        plot_ring([dataclasses.asdict(f) for f in figures], FLAGS.plot)


def _print(f: Figures) -> None:
    errors = "" if f.error is None else f"{f.error:10.2e}{f.plain_error:13.2e}"
    print(
        f"{f.layout:12}{f.devices:7}{f.length:11,}{f.seconds:10.2f}{f.tokens_per_second:11,.0f}"
        f"{f.busiest_over_mean:9.3f}{human_bytes(f.bytes_sent):>11}{human_bytes(f.cache_bytes):>11}"
        f"{human_bytes(f.temporary_bytes):>11}{errors}",
        flush=True,
    )


def _measure(layout: str, devices: int, length: int) -> Figures:
    chunk = FLAGS.chunk or length
    if length % (CAPACITY_MULTIPLE * devices) or length % chunk or chunk % (2 * devices):
        raise UserError(
            f"length {length:,} must be a multiple of {CAPACITY_MULTIPLE * devices} and of the "
            f"chunk, and the chunk of {2 * devices}, so that {devices} devices share it evenly."
        )
    mesh = make_mesh({"context": devices})
    zigzag = zigzag_of(chunk, devices) if layout == "zigzag" else Contiguous(devices, chunk)
    return _run(layout, zigzag, mesh, length, chunk)


def _run(layout: str, zigzag: Zigzag, mesh: Mesh, length: int, chunk: int) -> Figures:
    q, k, v = _inputs(length)
    cache = _empty_cache(mesh, zigzag, length)
    order = zigzag.permutation(chunk)
    alone = zigzag.devices == 1
    queries, tokens = (
        sharding(mesh, spec)
        for spec in ((TOKENS_SPEC, TOKENS_SPEC) if alone else (CHUNK_QUERIES_SPEC, CHUNK_SPEC))
    )

    def chunk_at(start: int) -> tuple:
        at = start + order
        return *(put_on_mesh(x[:, at], queries) for x in (q, k, v)), put_on_mesh(at[None], tokens)

    step = jax.jit(
        functools.partial(update_and_attend, mesh, decode=False),
        donate_argnums=5,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    lengths = put_on_mesh(np.array([length]), sharding(mesh, TOKENS_SPEC))
    program = step.lower(*chunk_at(0), lengths, cache).compile()
    rows = np.random.default_rng(1).permutation(length)[: FLAGS.sampled_rows]
    seconds, sampled = 0.0, {}
    for start in tqdm(range(0, length, chunk), leave=False, disable=length == chunk):
        given = chunk_at(start)
        began = time.perf_counter()
        out, cache = program(*given, lengths, cache)
        jax.block_until_ready(out)
        seconds += time.perf_counter() - began
        here = np.flatnonzero(np.isin(start + order, rows))
        sampled |= dict(zip((start + order[here]).tolist(), np.asarray(out[0, here]), strict=True))
    full = cache.inner if isinstance(cache, FloatTail) else cache
    stored = sum(x.nbytes for x in jax.tree.leaves(full))
    error = plain_error = None
    if len(rows):
        error, plain_error = _errors(sampled, q[0], k[0], v[0])
    return Figures(
        layout=layout,
        devices=zigzag.devices,
        length=length,
        seconds=seconds,
        tokens_per_second=length / seconds,
        busiest_over_mean=_busiest_over_mean(zigzag, length),
        bytes_sent=_bytes_sent(stored, zigzag.devices, length, chunk),
        cache_bytes=stored // zigzag.devices,
        temporary_bytes=program.memory_analysis().temp_size_in_bytes,
        error=error,
        plain_error=plain_error,
    )


def _inputs(length: int) -> list[np.ndarray]:
    """Returns q, k, v [1, length, heads, head_dim] float32, with somewhat peaked attention."""
    rng = np.random.default_rng(0)
    heads = (FLAGS.heads, FLAGS.kv_heads, FLAGS.kv_heads)
    return [1.5 * rng.standard_normal((1, length, n, FLAGS.head_dim), "f4") for n in heads]


def _empty_cache(mesh: Mesh, zigzag: Zigzag, length: int) -> LayerCache:
    def empty() -> LayerCache:
        store = empty_kv_array((1, FLAGS.kv_heads, length, FLAGS.head_dim), FLAGS.cache_dtype)
        cache = FullCache(store, store, zigzag)
        if FLAGS.cache_dtype == "float32":
            return cache
        zeros = jnp.zeros((1, FLAGS.kv_heads, BLOCK, FLAGS.head_dim))
        return FloatTail(cache, FloatBlock(zeros, zeros))

    specs = jax.eval_shape(empty).partition_specs()
    return jax.jit(empty, out_shardings=jax.tree.map(lambda s: sharding(mesh, s), specs))()


def _busiest_over_mean(zigzag: Zigzag, length: int) -> float:
    slots = np.arange(length // zigzag.devices)
    pairs = [
        float(np.sum(np.asarray(zigzag.position(d, slots), np.int64) + 1))
        for d in range(zigzag.devices)
    ]
    return max(pairs) / (sum(pairs) / len(pairs))


def _bytes_sent(stored: int, devices: int, length: int, chunk: int) -> int:
    """Returns bytes per device: whole blocks of filled slots, once around the ring per chunk."""
    of_slot = stored / length
    size = ring.block_size(length // devices)
    blocks = sum(-(-(end // devices) // size) for end in range(chunk, length + 1, chunk))
    return int((devices - 1) * blocks * size * of_slot)


def _errors(sampled: dict[int, np.ndarray], q, k, v) -> tuple[float, float]:
    """Returns the largest errors from float64: the output's, and plain float32 attention's."""
    group = FLAGS.heads // FLAGS.kv_heads
    worst = [0.0, 0.0]
    for head in range(FLAGS.kv_heads):
        keys, values = k[:, head], v[:, head]
        keys64, values64 = keys.astype("f8"), values.astype("f8")
        for at, out in sampled.items():
            rows = q[at, head * group : (head + 1) * group]
            truth = _plain(rows.astype("f8"), keys64[: at + 1], values64[: at + 1])
            plain = _plain(rows, keys[: at + 1], values[: at + 1])
            given = out[head * group : (head + 1) * group]
            for i, x in enumerate((given, plain)):
                worst[i] = max(worst[i], float(np.abs(x - truth).max()))
    return worst[0], worst[1]


def _plain(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = q @ k.T * q.dtype.type(FLAGS.head_dim**-0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ v / weights.sum(axis=-1, keepdims=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
