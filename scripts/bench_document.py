"""Measures documents: decode of several questions over one document, opening, the first token.

    python scripts/bench_document.py --config examples/qwen2.5-0.5b.json --document_length 131072 \
        --kv_cache_dtype int8 --questions 16 --layers 4

The document's keys and values are random, so that it need not be read. Rows that share it are
compared with rows that each hold a copy, and with a single row: all layers together, and attention
of one layer by itself. All are timed in turn, and the median of the ratios is printed. A saved
document is opened after it has been dropped from the page cache, beside a plain read of its files.
With --read_length a document of so many tokens is read, saved and opened instead.
"""

import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lsjax.cache import DocumentCache, attach, detach, update_and_attend, without_tails
from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.cli.program import run_program
from lsjax.documents import Document
from lsjax.inference.options import resolve_options
from lsjax.inference.steps import DecodeState
from lsjax.language_model import LanguageModel, load_from_options
from lsjax.planning.speed import measured_rates

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "config", None, "config.json of a model shape; its weights are random.", required=True
)
flags.DEFINE_integer("document_length", 131072, "Tokens of the document.", lower_bound=1024)
flags.DEFINE_integer("questions", 16, "Questions answered together.", lower_bound=2)
flags.DEFINE_integer("question_length", 37, "Tokens of a question.", lower_bound=1)
flags.DEFINE_string("kv_cache_dtype", "int8", "Dtype of the KV cache.")
flags.DEFINE_integer(
    "layers",
    None,
    "Layers of the model, for machines whose memory does not hold a copy for each row. Default: "
    "config.json's.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "read_length",
    None,
    "Tokens of a document that is read and saved, and opened; nothing else is then measured.",
    lower_bound=1024,
)
flags.DEFINE_integer("repeats", 5, "Number of times that each side is measured.", lower_bound=1)
_STEPS = 8  # decode steps per measurement


