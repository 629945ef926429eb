"""The ring on a TPU, read from the compiled program: keys travel while others are attended to."""

import dataclasses
import re

import pytest
from helpers.published import GLM

from lsjax.config import LayerKind
from lsjax.families import read_config
from lsjax.inference.engine import Engine
from lsjax.inference.engine_config import EngineConfig
from lsjax.planning import find_target, target_mesh

STEP = re.compile(r"%(\S+) = .* (collective-permute-(?:start|done))\((%\S+?)[,)]")


@pytest.mark.as_users_compile
def test_the_next_block_travels_while_the_current_one_is_attended_to():
    config = dataclasses.replace(read_config(GLM), layers=(LayerKind(),))
    mesh = target_mesh(find_target("v5e:2x4"), {"context": 8})
    settings = EngineConfig(mesh=mesh, dtype="bfloat16", kv_cache_dtype="int8", prefill_chunk=4096)
    prefill, _ = Engine(config, settings).compile_ahead(settings.cache_spec(1, 2**20, 0))
    started, overlapped = {}, []
    # Instructions of a computation stand in the order in which they run.
    for line in prefill.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            started = dict.fromkeys(started, True)
        elif found := STEP.search(line):
            name, what, operand = found.groups()
            if what == "collective-permute-start":
                started[f"%{name}"] = False
            else:
                overlapped.append(started.pop(operand))
        elif line.startswith("}"):
            assert not started  # ended where it began
    # Keys and values that come, and the cache's with their scales.
    assert len(overlapped) >= 6 and all(overlapped)
