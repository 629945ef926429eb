"""Runs a model's programs and prints what they needed: resident growth, and the compiler's word.

python resident.py <config.json> <layers> <input tokens> <cache dtype> <chunk>
"""

import ctypes
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from lsjax.config import LayerKind
from lsjax.distributed.sharding import abstract_mesh, make_mesh, parse_mesh
from lsjax.families import read_config
from lsjax.inference.engine import Engine
from lsjax.nn.parameters import random_parameters
from lsjax.planning import Deployment, find_target
from lsjax.planning.arithmetic import needs_of
from lsjax.planning.compiled import compile_for


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def let_go() -> None:
    """Gives back what the process no longer holds; XLA frees a little later."""
    for _ in range(3):
        gc.collect()
        time.sleep(0.5)
        ctypes.CDLL(None).malloc_trim(0)


def main(path: str, layers: str, length: str, kv: str, chunk: str) -> None:
    config = dataclasses.replace(read_config(path), layers=(LayerKind(),) * int(layers))
    mesh = make_mesh(parse_mesh(""))
    deployment = Deployment(
        mesh=abstract_mesh((1, 1, 1)),
        dtype="float32",
        kv_cache_dtype=kv,
        prefill_chunk=int(chunk),
        batch=1,
        output_length=64,
    )
    engine = Engine(config, dataclasses.replace(deployment, mesh=mesh))
    params = jax.block_until_ready(random_parameters(config, mesh, "float32"))
    tokens = np.zeros((1, int(chunk)), np.int32)
    lengths = np.array([int(chunk)])
    tables = engine.tables([int(length)])

    def run() -> None:
        cache = engine.new_cache(deployment.cache_spec_for(int(length)))
        cache, last = engine.prefill(params, tables, cache, tokens, 0, lengths, None)
        state = engine.first(params, cache, last, lengths, lengths + 99)
        del cache
        jax.block_until_ready(engine.decode(params, tables, state))

    run()  # compiles
    let_go()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    compiled = compile_for(config, find_target("cpu:1"), deployment, int(length))
    arithmetic = needs_of(config, "cpu", deployment, int(length))
    totals = [max(n.total for n in needs.values()) for needs in (compiled, arithmetic)]
    print(json.dumps([weights + status("VmHWM") - before, *totals]))


if __name__ == "__main__":
    main(*sys.argv[1:])
