"""Small models to generate with: the golden ones, whose weights follow from their names."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
from golden.models.parameters import golden_parameters

from lsjax.distributed.sequence_layout import round_up_to_blocks
from lsjax.distributed.sharding import make_mesh, parse_mesh, put_on_mesh
from lsjax.families import parse_config
from lsjax.inference.engine_config import SEGMENT
from lsjax.inference.options import Options
from lsjax.language_model import LanguageModel
from lsjax.nn.int8_weights import quantize_parameters
from lsjax.nn.parameters import abstract_parameters, flatten, unflatten
from lsjax.positions.scaling import override_rope_scaling

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIGS = {file.parent.name: file for file in GOLDEN.glob("models/*/config.json")}
CONFIGS |= {file.stem: file for file in GOLDEN.glob("baichuan/*.json")}

BLOCK = 64  # that a quantized cache keeps in floats: shorter than a user's, as prompts are


def build(
    name,
    kv="float32",
    chunk=64,
    mesh="",
    rope_scaling=None,
    eos=(),
    layers=0,
    segment=SEGMENT,
    block=BLOCK,
    weight_dtype="auto",
    **changes,
):
    """A golden model: its last layers alone if a number is given, or all of them
    several times for a larger number; its config with changes."""
    config = override_rope_scaling(changed_config(name, layers, **changes), rope_scaling)
    devices = make_mesh(parse_mesh(mesh))
    settings = Options(
        folder=str(CONFIGS[name].parent),
        config=config,
        mesh=devices,
        dtype="float32",
        weight_dtype=weight_dtype,
        kv_cache_dtype=kv,
        prefill_chunk=round_up_to_blocks(chunk, devices.shape["context"]),
        eos_token_ids=frozenset(eos),
        segment=segment,
        cache_block=block,
    )
    return LanguageModel(settings, parameters(name, layers, mesh, weight_dtype, **changes))


def mesh_of(sizes):
    """Returns the mesh of sizes such as "124", as build takes it."""
    return "data={},context={},model={}".format(*sizes)


@functools.cache
def golden_logits(name):
    return dict(np.load(CONFIGS[name].parent / "logits.npz"))


@functools.cache
def changed_config(name, layers, **changes):
    config = parse_config(json.loads(CONFIGS[name].read_text()))
    config = dataclasses.replace(config, **changes)
    times = -(-layers // len(config.layers)) or 1
    return dataclasses.replace(config, layers=(config.layers * times)[-layers:])


@functools.lru_cache(maxsize=32)
def parameters(name, layers, mesh, weight_dtype, **changes):
    config, devices = changed_config(name, layers, **changes), make_mesh(parse_mesh(mesh))
    floats = abstract_parameters(config, devices, "float32")
    found = flatten(golden_parameters(config))
    found = {path: put_on_mesh(found[path], leaf.sharding) for path, leaf in floats.items()}
    wanted = abstract_parameters(config, devices, "float32", weight_dtype)
    return unflatten(quantize_parameters(found, wanted))