def main(_: list[str]) -> None:
    rates = measured_rates(1)
    print(
        f"this machine: {rates.flops / 1e9:,.0f} GFLOP/s of float32 products, "
        f"{rates.bandwidth / 1e9:,.1f} GB/s copied"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(FLAGS.config, folder)
        options = resolve_options(folder, kv_cache_dtype=FLAGS.kv_cache_dtype)
        if FLAGS.layers:
            layers = options.config.layers[: FLAGS.layers]
            config = dataclasses.replace(options.config, layers=layers)
            options = dataclasses.replace(options, config=config)
        lm = load_from_options(dataclasses.replace(options, segment=_STEPS))
        saved = os.path.join(folder, "document")
        if FLAGS.read_length:
            _read(lm, saved)
            _open(lm, saved)
            return
        document = _random_document(lm)
        _compare("attention of one layer", _attention(lm, document))
        _compare("decode of all layers", _decode(lm, document))
        began = time.perf_counter()
        document.save(saved)
        _tell("saved", saved, began)
        _ask(lm, _open(lm, saved))


def _random_document(lm: LanguageModel) -> Document:
    """Returns a document whose keys and values are random."""
    length = FLAGS.document_length // 1024 * 1024
    ids = _random_ids(lm, length)
    read = lm.read(ids[:1024], allow_untrained_length=True)
    empty = without_tails(lm.engine.new_cache(lm.options.cache_spec(1, length, 0)))
    layers = tuple(map(_filled, empty))  # one by one: random numbers take memory
    cache = DocumentCache(layers, np.int32(length), read.cache.rest)
    return dataclasses.replace(read, token_ids=ids, cache=cache)


def _random_ids(lm: LanguageModel, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(0).integers(0, lm.config.vocab_size, length).tolist())


@functools.partial(jax.jit, donate_argnums=0)
def _filled(tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def random(key, x):
        if x.dtype == jnp.int8:
            return jax.random.randint(key, x.shape, -127, 128, jnp.int8)
        if jnp.issubdtype(x.dtype, jnp.integer):  # bits of bfloat16, or int4 pairs
            one = jnp.uint16(0x3C00) if x.dtype == jnp.uint16 else jnp.uint8(0)
            return jax.random.bits(key, x.shape, x.dtype) % 256 + one
        return jax.random.normal(key, x.shape, x.dtype)

    return jax.tree.unflatten(structure, [random(*args) for args in zip(keys, leaves, strict=True)])


def _sides(lm: LanguageModel, document: Document, layers: int):
    """Yields the name, rows, own cache and document of each side."""
    length, rows = len(document), FLAGS.questions

    def of(batch, capacity):
        return lm.engine.new_cache(lm.options.cache_spec(batch, capacity, 2 * _STEPS))[:layers]

    shared = DocumentCache(
        document.cache.layers[:layers], document.cache.length, document.cache.rest[:layers]
    )
    yield "shared", rows, of(rows, 64), shared
    yield "one row", 1, of(1, 64), shared
    yield "copies", rows, of(rows, length), None


def _attention(lm: LanguageModel, document: Document):
    """Returns a function for each side that runs _STEPS steps of one layer's attention."""
    c, length = lm.config, len(document)
    found = {}
    for name, rows, cache, shared in _sides(lm, document, 1):

        @functools.partial(jax.jit, donate_argnums=0)
        def run(cache, shared, q, k, v):
            def step(i, carry):
                cache, out = carry
                positions = jnp.full((q.shape[0], 1), length + i)
                (layer,) = attach(cache, shared)
                out, layer = update_and_attend(
                    lm.options.mesh, q + 0 * out, k, v, positions, None, layer, True
                )
                return detach((layer,)), out

            return jax.lax.fori_loop(0, _STEPS, step, (cache, q))

        key = jax.random.key(1)
        q, k, v = (
            jax.random.normal(key, (rows, 1, heads, c.head_dim), lm.options.dtype)
            for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        )
        found[name] = _repeated(run, cache, (shared, q, k, v))
    return found


def _decode(lm: LanguageModel, document: Document):
    """Returns a function for each side that decodes one segment of all layers."""
    length, found = len(document), {}
    tables = lm.engine.tables([length])
    for name, rows, cache, shared in _sides(lm, document, lm.config.num_layers):

        def run(cache, shared, rows=rows):
            at = jnp.full(rows, length, jnp.int32)
            state = DecodeState(cache, at * 0, at, at + 10**6, jnp.int32(1))
            state, found = lm.engine.decode(lm.params, tables, state, document=shared)
            return state.cache, found[0]

        found[name] = _repeated(run, cache, (shared,))
    return found


def _repeated(run, cache, arguments):
    """Returns a function that runs and waits; the cache is passed on from call to call."""
    held = [cache]

    def call() -> None:
        held[0], out = run(held[0], *arguments)
        jax.block_until_ready(out)

    return call


def _compare(title: str, sides) -> None:
    times = {name: [] for name in sides}
    for i in range(FLAGS.repeats + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if i:  # the first call compiles
                times[name].append((time.perf_counter() - began) / _STEPS)
    print(title)
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["shared"], seconds, strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"  {name:<10}{milliseconds:>10.1f} ms a step, shared / this {ratio:.2f}")


def _read(lm: LanguageModel, folder: str) -> None:
    ids = _random_ids(lm, FLAGS.read_length)
    lm.read(ids[:1024], allow_untrained_length=True)  # compiles
    began = time.perf_counter()
    lm.read(ids, save_to=folder, allow_untrained_length=True)
    _tell(f"{FLAGS.read_length:,} tokens read and saved", folder, began)


def _tell(what: str, folder: str, began: float) -> None:
    seconds, size = time.perf_counter() - began, sum(map(os.path.getsize, _files(folder)))
    print(f"{what}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


def _open(lm: LanguageModel, folder: str) -> Document:
    """Opens a document three times, each beside a plain read of its files."""
    files = _files(folder)
    size, opened = sum(map(os.path.getsize, files)), None
    for _ in range(3):
        _drop(files)
        began = time.perf_counter()
        for name in files:
            with open(name, "rb", buffering=0) as file:
                while file.read(2**24):
                    pass
        plain = time.perf_counter() - began
        _drop(files)
        opened = None  # its memory is free before it is opened again
        began = time.perf_counter()
        opened = lm.open_document(folder)
        jax.block_until_ready(opened.cache.layers)
        seconds = time.perf_counter() - began
        print(
            f"opened in {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s; files read in "
            f"{plain:.2f} s, {size / plain / 1e9:.2f} GB/s; ratio of the rates "
            f"{plain / seconds:.2f}"
        )
    return opened


def _ask(lm: LanguageModel, document: Document) -> None:
    question = list(range(1, FLAGS.question_length + 1))
    for _ in range(2):
        (answer,) = lm.generate(question, 2, document=document, allow_untrained_length=True)
        stats = answer.stats
        print(
            f"first token {stats.prefill_seconds:.2f} s after a question of "
            f"{FLAGS.question_length} tokens, compiling apart"
        )


def _files(folder: str) -> list[str]:
    return [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]


def _drop(files: list[str]) -> None:
    """Drops files from the page cache, as far as the system allows."""
    for name in files:
        with open(name, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(run_program(main))
