"""Runs the shipped model, and times whole models with random weights."""

import dataclasses
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import Sizes
from lsjax.config import LayerKind, ModelConfig
from lsjax.distributed.sharding import make_mesh
from lsjax.families import read_config
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import EngineConfig, round_up
from lsjax.nn.parameters import random_parameters
from lsjax.runtime.compilation import CLOCK, enable_persistent_cache
from lsjax.runtime.memory import peak_memory_bytes

ROOT = pathlib.Path(__file__).parents[3]
_YARN = '{"rope_type": "yarn", "factor": 4.5, "original_max_position_embeddings": 512}'
_MILLION = 1_048_576


def demo(sizes: Sizes, record: Recorder) -> None:
    """Checks that the shipped model reads a pass key in bfloat16 with an int8 cache."""
    flags = {
        "input_texts": ROOT / "examples" / "passkey_2048.txt",
        "rope_scaling": _YARN,
        "max_output_length": 16,
        "kv_cache_dtype": "int8",
        "dtype": "bfloat16",
    }
    program = [sys.executable, str(ROOT / "scripts" / "run_pa.py")]
    command = program + [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    ok = done.returncode == 0 and " 65415\n" in done.stdout
    record(check="the shipped model reads its pass key", ok=ok, said=done.stdout[-700:],
           errors="" if ok else done.stderr[-700:])  # fmt: skip


def model_7b(sizes: Sizes, record: Recorder) -> None:
    """Times Qwen2.5-7B on a whole prompt."""
    _whole_prompt("qwen2.5-7b.json", sizes, record)


def model_05b(sizes: Sizes, record: Recorder) -> None:
    """Times Qwen2.5-0.5B on a whole prompt; on a CPU, a narrow model with one layer."""
    _whole_prompt("qwen2.5-0.5b.json", sizes, record)


def glm_1m(sizes: Sizes, record: Recorder) -> None:
    """Times GLM-4-9B at the end of 1,048,576 tokens, with four layers and then with all."""
    config = read_config(ROOT / "examples" / "glm-4-9b-chat-1m.json")
    few = dataclasses.replace(config, layers=config.layers[:4])
    sizes = dataclasses.replace(sizes, prompt=_MILLION, output=32)
    for model in (few, config):
        _time_model(model, "glm-4-9b-chat-1m", sizes, record, first_chunk=_MILLION - sizes.chunk)


def _whole_prompt(name: str, sizes: Sizes, record: Recorder) -> None:
    config = read_config(ROOT / "examples" / name)
    if jax.default_backend() == "cpu":
        narrow = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512}
        config = dataclasses.replace(config, layers=(LayerKind(),), **narrow)
    _time_model(config, name.removesuffix(".json"), sizes, record)


def _time_model(
    config: ModelConfig, name: str, sizes: Sizes, record: Recorder, first_chunk: int = 0
) -> None:
    """Times prefill of a prompt, or only of its end from `first_chunk` on, and then decode.

    Prefill is recorded before decode starts, so that stopping the phase in decode does not lose it.
    """
    enable_persistent_cache()
    mesh, prompt, chunk = make_mesh(""), round_up(sizes.prompt, sizes.chunk), sizes.chunk
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    settings = EngineConfig(mesh=mesh, dtype=dtype, kv_cache_dtype="int8", prefill_chunk=chunk)
    engine = Engine(config, settings)
    start = time.perf_counter()
    params = jax.block_until_ready(random_parameters(config, mesh, dtype))
    made = time.perf_counter() - start
    spec = settings.cache_spec(1, prompt, sizes.output + settings.segment)
    cache, tables = engine.new_cache(spec), engine.tables([spec.capacity])
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt)).astype(np.int32)
    lengths, last = np.array([prompt], np.int32), None

    def run(at: int) -> float:
        nonlocal cache, last
        start = time.perf_counter()
        tokens = ids[:, at : at + chunk]
        cache, last = engine.prefill(params, tables, cache, tokens, at, lengths, last)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    first = run(first_chunk)
    # For a prompt's end, the same chunk is run again, which costs the same.
    chunks = [first_chunk] * 3 if first_chunk else range(chunk, prompt, chunk)
    seconds = [run(at) for at in chunks]
    row = {"model": name, "layers": config.num_layers, "prompt": prompt}
    record(
        what="prefill of a model",
        **row,
        weights_seconds=round(made, 1),
        first_chunk_seconds=round(first, 2),
        last_chunk_seconds=round(seconds[-1], 3),
        prefill_tokens_per_second=round(len(seconds) * chunk / sum(seconds), 1),
        peak_bytes=peak_memory_bytes(),
        compile_seconds=round(CLOCK.seconds, 1),
    )
    state = engine.first(params, cache, last, lengths, lengths + spec.capacity)
    del cache
    state, (tokens, *_) = engine.decode(params, tables, state)
    np.asarray(tokens)
    start, decoded = time.perf_counter(), 0
    while decoded < sizes.output:
        state, (tokens, *_) = engine.decode(params, tables, state)
        decoded += np.asarray(tokens).size
    record(
        what="decode of a model",
        **row,
        decode_tokens_per_second=round(decoded / (time.perf_counter() - start), 2),
        peak_bytes=peak_memory_bytes(),
        compile_seconds=round(CLOCK.seconds, 1),
    )
